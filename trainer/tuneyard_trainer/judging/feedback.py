"""feedback: preferences by a judge (RLAIF; Lee et al. 2023, arXiv:2309.00267, section 2).

The policy answers each prompt several times, a judge compares the answers two by two in both
orders, and what it decides is left as `preferences.jsonl`, in the shape that `pairs` reads. Every
judgement, the ones that led to no label too, is in `judgements.jsonl`. Answers and replies go into
a journal as they come: a stage that was killed samples and asks nothing twice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from tuneyard.api.alignment import Sampling
from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import FeedbackSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.chat import Message
from tuneyard_trainer.data.prompts import Prompt, TokenizedPrompt, as_text
from tuneyard_trainer.generation.completions import Completion, Policy, sample_completions
from tuneyard_trainer.judging.judges import (
    MODEL_LABEL_TOKENS,
    Pair,
    Reply,
    Verdict,
    verdict,
)
from tuneyard_trainer.judging.session import Asking
from tuneyard_trainer.storage.files import write_atomically
from tuneyard_trainer.storage.journal import Journal, lines
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

LABELS, JUDGEMENTS = "preferences.jsonl", "judgements.jsonl"
MANY_TRUNCATED = 0.5


def run(context: StageContext) -> StageOutcome:
    """Samples, asks, and writes the labels. Raises StageError NoPreferences, BudgetSpent and what
    judges raise."""
    settings = context.settings(FeedbackSettings)
    policy = Policy.of(context.inputs, settings.chat, context.worker)
    prompts = policy.prompts(settings.prompts, settings.max_new_tokens, "aiFeedback.prompts")
    with Journal(
        context.workdir / "checkpoints", context.worker.identity, context.worker.persist
    ) as journal:
        found = sample_completions(
            context.stage.name,
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
        comparisons = Comparisons.of(prompts, found, settings)
        asking = Asking.of(context.stage, settings.judge, journal, context.worker)
        _ask(context.stage, context.inputs, settings, comparisons, asking)
    labels = Labels.of(comparisons, asking, settings)
    labels.write(context.workdir, asking.tally.judge, speaks=policy.has_chat_template)
    metrics = _metrics(found, comparisons, labels, asking)
    if not any(found.outcome in ("first", "second", "tie") for found in labels.verdicts):
        raise _no_preferences(comparisons, labels, asking)
    _warn_of(metrics["truncatedCompletions"], settings.max_new_tokens, context.worker)
    return StageOutcome(
        metrics,
        details={"judge": asking.tally.judge, "problems": asking.tally.shown},
        contents=(LABELS,),
    )


def _ask(
    stage: PlannedStage,
    inputs: Mapping[str, Path],
    settings: FeedbackSettings,
    comparisons: Comparisons,
    asking: Asking,
) -> None:
    limit = settings.judge.label_tokens if settings.judge else MODEL_LABEL_TOKENS
    asks = [ask for pair in comparisons.pairs for ask in pair.asks(settings.question, limit)]
    if any(ask.key not in asking.known for ask in asks):
        asking.ask(asking.open(stage, inputs), asks, "asking the judge")


# ---- pairs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparisons:
    """What the judge is asked about."""

    pairs: list[Pair]
    prompts: dict[str, Prompt]
    """Each pair's prompt, by the pair's key."""
    skipped: Counter[str]
    """Pairs that are no choice: `identical` answers, and those with an `empty` one."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[TokenizedPrompt],
        found: Sequence[Sequence[Completion]],
        settings: FeedbackSettings,
    ) -> Comparisons:
        """Every two answers to a prompt, each prompt's first pair before any prompt's second, so
        that a budget is spent on as many prompts as it can be."""
        comparisons = cls([], {}, Counter())
        for first, second in combinations(range(settings.responses_per_prompt), 2):
            for index, ready in enumerate(prompts):
                a, b = found[index][first].text, found[index][second].text
                key = f"{index}/{first}-{second}"
                if not (a and b):
                    comparisons.skipped["empty"] += 1
                elif a == b:
                    comparisons.skipped["identical"] += 1
                else:
                    conversation = as_text(ready.prompt.messages)
                    principle = random.Random(f"{settings.seed}/{key}").choice(settings.principles)
                    comparisons.pairs.append(Pair(key, conversation, (a, b), principle))
                    comparisons.prompts[key] = ready.prompt
        return comparisons


# ---- labels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What the judge's replies make of the pairs, in their order."""

    comparisons: Comparisons
    replies: list[tuple[Reply | None, Reply | None]]
    """In both orders."""
    verdicts: list[Verdict]

    @classmethod
    def of(cls, comparisons: Comparisons, asking: Asking, settings: FeedbackSettings) -> Labels:
        replies = [
            (asking.known.get(f"{pair.key}/straight"), asking.known.get(f"{pair.key}/swapped"))
            for pair in comparisons.pairs
        ]
        verdicts = [verdict(*both, settings.disagreement) for both in replies]
        return cls(comparisons, replies, verdicts)

    def write(self, workdir: Path, judge: str, *, speaks: bool) -> None:
        """`speaks`: whether the policy reads conversations; else the rows are plain text."""
        rows = (
            _row(pair, found, self.comparisons.prompts[pair.key], judge, speaks)
            for pair, found in zip(self.comparisons.pairs, self.verdicts, strict=True)
        )
        write_atomically(workdir / LABELS, lines(row for row in rows if row is not None))
        write_atomically(workdir / JUDGEMENTS, lines(self._judgements(judge)))

    def _judgements(self, judge: str) -> Iterable[dict[str, Any]]:
        for pair, both, found in zip(
            self.comparisons.pairs, self.replies, self.verdicts, strict=True
        ):
            straight, swapped = (reply.as_json() if reply else None for reply in both)
            yield {
                "key": pair.key,
                "prompt": self.comparisons.prompts[pair.key].where,
                "judge": judge,
                "principle": pair.principle,
                "answers": pair.answers,
                **vars(found),
                "straight": straight,
                "swapped": swapped,
            }


def _row(
    pair: Pair, found: Verdict, prompt: Prompt, judge: str, speaks: bool
) -> dict[str, Any] | None:
    """None for a pair without a label. A tie is a pair whose label has the probability 0.5."""
    if found.outcome in ("dropped", "unlabelled") or found.probability is None:
        return None
    chosen, rejected = pair.answers
    probability = 0.5 if found.outcome == "tie" else found.probability
    if found.outcome == "second":
        chosen, rejected, probability = rejected, chosen, 1 - probability
    return {
        "prompt": list(prompt.messages) if speaks else prompt.question,
        "chosen": _turn(chosen) if speaks else chosen,
        "rejected": _turn(rejected) if speaks else rejected,
        "probability": probability,
        "provenance": {
            "key": pair.key,
            "judge": judge,
            "principle": pair.principle,
            "agreed": found.agreed,
        },
    }


def _turn(answer: str) -> list[Message]:
    return [{"role": "assistant", "content": answer}]


# ---- figures ------------------------------------------------------------------------------------


def _metrics(
    found: Sequence[Sequence[Completion]], comparisons: Comparisons, labels: Labels, asking: Asking
) -> dict[str, float]:
    outcomes = Counter(made.outcome for made in labels.verdicts)
    sampled = [answer for group in found for answer in group]
    judged = [made for made in labels.verdicts if made.outcome != "unlabelled"]
    leaning = [
        reply.probability
        for both in labels.replies
        for reply in both
        if reply is not None and reply.probability is not None
    ]
    return {
        "prompts": float(len(found)),
        "answers": float(len(sampled)),
        "truncatedCompletions": _share(not answer.complete for answer in sampled),
        "pairs": float(len(comparisons.pairs)),
        "identicalPairs": float(comparisons.skipped["identical"]),
        "emptyPairs": float(comparisons.skipped["empty"]),
        "labels": float(outcomes["first"] + outcomes["second"]),
        "ties": float(outcomes["tie"]),
        "dropped": float(outcomes["dropped"]),
        "unlabelled": float(outcomes["unlabelled"]),
        "judgeAgreement": _share(made.agreed for made in judged),
        "judgePrefersFirst": _share(p > 0.5 for p in leaning),
        "budgetSpent": float(asking.budget.refused),
        **asking.tally.metrics(),
    }


def _warn_of(truncated: float, limit: int, worker: Worker) -> None:
    if truncated > MANY_TRUNCATED:
        worker.report(
            message=f"{truncated:.0%} of the answers were cut off at {limit} tokens, so the judge "
            "saw beginnings only: raise aiFeedback.maxNewTokens"
        )


def _share(values: Iterable[bool]) -> float:
    counted = list(values)
    return sum(counted) / len(counted) if counted else 0.0


def _no_preferences(comparisons: Comparisons, labels: Labels, asking: Asking) -> StageError:
    outcomes = Counter(found.outcome for found in labels.verdicts)
    if not comparisons.pairs:
        skipped = comparisons.skipped
        return StageError(
            "NoPreferences",
            f"there is nothing to compare: {skipped['identical']} pairs of answers are identical "
            f"and {skipped['empty']} hold an empty one.",
            advice="Raise aiFeedback.temperature, or give aiFeedback.prompts that leave a choice.",
        )
    if asking.budget.refused:
        return StageError(
            "BudgetSpent",
            f"the judge's budget was spent before one of {len(comparisons.pairs)} pairs had a "
            "label.",
            advice="Raise judge.endpoint.maxRequests or maxTokens.",
        )
    return StageError(
        "NoPreferences",
        f"the judge {asking.tally.judge} decided none of {len(comparisons.pairs)} pairs: "
        f"{outcomes['dropped']} differently once the answers had changed places, "
        f"{outcomes['unlabelled']} not at all.",
        advice="Choose a stronger judge, or set aiFeedback.disagreement: average, which goes by "
        "the mean of both label probabilities.",
    )
