"""The requests of one stage to a judge. A journal keeps the replies, so that a stage that is killed
and restarted repeats no request that had a valid reply.

The workers share the prompts of a judge that runs in the stage. Rank 0 alone asks an endpoint: its
requests run at the same time, and the limits on concurrency, requests and tokens hold for the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.stage_settings import JudgeSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.sharing import SharedJournal, SharedStage
from tuneyard_trainer.generation.completions import Policy
from tuneyard_trainer.judging.endpoint import Budget, Endpoint
from tuneyard_trainer.judging.judges import (
    JUDGE,
    MODEL_LABEL_TOKENS,
    Judge,
    JudgePrompt,
    Pair,
    Reply,
    Tally,
)
from tuneyard_trainer.judging.local_model import ModelJudge, load_judge
from tuneyard_trainer.worker import StageContext


def open_journal(
    context: StageContext, shared: SharedStage
) -> AbstractContextManager[SharedJournal]:
    """Open the stage's journal of completions and replies. It is removed when the stage is done."""
    return shared.journal(context.workdir / "checkpoints")


@dataclass
class JudgeSession:
    """All requests of one stage, and the replies to them."""

    context: StageContext
    shared: SharedStage
    settings: JudgeSettings | None
    """The endpoint's settings. None: the judge is a local model."""
    journal: SharedJournal
    tally: Tally
    budget: Budget
    replies: dict[str, Reply] = field(default_factory=dict)
    """Valid replies by the key of their prompt, those of earlier attempts included."""

    @classmethod
    def of(
        cls,
        context: StageContext,
        shared: SharedStage,
        settings: JudgeSettings | None,
        journal: SharedJournal,
        path: str = JUDGE,
    ) -> JudgeSession:
        """Return a session with the replies and the spent budget that the journal holds. `path`:
        the judge's field in the manifest, for messages."""
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
            shared=shared,
            settings=settings,
            journal=journal,
            tally=Tally(name, path, replies=len(valid), requests=requests, tokens=tokens),
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
        own = self._own(list(pending.values()))
        for replies in self.shared.rounds([reply] for reply in judge.replies(own)):
            judged = [(reply, reply.is_valid(pending[reply.key])) for reply in replies]
            self.journal.append(
                {"reply": reply.as_json(), "valid": valid} for reply, valid in judged
            )
            for reply, valid in judged:
                self.tally.add(reply, valid=valid)
                if valid:
                    self.replies[reply.key] = reply
            done += len(replies)
            self.context.worker.report(
                step=done, total_steps=len(prompts), metrics=self.tally.metrics(), message=message
            )
        self.shared.raise_if_stopped(len(self.replies))
        self.tally.finish()

    def _own(self, prompts: Sequence[JudgePrompt]) -> list[JudgePrompt]:
        """Return the prompts that this worker requests replies to."""
        if self.settings is not None:
            return list(prompts) if self.context.worker.is_main else []
        lengths = [sum(len(turn["content"]) for turn in prompt.messages) for prompt in prompts]
        return [prompts[index] for index in self.shared.share(lengths)]

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
        stage, stop = self.context.stage, self.shared.stop
        if "judge" in self.context.inputs:
            device = self.context.worker.device
            return load_judge(self.context.inputs["judge"], device, self.judge, stop)
        if stage.runtime.endpoint is None:
            raise StageError(
                "JudgeNotFound",
                f"the plan of {stage.name} names no judge.",
                advice="Plan the job again with this version.",
            )
        return Endpoint(stage.runtime.endpoint, self.budget, stop=stop, path=self.tally.path)

    def open_judge_or(self, policy: Policy) -> Judge:
        """Return the judge that the plan names, or else the policy itself. Raises StageError."""
        if "judge" in self.context.inputs or self.context.stage.runtime.endpoint is not None:
            policy.release()
            return self.open_judge()
        return ModelJudge(
            policy.model,
            policy.tokenizer,
            self.judge,
            stop=self.shared.stop,
            template=policy.chat.chat_template,
        )

    def budget_spent(self, missing: str) -> StageError:
        """Return the error of a stage whose budget ran out before it had any result.

        `missing`: the missing result, as the clause after "before".
        """
        return StageError(
            "BudgetSpent",
            f"the budget of the judge {self.judge} was spent before {missing}.",
            advice=f"Raise {self.tally.path}.endpoint.maxRequests or maxTokens.",
        )


def judge_name(stage: PlannedStage, settings: JudgeSettings | None) -> str:
    """Return the judge's name in records: the endpoint's model, the model's URI, or "the model
    itself" for a policy that judges its own completions."""
    if settings is not None:
        return settings.model
    source = stage.inputs.get("judge")
    return source.uri if isinstance(source, SourceInput) else "the model itself"
