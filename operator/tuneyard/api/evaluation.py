"""What is measured, and the limits that a result must satisfy: `spec.evaluate`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.meta import Model, Rule

Metric = Literal[
    "validationLoss",
    "validationPerplexity",
    "lossReduction",
    "answerAccuracy",
    "answerAccuracyGain",
]
"""What a gate can look at. lossReduction: 1 - tuned/base held-out loss. answerAccuracy: share of
the held-out rows with an `expected` field whose sampled answer contains it; the gain: over base."""

AlignmentMetric = Literal[
    "preferenceAccuracy",
    "preferenceMargin",
    "rewardAccuracy",
    "rewardMargin",
    "reward",
    "rewardGain",
    "kl",
    "lengthRatio",
    "distinctRatio",
    "repetition",
    "complete",
    "sycophancyShift",
    "winRate",
]
"""What a gate of an alignment can look at. preferenceAccuracy, preferenceMargin: the aligned
model's log-probabilities against the start's on the held-out pairs. rewardAccuracy, rewardMargin:
the reward model's on the same pairs. reward: mean over the aligned model's own answers to held-out
prompts; the gain: over the start's. kl: nats per answer from the start. lengthRatio: mean length of
an answer over the start's. distinctRatio: different pairs of words among all in the answers
together (distinct-2), over the start's: low where every prompt gets the same answer. repetition:
share of an answer's sequences of 4 words that it said before. complete: share of answers that end
by themselves. sycophancyShift: how much likelier a wrong answer becomes once the user holds it.
winRate: share of the aligned model's answers that `evaluate.winRate`'s judge prefers to the
start's."""


class Gate(Model):
    """A bound that the tuned model must meet; a job that misses one fails and exports nothing."""

    metric: str = Field(min_length=1, max_length=128)
    """A metric of the evaluation: one of `Metric` (of an alignment, `AlignmentMetric`), or
    SUITE/METRIC."""
    at_least: float | None = None
    """The metric must not be lower. None: no lower bound."""
    at_most: float | None = None
    """The metric must not be higher. None: no upper bound."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.atLeast) || has(self.atMost)",
            holds=lambda gate: gate.at_least is not None or gate.at_most is not None,
            message="has no bound: set atLeast, atMost or both",
            reads=("atLeast", "atMost"),
        ),
    )


class Evaluate(Model):
    """What to measure of the tuned model."""

    compare_with_base: bool = True
    """Measure the base model on the same held-out rows too."""
    samples: int = Field(default=3, ge=0, le=100)
    """Held-out prompts whose answers, of base and tuned model, are shown side by side."""
    max_new_tokens: int = Field(default=64, ge=1, le=8192)
    """The longest sampled answer, in tokens."""
    few_shot: int = Field(default=0, ge=0, le=64)
    """Worked examples before each question of a suite."""
    suites: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        default=[], max_length=64
    )
    """Benchmark suites by their lm-evaluation-harness names."""
    gates: list[Gate] = Field(default=[], max_length=64)
    """Bounds that decide whether the result is good enough."""
