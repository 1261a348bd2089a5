"""The comparisons of the models as numbers with intervals: the source of every table of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tuneyard.api.evaluation import prefixed
from tuneyard.api.plan import StageRecord
from tuneyard.api.report import Comparison, Interval, Scope, Verdict
from tuneyard.api.stage_settings import SUPERVISED_KINDS
from tuneyard_trainer.reporting.labels import (
    ALIGNMENT_METRICS,
    ANSWER_METRICS,
    LOSS_METRICS,
    POINTS,
    REWARD_HACKING_SIGNS,
    REWARDS,
)

Z = 1.959964
"""The normal quantile of a 95% interval."""
CHANCE = 0.5
"""What a random choice gets of a share in an alignment."""
_OF_CHANCE = frozenset(ALIGNMENT_METRICS.values()) - {*REWARDS}
_SHARES = frozenset(("answerAccuracy", *ANSWER_METRICS, *_OF_CHANCE)) - {*POINTS}
_ALONE = "WithoutContext"


def finite(value: float | None) -> float | None:
    """Return a number, or None for one that is missing or not finite: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def compared(training: StageRecord | None, evaluation: StageRecord | None) -> list[Comparison]:
    """Return the comparisons of a job. `training`: the record of the stage that trained the result.
    `evaluation`: that of its evaluation. None: there is none."""
    per_token = evaluation is not None or training is None or training.kind in SUPERVISED_KINDS
    evidence = evaluation.details.get("evidence", {}) if evaluation else {}
    return comparisons(measured(training, evaluation), evidence, per_token=per_token)


def measured(training: StageRecord | None, evaluation: StageRecord | None) -> dict[str, float]:
    """Return the metrics of the evaluation. Losses of held-out rows that it does not have come from
    the training, unless it has no held-out rows: the loss of a training on preferences is another.
    """
    found = dict(evaluation.metrics) if evaluation else {}
    if evaluation is not None and "validationLoss" not in found:
        return found
    losses: dict[str, float] = {}
    for name in ("validation", "baseValidation"):
        known = training.metrics if training else {}
        loss = found.get(f"{name}Loss", known.get(f"{name}Loss"))
        if loss is not None:
            losses |= {f"{name}Loss": loss, f"{name}Perplexity": math.exp(min(loss, 700.0))}
    return {**losses, **found}


def comparisons(
    metrics: Mapping[str, float], evidence: Mapping[str, Any], *, per_token: bool
) -> list[Comparison]:
    """Return a comparison of each metric that was measured, in the order of the report.

    `metrics` and `evidence`: of the evaluation. `per_token`: whether the held-out loss is in nats
    per token.
    """
    found = _Found(metrics, evidence)
    return [*found.held_out(per_token), *found.alignment(), *found.suites()]


class _Found:
    def __init__(self, metrics: Mapping[str, float], evidence: Mapping[str, Any]) -> None:
        self._metrics, self._evidence = metrics, evidence

    def held_out(self, per_token: bool) -> Iterator[Comparison]:
        labels = dict(LOSS_METRICS)
        if not per_token:
            labels = {"validationLoss": "Held-out loss"}
        for name, label in labels.items():
            yield from self._compared(name, label, "heldOut", False)
        for name, label in {"answerAccuracy": "Answers right", **ANSWER_METRICS}.items():
            yield from self._compared(name, label, "heldOut", True)
        alone = " without context"
        yield from self._compared(
            f"validationLoss{_ALONE}", f"Held-out loss{alone}", "heldOut", False
        )
        yield from self._compared(
            f"answerAccuracy{_ALONE}", f"Answers right{alone}", "heldOut", True
        )

    def alignment(self) -> Iterator[Comparison]:
        for label, name in ALIGNMENT_METRICS.items():
            yield from self._compared(name, label, "alignment", True)
        for label, name in REWARD_HACKING_SIGNS.items():
            yield from self._compared(name, label, "alignment", None)

    def suites(self) -> Iterator[Comparison]:
        for metric in self._metrics:
            suite, _, name = metric.rpartition("/")
            if suite and not name.startswith("base") and not name.endswith("Change"):
                higher = self._evidence.get(metric, {}).get("higherIsBetter")
                yield from self._compared(metric, f"{suite}: {name}", "suite", higher)

    def _compared(
        self, metric: str, label: str, scope: Scope, higher: bool | None
    ) -> Iterator[Comparison]:
        """Yield the comparison of a metric, if it was measured."""
        if metric not in self._metrics:
            return
        tuned, shown = finite(self._metrics[metric]), self._evidence.get(metric, {})
        by_chance = metric in _OF_CHANCE
        base = CHANCE if by_chance else self._before(metric)
        interval = _interval(shown.get("interval"))
        between = _interval(shown.get("differenceInterval"))
        if by_chance and interval is not None:
            between = interval[0] - CHANCE, interval[1] - CHANCE
        difference = None if base is None or tuned is None else tuned - base
        verdict, clear = _judged(difference, between, higher)
        if metric == "validationPerplexity":  # a function of the loss, whose rows have evidence
            _, clear = _judged(
                difference, self._evidence.get("validationLoss", {}).get("differenceInterval"), None
            )
            verdict = "unclear" if clear is False and difference else verdict
        flips = shown.get("flips", {})
        yield Comparison(
            metric=metric,
            label=label,
            scope=scope,
            suite=metric.rpartition("/")[0] or None,
            is_share=metric.removesuffix(_ALONE) in _SHARES or _is_share(metric, interval, flips),
            higher_is_better=higher,
            items=shown.get("items", self._questions(metric)),
            base=base,
            base_interval=_interval(shown.get("baseInterval")),
            base_is_chance=by_chance,
            tuned=tuned,
            tuned_interval=interval,
            difference=difference,
            difference_interval=between,
            clear=clear,
            verdict=verdict,
            gained=flips.get("gained"),
            lost=flips.get("lost"),
            **self._few_shot(metric),
        )

    def _questions(self, metric: str) -> int | None:
        """Return the number of questions, of a share of right answers without evidence."""
        name, alone, _ = metric.partition(_ALONE)
        asked = self._metrics.get(f"questions{alone}") if name == "answerAccuracy" else None
        return None if asked is None else round(asked)

    def _before(self, metric: str) -> float | None:
        names = prefixed("base", metric), prefixed("start", metric)
        return next((finite(self._metrics[n]) for n in names if n in self._metrics), None)

    def _few_shot(self, metric: str) -> dict[str, Any]:
        """Return the fields about the base model with worked examples; {}: not measured."""
        name = prefixed("baseFewShot", metric)
        if name not in self._metrics:
            return {}
        gain = finite(self._metrics.get(f"{metric}FewShotGain"))
        error = finite(self._metrics.get(f"{metric}FewShotGainError"))
        between = None
        if gain is not None and error is not None:
            between = gain - Z * error, gain + Z * error
        return {
            "few_shot": finite(self._metrics[name]),
            "few_shot_interval": _interval(self._evidence.get(name, {}).get("interval")),
            "few_shot_difference": gain,
            "few_shot_difference_interval": between,
        }


def _is_share(metric: str, interval: Interval | None, flips: Mapping[str, Any]) -> bool:
    """Return whether a suite's metric is a share: its items are right or wrong, or it is named so.

    The harness has metrics of any unit, such as perplexities."""
    name = metric.rpartition("/")[2]
    is_named = name.lower().startswith(("acc", "overrefusal", "unsafe", "probability", "exact"))
    return "/" in metric and (bool(flips) or (is_named and _within_one(interval)))


def _within_one(interval: Interval | None) -> bool:
    return interval is None or (interval[0] >= 0 and interval[1] <= 1)


def _interval(value: Any) -> Interval | None:
    if value is None or finite(value[0]) is None or finite(value[1]) is None:
        return None
    return float(value[0]), float(value[1])


def _judged(
    difference: float | None, interval: Interval | None, higher: bool | None
) -> tuple[Verdict, bool | None]:
    """Return the verdict on a difference, and whether it is clear; None: no interval is known."""
    clear = None if interval is None else not interval[0] <= 0 <= interval[1]
    if difference is None or higher is None:
        return "none", clear
    if difference == 0:
        return "equal", clear
    if clear is False:
        return "unclear", clear
    return ("better" if (difference > 0) == higher else "worse"), clear
