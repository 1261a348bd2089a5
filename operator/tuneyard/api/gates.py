"""The verdicts on gates, with their evidence: as the trainer finds them and the status keeps them.

The words for people are here too, since the trainer, the operator and the command line show them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from pydantic import Field

from tuneyard.api.evaluation import AlignmentMetric, Gate, Metric, fewest_items
from tuneyard.api.meta import Report

Verdict = Literal["pass", "breach", "insufficientEvidence", "missing"]
"""Whether a gate is met.

- pass: the bound holds. For notWorseThanBaseBy: all of the 95% interval is within the bound.
- breach: the bound does not hold. For notWorseThanBaseBy: all of the interval is beyond the bound.
- insufficientEvidence: fewer items than minItems, or the interval contains the bound of
  notWorseThanBaseBy.
- missing: the metric was not measured, or is not a number.
"""
WORST_FIRST: tuple[Verdict, ...] = ("missing", "breach", "insufficientEvidence", "pass")
VERDICT_WORDS: dict[Verdict, str] = {
    "pass": "pass",
    "breach": "breach",
    "insufficientEvidence": "insufficient evidence",
    "missing": "missing",
}


_MISSING = {
    "answerAccuracy": "Measure {metric}: answerAccuracy needs held-out rows with the field "
    "expected; a value that is not a number means that the model diverged.",
    "lengthControlledWinRate": "Measure {metric}: it needs judgments of at least 20 prompts, and "
    "completions of the tuned model that are longer than the other model's, and shorter ones.",
    "rewardLengthCorrelation": "Find out why all rewards, or all lengths, are equal: the model may "
    "have diverged.",
}
"""The remedies for metrics that were not measured, by the beginning of their names."""


_DISTANCES = (
    *("kl", "rewardLengthCorrelation", "lengthRatio", "distinctRatio", "repetition"),
    *("complete", "sycophancyShift"),
)
"""Metrics of an alignment that leave their bounds if the model goes too far from its start."""
_OF_ALIGNMENT = {*get_args(AlignmentMetric)} - {*get_args(Metric)}
"""The metrics that only an alignment has."""


class GateResult(Report):
    """The verdict on one gate, and its evidence."""

    metric: str = Field(max_length=128)
    """Name of the metric."""
    at_least: float | None = None
    """Lower bound of the gate. None: it has none."""
    at_most: float | None = None
    """Upper bound of the gate. None: it has none."""
    not_worse_than_base_by: float | None = None
    """Most by which the tuned model may be worse than the base model. None: no such bound."""
    tier: Literal["required", "advisory"] = "required"
    """advisory: the gate fails no job."""
    min_items: int | None = Field(default=None, ge=1, le=1 << 30)
    """Fewest items of the gate. None: it states none."""
    verdict: Verdict
    """Whether the gate is met."""
    value: float | None = None
    """Value of the tuned model. None: not measured."""
    base: float | None = None
    """Value of the base model, for notWorseThanBaseBy. None: not measured, or another bound."""
    worse_by: float | None = None
    """Mean difference by which the tuned model is worse than the base model; below 0: better.
    None: not measured, or another bound."""
    low: float | None = None
    """Lower end of the 95% interval of worseBy, or of value for another bound. None: unknown."""
    high: float | None = None
    """Upper end of that interval. None: unknown."""
    items: int | None = Field(default=None, ge=0, le=1 << 53)
    """Number of items, such as held-out rows, that were measured. None: unknown."""

    @classmethod
    def of(cls, gate: Gate, verdict: Verdict, **evidence: float | None) -> GateResult:
        """Return the result of a gate. `evidence`: value, base, worse_by, low, high, items."""
        return cls.model_validate({**dict(gate), "verdict": verdict, **evidence})

    @property
    def is_required(self) -> bool:
        """Whether the job fails unless the gate is met."""
        return self.tier == "required"

    @property
    def passed(self) -> bool:
        """Whether the gate is met."""
        return self.verdict == "pass"

    def is_of(self, gate: Gate) -> bool:
        """Return whether this is the verdict on a gate."""
        return all(getattr(self, name) == value for name, value in dict(gate).items())

    # ---- words ----------------------------------------------------------------------------------

    @property
    def bound(self) -> str:
        """The bound: "at least 0.3 and at most 1", "not worse than the base by more than 0.02"."""
        if self.not_worse_than_base_by is not None:
            return f"not worse than the base by more than {self.not_worse_than_base_by:g}"
        parts = [] if self.at_least is None else [f"at least {self.at_least:g}"]
        parts += [] if self.at_most is None else [f"at most {self.at_most:g}"]
        return " and ".join(parts)

    @property
    def measured(self) -> str:
        """The value: "0.35", "0.35, base 0.4"; "not measured"."""
        if self.value is None:
            return "not measured"
        base = "" if self.base is None else f", base {self.base:.4g}"
        return f"{self.value:.4g}{base}"

    @property
    def interval(self) -> str:
        """The 95% interval: "0.15 to 0.55", "worse by -0.1 to 0.2"; "": unknown."""
        if self.low is None or self.high is None:
            return ""
        worse = "" if self.worse_by is None else "worse by "
        return f"{worse}{self.low + 0.0:.4g} to {self.high + 0.0:.4g}"

    @property
    def evidence(self) -> str:
        """The interval and the items: "95% interval 0.15 to 0.55, 20 items"; "": unknown."""
        interval = f"95% interval {self.interval}" if self.interval else ""
        return ", ".join(filter(None, (interval, self._counted)))

    @property
    def sentence(self) -> str:
        """The verdict in words: "answerAccuracy is 0.35, below 0.5 (95% interval 0.15 to 0.55, 20
        items)"."""
        evidence = f" ({self.evidence})" if self.evidence else ""
        return f"{self.metric} {self._finding}{evidence}"

    @property
    def remedy(self) -> str:
        """The remedy as sentences; "": the gate is met."""
        if self.passed:
            return ""
        if self.verdict == "missing":
            return next(
                (text for name, text in _MISSING.items() if self.metric.startswith(name)),
                f"Find out why {self.metric} has no value: the model may have diverged.",
            ).format(metric=self.metric)
        on_suite = "/" in self.metric
        if self.verdict == "insufficientEvidence":
            more = "Give the suite more items" if on_suite else "Hold out more rows"
            return f"{more}, or widen the bound of the gate."
        if on_suite:
            return (
                "Change the data or the training (data.train, data.replay, training.learningRate), "
                "or change evaluate.gates."
            )
        if self.metric in _DISTANCES:
            return (
                "Keep the model closer to its start (a higher beta, a lower "
                "training.learningRate, fewer training.epochs), or change evaluate.gates."
            )
        data = "preferences.data" if self.metric in _OF_ALIGNMENT else "data.train"
        return f"Train longer or on more data (training.epochs, {data}), or change evaluate.gates."

    @property
    def _finding(self) -> str:
        if self.value is None:
            return "was not measured or is not a number"
        if self.items is not None and self.items < self._fewest_items:
            return f"is {self.measured}, on fewer than {self._fewest_items} items"
        if self.not_worse_than_base_by is not None:
            return self._difference
        if self.at_least is not None and self.value < self.at_least:
            return f"is {self.measured}, below {self.at_least:g}"
        if self.at_most is not None and self.value > self.at_most:
            return f"is {self.measured}, above {self.at_most:g}"
        if self.verdict == "insufficientEvidence":
            return f"is {self.measured}, on an unknown number of items"
        return ", ".join(filter(None, (f"is {self.measured}", self.bound)))

    @property
    def _difference(self) -> str:
        by = f"{self.not_worse_than_base_by:g}"
        if self.worse_by is None:
            return f"is {self.measured}, and its items were not compared with the base's"
        said = {
            "pass": f"not worse than the base by more than {by}",
            "breach": f"worse than the base by more than {by}",
        }
        unclear = f"and whether it is worse than the base by more than {by} is not clear"
        return f"is {self.measured}, {said.get(self.verdict, unclear)}"

    @property
    def _fewest_items(self) -> int:
        return fewest_items(self.min_items, self.not_worse_than_base_by)

    @property
    def _counted(self) -> str:
        if self.items is None:
            return ""
        return f"{self.items:,} item{'' if self.items == 1 else 's'}"


def overall(gates: Iterable[GateResult]) -> Verdict | None:
    """Return the worst verdict on the required gates. None: there are none."""
    verdicts = {gate.verdict for gate in gates if gate.is_required}
    return next((verdict for verdict in WORST_FIRST if verdict in verdicts), None)
