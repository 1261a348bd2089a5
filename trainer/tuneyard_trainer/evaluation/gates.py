"""Gates: the bounds that a result must meet before it is exported.

A bound on the value itself is checked against the value, and the interval is shown beside it. A
bound on the difference from the base model is a test of non-inferiority: the gate is met if the
whole 95% interval of the difference is within the bound, and missed if the whole interval is beyond
it. Else there is too little evidence, which does not meet the gate either: a model counts as good
only if that was shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tuneyard.api.evaluation import Gate, prefixed
from tuneyard.api.gates import VERDICT_WORDS, GateResult, Verdict
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation.evidence import Estimate, Interval
from tuneyard_trainer.evaluation.items import Items

GAINS = {
    "answerAccuracyGain": "answerAccuracy",
    "rewardGain": "reward",
    "independentRewardGain": "independentReward",
}
"""Metrics that are the mean difference of another one between the models."""


def judge_gates(
    gates: Sequence[Gate],
    metrics: Mapping[str, float],
    items: Mapping[str, Items],
    estimates: Mapping[str, Estimate] | None = None,
) -> list[GateResult]:
    """Return the verdict on each gate. `items`: by metric; those of some metrics are unknown.
    `estimates`: the evidence for other metrics."""
    return [_judged(gate, metrics, items, (estimates or {}).get(gate.metric)) for gate in gates]


def check_gates(results: Sequence[GateResult], kept: str) -> None:
    """Raise StageError GateFailed, with the finding on every gate, unless all required gates are
    met. `kept`: a clause on where the model stays."""
    missed = [result for result in results if result.is_required and not result.passed]
    if not missed:
        return
    required = [result for result in results if result.is_required]
    others = [result for result in results if result not in missed]
    findings = [f"{result.sentence}: {_label(result)}" for result in [*missed, *others]]
    raise StageError(
        "GateFailed",
        f"{len(missed)} of {len(required)} required gates {'is' if len(missed) == 1 else 'are'} "
        f"not met, and nothing is exported; {kept}. {'; '.join(findings)}.",
        advice=" ".join(dict.fromkeys(result.remedy for result in missed)),
    )


def _label(result: GateResult) -> str:
    words = VERDICT_WORDS[result.verdict]
    return words if result.is_required else f"{words} (advisory)"


def _judged(
    gate: Gate,
    metrics: Mapping[str, float],
    items: Mapping[str, Items],
    estimate: Estimate | None,
) -> GateResult:
    value = metrics.get(gate.metric, math.nan)
    if not math.isfinite(value):
        return GateResult.of(gate, "missing", items=_count(gate.metric, items))
    if gate.not_worse_than_base_by is not None:
        return _judged_difference(gate, value, gate.not_worse_than_base_by, items.get(gate.metric))
    interval, count = estimate or (_value_interval(gate.metric, items), _count(gate.metric, items))
    low, high = interval or (None, None)
    return GateResult.of(
        gate, _bounded(gate, value, count), value=value, low=low, high=high, items=count
    )


def _bounded(gate: Gate, value: float, count: int | None) -> Verdict:
    """Return the verdict on a bound of the value itself. `count` None: the items are unknown."""
    if gate.fewest_items > (count or 0):
        return "insufficientEvidence"
    below = gate.at_least is not None and value < gate.at_least
    above = gate.at_most is not None and value > gate.at_most
    return "breach" if below or above else "pass"


def _judged_difference(gate: Gate, value: float, margin: float, items: Items | None) -> GateResult:
    """Return the verdict on a bound of how much the tuned model may be worse than the base."""
    interval = None if items is None else items.difference_interval
    if items is None or items.base_N is None or interval is None:
        count = None if items is None else len(items)
        return GateResult.of(gate, "insufficientEvidence", value=value, items=count)
    worse = Interval(-interval.high, -interval.low) if items.higher_is_better else interval
    verdict: Verdict = "insufficientEvidence"
    if len(items) >= gate.fewest_items:
        verdict = "pass" if worse.high <= margin else "breach" if worse.low > margin else verdict
    difference = items.mean(items.tuned_N - items.base_N)
    return GateResult.of(
        gate,
        verdict,
        value=value,
        base=items.mean(items.base_N),
        worse_by=-difference if items.higher_is_better else difference,
        low=worse.low,
        high=worse.high,
        items=len(items),
    )


def _count(metric: str, items: Mapping[str, Items]) -> int | None:
    """Return the items that a metric is measured on. None: unknown."""
    found = items.get(_items_metric(metric, items))
    return None if found is None else len(found)


def _items_metric(metric: str, items: Mapping[str, Items]) -> str:
    """Return the metric whose items a metric is computed from."""
    of_loss = dict.fromkeys(("validationPerplexity", "lossReduction"), "validationLoss")
    of_suites = {**_changes(items), **_bases(items)}
    return {**of_loss, **GAINS, **of_suites}.get(metric, metric)


def _changes(items: Mapping[str, Items]) -> dict[str, str]:
    """Return the metrics of suites that are a difference, SUITE/METRICChange, with their own
    metric."""
    return {f"{metric}Change": metric for metric in items if "/" in metric}


def _bases(items: Mapping[str, Items]) -> dict[str, str]:
    """Return the metrics of suites on the model before, SUITE/baseMETRIC, with their own metric."""
    return {prefixed("base", metric): metric for metric in items if "/" in metric}


def _value_interval(metric: str, items: Mapping[str, Items]) -> Interval | None:
    """Return the 95% interval of a metric's value. None: unknown."""
    found = items.get(_items_metric(metric, items))
    if found is None:
        return None
    if metric == "lossReduction":
        return found.reduction_interval
    if metric in GAINS or metric in _changes(items):
        return found.difference_interval
    if metric in _bases(items):
        return found.base_interval
    interval = found.value_interval
    if metric == "validationPerplexity" and interval is not None:
        return Interval(*(math.exp(min(end, 700.0)) for end in interval))
    return interval
