"""feedback: preferences labeled by a judge (RLAIF; Lee et al. 2023, arXiv:2309.00267, section 2).

The policy samples completions of each prompt, and a judge compares them in pairs and in both
orders. Writes `preferences.jsonl`, which the stage `pairs` reads, and `judgments.jsonl`: every
judgment, including those that gave no label. A journal keeps completions and replies, so that a
stage that is killed and restarted repeats neither.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from tuneyard.api.alignment import Sampling
from tuneyard.api.stage_settings import FeedbackSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prompts import Prompt, TokenizedPrompt, as_text
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.generation.completions import Completion, Policy, sample_completions
from tuneyard_trainer.judging.judges import Pair, Reply, Verdict, turn, verdict
from tuneyard_trainer.judging.session import JudgeSession, open_journal
from tuneyard_trainer.storage.files import write_atomically
from tuneyard_trainer.storage.journal import lines
from tuneyard_trainer.worker import StageContext, StageOutcome

LABELS, JUDGMENTS = "preferences.jsonl", "judgments.jsonl"
MANY_TRUNCATED = 0.5
"""The share of truncated completions above which the stage warns."""


def run(context: StageContext) -> StageOutcome:
    """Sample completions, request judgments and write the labels. All workers share the work, and
    rank 0 writes.

    Raises StageError NoPreferences, BudgetSpent and the errors of the judge.
    """
    with SharedStage(context.worker) as shared:
        return _run(context, shared)


def _run(context: StageContext, shared: SharedStage) -> StageOutcome:
    settings = context.settings(FeedbackSettings)
    policy = Policy.of(context.inputs, settings.chat, context.worker)
    prompts = shared.from_main(
        lambda: policy.prompts(settings.prompts, settings.max_new_tokens, "aiFeedback.prompts")
    )
    with open_journal(context, shared) as journal:
        completions = sample_completions(
            shared,
            policy,
            prompts,
            journal,
            count=settings.responses_per_prompt,
            sampling=Sampling(
                temperature=settings.temperature, max_new_tokens=settings.max_new_tokens
            ),
            seed=settings.seed,
        )
        policy.release()
        comparisons = Comparisons.of(prompts, completions, settings)
        session = JudgeSession.of(context, shared, settings.judge, journal)
        replies = session.compare(comparisons.pairs, settings.question, "requesting judgments")
    if not context.worker.is_main:
        return StageOutcome()
    labels = Labels.of(comparisons, replies, settings)
    labels.write(context.workdir, session.judge, as_messages=policy.has_chat_template)
    metrics = _metrics(completions, labels, session)
    if not metrics["labels"] + metrics["ties"]:
        raise _no_preferences(labels, session)
    truncated = metrics["truncatedCompletions"]
    if truncated > MANY_TRUNCATED:
        context.worker.report(
            message=f"{truncated:.0%} of the completions were truncated at "
            f"{settings.max_new_tokens} tokens, so the judge compares only their starts: raise "
            "aiFeedback.maxNewTokens"
        )
    return StageOutcome(
        metrics,
        details={"judge": session.judge, "problems": session.tally.problems},
        contents=(LABELS,),
    )


# ---- pairs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparisons:
    """The pairs of completions that the judge compares."""

    pairs: list[Pair]
    prompts: dict[str, Prompt]
    """The prompt of each pair, by the pair's key."""
    skipped: Counter[str]
    """Counts of pairs that are not compared: `identical` completions, or an `empty` one."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[Sequence[Completion]],
        settings: FeedbackSettings,
    ) -> Comparisons:
        """Return all pairs of completions of each prompt.

        The first pair of every prompt comes before the second pair of any prompt, so that a budget
        covers as many prompts as possible.
        """
        comparisons = cls([], {}, Counter())
        for first, second in combinations(range(settings.responses_per_prompt), 2):
            for index, tokenized in enumerate(prompts):
                a, b = completions[index][first].text, completions[index][second].text
                key = f"{index}/{first}-{second}"
                if not (a and b):
                    comparisons.skipped["empty"] += 1
                elif a == b:
                    comparisons.skipped["identical"] += 1
                else:
                    conversation = as_text(tokenized.prompt.messages)
                    principle = random.Random(f"{settings.seed}/{key}").choice(settings.principles)
                    comparisons.pairs.append(Pair(key, conversation, (a, b), principle))
                    comparisons.prompts[key] = tokenized.prompt
        return comparisons


# ---- labels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The judge's verdicts on the pairs, in the order of the pairs."""

    comparisons: Comparisons
    replies: Sequence[tuple[Reply | None, Reply | None]]
    """The replies to each pair, in both orders."""
    verdicts: Sequence[Verdict]

    @classmethod
    def of(
        cls,
        comparisons: Comparisons,
        replies: Sequence[tuple[Reply | None, Reply | None]],
        settings: FeedbackSettings,
    ) -> Labels:
        """Return the verdicts of the replies to the pairs."""
        verdicts = [verdict(*both, settings.disagreement) for both in replies]
        return cls(comparisons, replies, verdicts)

    @property
    def outcomes(self) -> Counter[str]:
        """Counts of pairs by outcome."""
        return Counter(found.outcome for found in self.verdicts)

    def write(self, workdir: Path, judge: str, *, as_messages: bool) -> None:
        """Write `preferences.jsonl` and `judgments.jsonl`.

        `as_messages`: write completions as lists of messages, as prompts are, not as plain text.
        """
        rows = (
            _row(pair, found, self.comparisons.prompts[pair.key], judge, as_messages)
            for pair, found in zip(self.comparisons.pairs, self.verdicts, strict=True)
        )
        write_atomically(workdir / LABELS, lines(row for row in rows if row is not None))
        write_atomically(workdir / JUDGMENTS, lines(self._judgments(judge)))

    def _judgments(self, judge: str) -> Iterator[dict[str, Any]]:
        for pair, both, found in zip(
            self.comparisons.pairs, self.replies, self.verdicts, strict=True
        ):
            straight, swapped = (reply.as_json() if reply else None for reply in both)
            yield {
                "key": pair.key,
                "prompt": self.comparisons.prompts[pair.key].where,
                "judge": judge,
                "principle": pair.principle,
                "completions": pair.completions,
                **vars(found),
                "straight": straight,
                "swapped": swapped,
            }


def _row(
    pair: Pair, found: Verdict, prompt: Prompt, judge: str, as_messages: bool
) -> dict[str, Any] | None:
    """Return the row of a labeled pair; a tie has the probability 0.5. None: there is no label."""
    if found.outcome in ("dropped", "unlabeled") or found.probability is None:
        return None
    chosen, rejected = pair.completions
    probability = 0.5 if found.outcome == "tie" else found.probability
    if found.outcome == "second":
        chosen, rejected, probability = rejected, chosen, 1 - probability
    return {
        "prompt": list(prompt.messages),
        "chosen": [turn("assistant", chosen)] if as_messages else chosen,
        "rejected": [turn("assistant", rejected)] if as_messages else rejected,
        "probability": probability,
        "provenance": {
            "key": pair.key,
            "judge": judge,
            "principle": pair.principle,
            "agreed": found.agreed,
        },
    }


# ---- metrics ------------------------------------------------------------------------------------


def _metrics(
    completions: Sequence[Sequence[Completion]], labels: Labels, session: JudgeSession
) -> dict[str, float]:
    sampled = [completion for group in completions for completion in group]
    outcomes = labels.outcomes
    skipped = labels.comparisons.skipped
    return {
        "prompts": float(len(completions)),
        "completions": float(len(sampled)),
        "truncatedCompletions": _share(not completion.complete for completion in sampled),
        "pairs": float(len(labels.comparisons.pairs)),
        "identicalPairs": float(skipped["identical"]),
        "emptyPairs": float(skipped["empty"]),
        "labels": float(outcomes["first"] + outcomes["second"]),
        "ties": float(outcomes["tie"]),
        "dropped": float(outcomes["dropped"]),
        "unlabeled": float(outcomes["unlabeled"]),
        "judgeAgreement": _share(
            found.agreed for found in labels.verdicts if found.outcome != "unlabeled"
        ),
        "judgePrefersFirst": _share(
            reply.probability > 0.5
            for both in labels.replies
            for reply in both
            if reply is not None and reply.probability is not None
        ),
        **session.metrics(),
    }


def _share(values: Iterable[bool]) -> float:
    """Return the share of true values. 0: there are no values."""
    counted = list(values)
    return sum(counted) / len(counted) if counted else 0.0


def _no_preferences(labels: Labels, session: JudgeSession) -> StageError:
    pairs, skipped = labels.comparisons.pairs, labels.comparisons.skipped
    if not pairs:
        return StageError(
            "NoPreferences",
            f"there is no pair to compare: {skipped['identical']} pairs of completions are "
            f"identical and {skipped['empty']} have an empty one.",
            advice="Raise aiFeedback.temperature, or choose aiFeedback.prompts that allow "
            "different completions.",
        )
    if session.budget.exhausted:
        return session.budget_spent(f"any of {len(pairs)} pairs had a label")
    return StageError(
        "NoPreferences",
        f"the judge {session.judge} decided none of {len(pairs)} pairs: "
        f"{labels.outcomes['dropped']} have different verdicts in the two orders, and "
        f"{labels.outcomes['unlabeled']} have no valid reply.",
        advice="Choose a stronger judge, or set aiFeedback.disagreement: average, which takes the "
        "mean of both label probabilities.",
    )
