"""Statistics of evidence: intervals of means over items, and the test of flipped answers. Pure.

Shapes: N items, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""1.96."""
RESAMPLES = 4000
"""The ends of an interval then have a standard deviation of 1 % of its width between seeds."""
SEED = 20231
CHUNK = 1 << 22
"""Drawn items that are in memory at a time, 32 MiB of indices."""


class Interval(NamedTuple):
    """A 95% interval."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Return whether a value is in the interval, its ends included."""
        return self.low <= value <= self.high


class Estimate(NamedTuple):
    """The evidence for a metric that is no mean over items."""

    interval: Interval
    """The 95% interval of the tuned model's value."""
    items: int
    """The number of items that were measured."""

    def summary(self, value: float) -> dict[str, Any]:
        """Return what the items show, as JSON. `value`: of the metric."""
        return {"items": self.items, "value": value, "interval": self.interval}


def mean_interval(values_N: NDArray[np.float64]) -> Interval:
    """Return the 95% interval of the mean of the values. Raises ValueError without values."""
    return ratio_interval(values_N, np.ones(len(values_N)))


def ratio_interval(
    numerators_N: NDArray[np.float64], denominators_N: NDArray[np.float64]
) -> Interval:
    """Return the 95% interval of sum(numerators) / sum(denominators) over items, such as nats and
    tokens of rows.

    An expanded percentile bootstrap over items (Hesterberg 2015, "What Teachers Should Know About
    the Bootstrap", The American Statistician 69(4)): the plain percentile interval is too narrow
    for few items, and its levels are therefore widened to those of Student's t. Of 50 to 200 items
    it covers the true mean in 93 % to 96 % of simulations. BCa (Efron 1987) is less than a percent
    better for skewed values.

    Deterministic. Items that are all equal give an interval without width, whatever their number:
    `share_interval` and `flip_interval` are for right and wrong answers. Raises
    ValueError without items.
    """
    return bootstrap_interval(
        len(numerators_N),
        lambda drawn_BN: numerators_N[drawn_BN].sum(1) / denominators_N[drawn_BN].sum(1),
    )


def bootstrap_interval(
    count: int, statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]]
) -> Interval:
    """Return the 95% interval of a statistic of `count` items, as `ratio_interval` does.

    `statistic`: returns the value (B,) of each resample, of which it gets the items' indices
    (B, N). Raises ValueError without items.
    """
    if not count:
        raise ValueError("an interval needs at least one item")
    generator = np.random.default_rng(SEED)
    per_chunk = max(1, CHUNK // count)
    values = [
        statistic(generator.integers(count, size=(min(per_chunk, RESAMPLES - start), count)))
        for start in range(0, RESAMPLES, per_chunk)
    ]
    tail = _tail(count)
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return Interval(float(low), float(high))


def correlation_interval(correlation: float, count: int) -> Interval | None:
    """Return the 95% interval of Pearson's correlation of `count` pairs of values (Fisher 1921: it
    is symmetric in the inverse hyperbolic tangent). It has no width if all pairs are on a line.
    None: fewer than 4 pairs."""
    if count < 4:
        return None
    if abs(correlation) >= 1:
        return Interval(math.copysign(1, correlation), math.copysign(1, correlation))
    center, half = math.atanh(correlation), QUANTILE / math.sqrt(count - 3)
    return Interval(math.tanh(center - half), math.tanh(center + half))


def share_interval(right: int, count: int) -> Interval:
    """Return the 95% interval of a share, such as that of right answers (Wilson 1927). It has a
    width also if all answers are right. Raises ValueError without items."""
    if not count:
        raise ValueError("an interval needs at least one item")
    share, square = right / count, QUANTILE**2
    center = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half = QUANTILE * spread / (1 + square / count)
    low, high = max(0.0, center - half), min(1.0, center + half)
    # The end of a share of none or of all is exact; the arithmetic gives 2.8e-17 for some.
    return Interval(low if right else 0.0, high if right < count else 1.0)


def flip_interval(gained: int, lost: int, count: int) -> Interval:
    """Return the 95% interval of the difference of two shares on the same items, of which `gained`
    and `lost` flipped (Bonett and Price 2012, J. Educ. Behav. Stat. 37(4): Wald's interval after
    adding one flipped item of each direction).

    It has a width also if no answer flipped, unlike a bootstrap. In simulations of 50 to 200 items
    it covers the true difference in 94 % to 97 %, and more if answers hardly ever flip. Raises
    ValueError without items.
    """
    if not count:
        raise ValueError("an interval needs at least one item")
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = QUANTILE * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return Interval(max(-1.0, up - down - half), min(1.0, up - down + half))


def _tail(count: int) -> float:
    """Return the share of resamples below the interval: that of the normal distribution beyond
    sqrt(N / (N - 1)) times the quantile of Student's t."""
    freedom = count - 1
    if not freedom:
        return 0.0
    return NormalDist().cdf(-math.sqrt(count / freedom) * student_quantile(freedom))


def student_quantile(freedom: int) -> float:
    """Return the upper 97.5% quantile of Student's t distribution: its expansion by the quantile of
    the normal distribution (Abramowitz and Stegun 1964, 26.7.5). The error is below 0.01 from 4
    degrees of freedom, and below 0.0003 from 9."""
    z = QUANTILE
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar 1947): the probability of a
    split at least as uneven as this one, if a flipped item is equally often gained and lost.

    `gained`: items that only the tuned model has right; `lost`: only the base model. 1: none.
    """
    flipped, fewer = gained + lost, min(gained, lost)
    ways = tail = 1  # of no flip in the rarer direction
    for k in range(fewer):
        ways = ways * (flipped - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**flipped)
