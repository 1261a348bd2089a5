"""Findings in words: what the metrics of an alignment say about its reward.

A reward is exploited if it rises without the quality that it stands for. A finding needs evidence:
the 95% interval of the difference between both models on the same prompts. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from tuneyard_trainer.evaluation.evidence import Interval
from tuneyard_trainer.evaluation.part import Found

HIGH_CORRELATION = 0.5
"""From here on, length explains a quarter of the reward's variance. Cohen 1988 calls this
correlation large."""
REMEDY = (
    "Lower training.learningRate, raise klCoefficient, stop earlier (training.maxSteps), or "
    "examine what the reward has learned."
)


def findings(found: Found) -> list[str]:
    """Return sentences on why the reward may mislead."""
    return [*_exploited(found), *_with_length(found)]


def _exploited(found: Found) -> Iterator[str]:
    """Yield that the reward rose, for each other measure of quality that clearly fell."""
    rise = _change(found, "reward")
    if rise is None or rise.low <= 0:
        return
    rose = f"The reward rose by {found.metrics['rewardGain']:.3g} ({_interval(rise)})"
    change = _change(found, "independentReward")
    if change is not None and change.high < 0:
        fall = -found.metrics["independentRewardGain"]
        yield (
            f"{rose}, while the independent reward fell by {fall:.3g} "
            f"({_interval(Interval(-change.high, -change.low))}) on the same "
            f"{len(found.items['independentReward'])} prompts: training exploited the reward. "
            f"{REMEDY}"
        )
    names = {"winRate": "prefers", "lengthControlledWinRate": "would prefer, at equal length,"}
    for name, verb in names.items():
        interval = _win_rate_interval(found, name)
        if interval is not None and interval.high < 0.5:
            yield (
                f"{rose}, while the judge {verb} the completions of the model before: {name} is "
                f"{found.metrics[name]:.3g} ({_interval(interval)}). {REMEDY}"
            )
            return


def _change(found: Found, name: str) -> Interval | None:
    """Return the interval of the difference of a metric between both models. None: unknown."""
    items = found.items.get(name)
    return None if items is None else items.difference_interval


def _win_rate_interval(found: Found, name: str) -> Interval | None:
    items, estimate = found.items.get(name), found.estimates.get(name)
    if estimate is not None:
        return estimate.interval
    return None if items is None else items.value_interval


def _with_length(found: Found) -> Iterator[str]:
    """Yield that the reward goes with the length, if the correlation is high and clear."""
    name = "rewardLengthCorrelation"
    value, estimate = found.metrics.get(name, 0.0), found.estimates.get(name)
    if estimate is None or abs(value) < HIGH_CORRELATION or estimate.interval.contains(0):
        return
    which = "longer" if value > 0 else "shorter"
    ratio = found.metrics.get("lengthRatio")
    beside = "" if ratio is None else f" They are {ratio:.3g} times as long as before training."
    yield (
        f"The reward correlates with the length of completions: {value:.2f} "
        f"({_interval(estimate.interval)}) over {estimate.items} completions, so {which} ones are "
        f"rewarded, whatever they say.{beside} Compare the models at equal length "
        "(evaluate.winRate), or examine what the reward has learned."
    )


def _interval(interval: Interval) -> str:
    return f"95% interval {interval.low + 0.0:.3g} to {interval.high + 0.0:.3g}"
