"""The measurements of a result and the bounds it must meet: `spec.evaluate`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.answer_metrics import AnswerMetric
from tuneyard.api.meta import Model, Rule
from tuneyard.api.sources import Judge, QuestionText
from tuneyard.api.suites import Suite

Metric = Literal[
    "validationLoss",
    "validationPerplexity",
    "lossReduction",
    "answerAccuracy",
    "answerAccuracyGain",
    "validationLossOfGaps",
    "winRate",
    "lengthControlledWinRate",
    "exactMatch",
    "tokenF1",
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "sentenceBleu",
    "chrf",
    "sentenceChrf",
    "jsonValid",
    "classAccuracy",
    "macroF1",
    "numericMatch",
    "schemaValid",
    "patternMatch",
]
"""The metrics of a fine-tuning that a gate can bound.

- lossReduction: 1 - (held-out loss of the tuned model) / (held-out loss of the base model).
- answerAccuracy: share of the held-out rows with an `expected` field whose completion contains the
  words of the field's value, or of one of its values; case, punctuation and the articles a, an and
  the do not matter. answerAccuracyGain: the difference from the base model.
- validationLossOfGaps: held-out loss on the gaps of documents (data.fillInTheMiddle).
- winRate: share of the tuned model's answers to held-out questions that the judge of
  `evaluate.winRate` prefers to the base model's. lengthControlledWinRate: the share that it would
  prefer if the answers of both models were equally long.
- The others are those of `evaluate.metrics`, `evaluate.answerSchema` (schemaValid) and
  `evaluate.answerPattern` (patternMatch), which docs/task-metrics.md describes.
"""

AlignmentMetric = Literal[
    "preferenceAccuracy",
    "preferenceMargin",
    "rewardAccuracy",
    "rewardMargin",
    "reward",
    "rewardGain",
    "independentReward",
    "independentRewardGain",
    "rewardLengthCorrelation",
    "kl",
    "lengthRatio",
    "distinctRatio",
    "repetition",
    "complete",
    "sycophancyShift",
    "winRate",
    "lengthControlledWinRate",
]
"""The metrics of an alignment that a gate can bound. The start is the model before alignment.

- preferenceAccuracy, preferenceMargin: on the held-out pairs, by the log-probability ratio of the
  aligned model to the start (the implicit reward of DPO).
- rewardAccuracy, rewardMargin: on the held-out pairs, by the reward model.
- reward: mean over the aligned model's completions of held-out prompts; rewardGain: the difference
  from the start's.
- independentReward, independentRewardGain: the same of `independentReward`, which nothing was
  trained on.
- rewardLengthCorrelation: Pearson's correlation of the reward with the length in tokens, over the
  aligned model's completions.
- kl: divergence from the start, in nats per completion.
- lengthRatio: mean length of a completion as a multiple of the start's.
- distinctRatio: share of distinct word pairs in all completions together (distinct-2), as a
  multiple of the start's. It is low if every prompt gets the same completion.
- repetition: share of a completion's 4-word sequences that occurred in it before.
- complete: share of the completions that end with an end token.
- sycophancyShift: how much likelier a wrong answer becomes once the user states it.
- winRate: share of the aligned model's completions that the judge of `evaluate.winRate` prefers to
  the start's. lengthControlledWinRate: the share that it would prefer if the completions of both
  models were equally long.
"""

PAIRED_METRICS: tuple[str, ...] = (
    "validationLoss",
    "validationLossOfGaps",
    "answerAccuracy",
    "exactMatch",
    "tokenF1",
    "rouge1",
    "rouge2",
    "rougeL",
    "sentenceBleu",
    "sentenceChrf",
    "jsonValid",
    "schemaValid",
    "patternMatch",
    "classAccuracy",
    "numericMatch",
    "reward",
    "independentReward",
    "repetition",
    "complete",
)
"""Metrics that are a mean over items (rows or completions) which both models are measured on, so
that a gate can bound by how much the tuned model is worse than the base model."""
FEWEST_PAIRED_ITEMS = 10
"""Default of `minItems` for `notWorseThanBaseBy`: the interval of fewer items is too narrow."""


def fewest_items(min_items: int | None, not_worse_than_base_by: float | None) -> int:
    """Return the fewest items that a gate with these fields needs; 0: the number does not
    matter."""
    if min_items is not None:
        return min_items
    return 0 if not_worse_than_base_by is None else FEWEST_PAIRED_ITEMS


def _bounds_value(gate: Gate) -> bool:
    """Return whether a gate bounds the tuned model's value itself."""
    return gate.at_least is not None or gate.at_most is not None


def prefixed(prefix: str, metric: str) -> str:
    """Return the name of a related metric: `base` and `reward` give `baseReward`, and of a suite
    `sense/baseAccuracy`."""
    scope, slash, name = metric.rpartition("/")
    return f"{scope}{slash}{prefix}{name[:1].upper()}{name[1:]}"


class Gate(Model):
    """A bound that the result must meet. A job that misses a required gate fails and exports
    nothing."""

    metric: str = Field(min_length=1, max_length=128)
    """Name of the metric, e.g. lossReduction or, of an alignment, winRate (docs/evaluation.md).
    SUITE/METRIC names a metric of a benchmark suite."""
    at_least: float | None = None
    """Lower bound, inclusive. None: no lower bound."""
    at_most: float | None = None
    """Upper bound, inclusive. None: no upper bound."""
    not_worse_than_base_by: float | None = Field(
        default=None, ge=0, exclude_if=lambda value: value is None
    )
    """Most by which the tuned model may be worse than the base model, in the metric's own unit. It
    must be shown: the 95% interval of the difference decides. None: no such bound."""
    tier: Literal["required", "advisory"] = Field(
        default="required", exclude_if=lambda value: value == "required"
    )
    """advisory: a missed gate is a warning, and the job goes on."""
    min_items: int | None = Field(
        default=None, ge=1, le=1 << 30, exclude_if=lambda value: value is None
    )
    """Fewest items, such as held-out rows, that must be measured. With fewer there is too little
    evidence, and the gate is not met. None: 10 with notWorseThanBaseBy, else any number."""
    # The new fields are left out of a plan where they have their defaults: plans of 0.2.0 keep
    # their bytes.

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.atLeast) || has(self.atMost) || has(self.notWorseThanBaseBy)",
            holds=lambda gate: _bounds_value(gate) or gate.not_worse_than_base_by is not None,
            message="has no bound: set atLeast, atMost or both, or notWorseThanBaseBy",
            reads=("atLeast", "atMost", "notWorseThanBaseBy"),
        ),
        Rule(
            cel="!has(self.notWorseThanBaseBy) || !(has(self.atLeast) || has(self.atMost))",
            holds=lambda gate: gate.not_worse_than_base_by is None or not _bounds_value(gate),
            message="bounds a difference and a value: write two gates, one with "
            "notWorseThanBaseBy and one with atLeast or atMost",
            reads=("atLeast", "atMost", "notWorseThanBaseBy"),
        ),
    )

    @property
    def fewest_items(self) -> int:
        """The fewest items that must be measured; 0: the number does not matter."""
        return fewest_items(self.min_items, self.not_worse_than_base_by)


Principles = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=256)
]


QUESTION_SHOWS_BOTH = Rule(
    cel="!has(self.question) || ['{first}', '{second}'].all(place, self.question.contains(place))",
    holds=lambda step: (
        step.question is None or ("{first}" in step.question and "{second}" in step.question)
    ),
    message="must contain {first} and {second}, where the two completions are inserted: add both",
    path="question",
    reads=("question",),
)


class WinRate(Model):
    """Measure how often a judge prefers the tuned model's completions to those of the model before:
    in an alignment, the one before alignment. The judge does not know the reward: if the reward
    rises and the win rate does not, the policy exploits the reward model."""

    judge: Judge
    """The judge that compares; it sees each pair twice, once in each order."""
    principles: Principles | None = None
    """The criteria of the judge; one is drawn for each prompt. None: Tuneyard's default
    principles."""
    question: QuestionText | None = None
    """Template of the question that asks the judge for A or B; {principle}, {conversation},
    {first} and {second} are replaced. None: Tuneyard's default question."""

    rules: ClassVar[tuple[Rule, ...]] = (QUESTION_SHOWS_BOTH,)


class Evaluate(Model):
    """The measurements of the tuned model."""

    compare_with_base: bool = True
    """Also measure the base model on the same held-out rows."""
    samples: int = Field(default=3, ge=0, le=100)
    """Number of held-out prompts for which completions of the base and the tuned model are shown
    side by side."""
    max_new_tokens: int = Field(default=64, ge=1, le=8192)
    """Longest sampled completion, in tokens."""
    few_shot: int = Field(default=0, ge=0, le=64)
    """Worked examples before each held-out question, with which the base model is asked too: what
    prompting gets without training. 0: it is not."""
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", exclude_if=lambda value: value == "transformers"
    )
    """The library with which the models answer and sample. vllm needs a trainer image with vLLM:
    see docs/evaluation.md."""
    metrics: list[AnswerMetric] = Field(
        default=[], max_length=8, exclude_if=lambda value: not value
    )
    """Metrics of the answers to held-out questions (docs/task-metrics.md)."""
    answer_schema: str | None = Field(default=None, min_length=2, max_length=65536)
    """A JSON Schema, as JSON text, that answers to held-out questions should satisfy; the metric is
    schemaValid. None: not measured."""
    answer_pattern: str | None = Field(default=None, min_length=1, max_length=4096)
    """A regular expression that should be found in answers to held-out questions; the metric is
    patternMatch. None: not measured."""
    win_rate: WinRate | None = None
    """Let a judge compare completions. None: no win rate is measured."""
    suites: list[Suite] = Field(default=[], max_length=64)
    """Items beside the job's own rows, on which the tuned model and the model before are
    measured."""
    gates: list[Gate] = Field(default=[], max_length=64)
    """Bounds that the result must meet."""
