"""The requests of one stage to a judge. A journal keeps the replies, so that a stage that is killed
and restarted repeats no request that had a valid reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.stage_settings import JudgeSettings
from tuneyard.errors import StageError
from tuneyard_trainer.judging.endpoint import Budget, Endpoint
from tuneyard_trainer.judging.judges import (
    MODEL_LABEL_TOKENS,
    Judge,
    JudgePrompt,
    Pair,
    Reply,
    Tally,
)
from tuneyard_trainer.judging.local_model import load_judge
from tuneyard_trainer.storage.journal import Journal
from tuneyard_trainer.worker import Interrupted, StageContext


def open_journal(context: StageContext) -> Journal:
    """Open the stage's journal of completions and replies. It is removed when the stage is done."""
    worker = context.worker
    return Journal(context.workdir / "checkpoints", worker.identity, worker.persist, worker.owned)


@dataclass
class JudgeSession:
    """All requests of one stage, and the replies to them."""

    context: StageContext
    settings: JudgeSettings | None
    """The endpoint's settings. None: the judge is a local model."""
    journal: Journal
    tally: Tally
    budget: Budget
    replies: dict[str, Reply] = field(default_factory=dict)
    """Valid replies by the key of their prompt, those of earlier attempts included."""

    @classmethod
    def of(
        cls, context: StageContext, settings: JudgeSettings | None, journal: Journal
    ) -> JudgeSession:
        """Return a session with the replies and the spent budget that the journal holds."""
        entries = [entry for entry in journal.entries if "reply" in entry]
        replies = [Reply(**entry["reply"]) for entry in entries]
        valid = {
            reply.key: reply
            for reply, entry in zip(replies, entries, strict=True)
            if entry["valid"]
        }
        requests = sum(reply.attempts for reply in replies)
        tokens = sum(reply.tokens for reply in replies)
        name = judge_name(context.stage, settings)
        return cls(
            context=context,
            settings=settings,
            journal=journal,
            tally=Tally(name, replies=len(valid), requests=requests, tokens=tokens),
            budget=Budget(
                settings.max_requests if settings else None,
                settings.max_tokens if settings else None,
                requests=requests,
                tokens=tokens,
            ),
            replies=valid,
        )

    @property
    def judge(self) -> str:
        """The judge's name in records."""
        return self.tally.judge

    def metrics(self) -> dict[str, float]:
        """Return counts of requests, tokens and invalid replies, and whether the budget ran out."""
        return {"budgetSpent": float(self.budget.exhausted), **self.tally.metrics()}

    def request(self, judge: Judge, prompts: Sequence[JudgePrompt], message: str) -> None:
        """Request the missing valid replies to the prompts and add them to `replies`.

        Every reply is on disk when this returns or raises. Raises StageError JudgeNonsense,
        JudgeUnavailable and the errors of the judge, and Interrupted when the stage is asked to
        stop.
        """
        pending = {prompt.key: prompt for prompt in prompts if prompt.key not in self.replies}
        done = len(prompts) - len(pending)
        for reply in judge.replies(list(pending.values())):
            valid = reply.is_valid(pending[reply.key])
            self.journal.append([{"reply": reply.as_json(), "valid": valid}])
            self.tally.add(reply, valid=valid)
            if valid:
                self.replies[reply.key] = reply
            done += 1
            self.context.worker.report(
                step=done, total_steps=len(prompts), metrics=self.tally.metrics(), message=message
            )
        if self.context.worker.stop():
            raise Interrupted(self.context.stage.name, len(self.replies))
        self.tally.finish()

    def compare(
        self, pairs: Sequence[Pair], question: str, message: str
    ) -> list[tuple[Reply | None, Reply | None]]:
        """Return the replies to each pair in both orders. None: there is no valid reply.

        Raises as `request` does.
        """
        limit = self.settings.label_tokens if self.settings else MODEL_LABEL_TOKENS
        both_orders = [pair.prompts(question, limit) for pair in pairs]
        prompts = [prompt for orders in both_orders for prompt in orders]
        if any(prompt.key not in self.replies for prompt in prompts):
            self.request(self.open_judge(), prompts, message)
        return [
            (self.replies.get(straight.key), self.replies.get(swapped.key))
            for straight, swapped in both_orders
        ]

    def open_judge(self) -> Judge:
        """Return the judge that the plan names. Raises StageError."""
        stage, worker = self.context.stage, self.context.worker
        if "judge" in self.context.inputs:
            return load_judge(self.context.inputs["judge"], worker.device, self.judge, worker.stop)
        if stage.runtime.endpoint is None:
            raise StageError(
                "JudgeNotFound",
                f"the plan of {stage.name} names no judge.",
                advice="Plan the job again with this version.",
            )
        return Endpoint(stage.runtime.endpoint, self.budget, stop=worker.stop)

    def budget_spent(self, missing: str) -> StageError:
        """Return the error of a stage whose budget ran out before it had any result.

        `missing`: the missing result, as the clause after "before".
        """
        return StageError(
            "BudgetSpent",
            f"the budget of the judge {self.judge} was spent before {missing}.",
            advice="Raise judge.endpoint.maxRequests or maxTokens.",
        )


def judge_name(stage: PlannedStage, settings: JudgeSettings | None) -> str:
    """Return the judge's name in records: the endpoint's model, the model's URI, or "the model
    itself" for a policy that judges its own completions."""
    if settings is not None:
        return settings.model
    source = stage.inputs.get("judge")
    return source.uri if isinstance(source, SourceInput) else "the model itself"
