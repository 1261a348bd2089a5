"""A stage's questions to a judge: what was replied is kept, and asked for no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.stage_settings import JudgeSettings
from tuneyard.errors import StageError
from tuneyard_trainer.judging.endpoint import Budget, Endpoint
from tuneyard_trainer.judging.judges import Ask, Judge, Reply, Tally
from tuneyard_trainer.judging.local_model import open_judge
from tuneyard_trainer.storage.journal import Journal
from tuneyard_trainer.worker import Interrupted, Worker


@dataclass
class Asking:
    """All that one stage asks."""

    stage: str
    journal: Journal
    worker: Worker
    known: dict[str, Reply] = field(default_factory=dict)
    """Useful replies by key, those of earlier attempts among them."""
    requests: int = 0
    """Sent by earlier attempts."""
    tokens: int = 0
    """Used by earlier attempts."""
    tally: Tally = field(init=False)
    budget: Budget = field(init=False)

    @classmethod
    def of(
        cls,
        stage: PlannedStage,
        judge: JudgeSettings | None,
        journal: Journal,
        worker: Worker,
    ) -> Asking:
        """Takes up what the journal holds."""
        asking = cls(stage.name, journal, worker)
        for entry in journal.entries:
            if "reply" in entry:
                reply = Reply(**entry["reply"])
                asking.requests += reply.attempts
                asking.tokens += reply.tokens
                if entry["useful"]:
                    asking.known[reply.key] = reply
        asking.tally = Tally(judge_name(stage, judge))
        asking.tally.recall(len(asking.known), asking.requests, asking.tokens)
        asking.budget = Budget(
            judge.max_requests if judge else None,
            judge.max_tokens if judge else None,
            requests=asking.requests,
            tokens=asking.tokens,
        )
        return asking

    def ask(self, judge: Judge, asks: Sequence[Ask], message: str) -> None:
        """Puts the questions that have no useful reply yet; the replies are in `known` then.

        Raises StageError JudgeNonsense, JudgeUnavailable and what the judge raises, and Interrupted
        when the stage is asked to stop; every reply is on disk by then.
        """
        pending = [ask for ask in asks if ask.key not in self.known]
        wants_label = {ask.key: ask.wants_label for ask in pending}
        done = len(asks) - len(pending)
        for reply in judge.replies(pending):
            useful = self.tally.useful(reply, wants_label=wants_label[reply.key])
            self.journal.append([{"reply": reply.as_json(), "useful": useful}])
            self.tally.add(reply, wants_label=wants_label[reply.key])
            if useful:
                self.known[reply.key] = reply
            done += 1
            self.worker.report(
                step=done, total_steps=len(asks), metrics=self.tally.metrics(), message=message
            )
        if self.worker.stop():
            raise Interrupted(self.stage, len(self.known))
        self.tally.finish()

    def open(self, stage: PlannedStage, inputs: Mapping[str, Path]) -> Judge:
        """The judge that the plan names. Raises StageError."""
        if "judge" in inputs:
            return open_judge(
                inputs["judge"], self.worker.device, self.tally.judge, self.worker.stop
            )
        endpoint = stage.runtime.endpoint
        if endpoint is None:
            raise StageError(
                "JudgeNotFound",
                f"the plan of {stage.name} names no judge.",
                advice="Plan the job again with this version.",
            )
        return Endpoint(endpoint, self.budget, stop=self.worker.stop)


def judge_name(stage: PlannedStage, judge: JudgeSettings | None) -> str:
    """What the record calls the judge: the endpoint's model, the model's uri, or the policy."""
    if judge is not None:
        return judge.model
    source = stage.inputs.get("judge")
    return source.uri if isinstance(source, SourceInput) else "the model itself"
