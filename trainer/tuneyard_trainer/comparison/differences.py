"""The difference between two jobs in one metric, with its 95% interval. Pure.

Shapes: N items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.comparison import Basis
from tuneyard_trainer.evaluation.evidence import Interval
from tuneyard_trainer.evaluation.items import Items

WEIGHT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Values:
    """The values of one metric of a job for each item."""

    keys: tuple[str, ...] | None
    """Equal keys are equal items, in any job. None: the content of the items is not known."""
    values_N: NDArray[np.float64]
    weights_N: NDArray[np.float64] | None = None
    """Weights of the mean. None: all items weigh the same."""


@dataclass(frozen=True)
class Measured:
    """One metric of a job."""

    value: float
    interval: Interval | None = None
    """95% interval of the value. None: unknown."""
    values: Values | None = None
    """None: there are no values for each item."""


class Found(NamedTuple):
    """A difference: second - first."""

    basis: Basis
    value: float | None
    interval: Interval | None
    items: int | None


def difference(first: Measured, second: Measured) -> Found:
    """Return the difference between two jobs: of the same items if both have values for them."""
    a, b = first.values, second.values
    if a is None or b is None or a.keys is None or b.keys is None:
        return _unpaired("unpaired", first, second)
    place = {key: number for number, key in enumerate(b.keys)}
    shared = [(i, place[key]) for i, key in enumerate(a.keys) if key in place]
    if not shared:
        return _unpaired("otherRows", first, second)
    own, other = (np.array(column) for column in zip(*shared, strict=True))
    if not _same_weights(a, own, b, other):
        return Found("otherUnit", None, None, None)
    paired = Items(
        tuple(a.keys[i] for i in own),
        b.values_N[other],
        a.values_N[own],
        higher_is_better=True,
        weights_N=None if a.weights_N is None else a.weights_N[own],
    )
    if not paired.is_usable or paired.base_N is None:
        return _unpaired("unpaired", first, second)
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        value = paired.mean(paired.tuned_N - paired.base_N)
        interval = paired.difference_interval
    if interval is None or not all(map(math.isfinite, (value, *interval))):
        return _unpaired("unpaired", first, second)
    return Found("paired", value, interval, len(paired))


def _same_weights(a: Values, own: NDArray[np.int64], b: Values, other: NDArray[np.int64]) -> bool:
    if a.weights_N is None or b.weights_N is None:
        return a.weights_N is None and b.weights_N is None
    return bool(np.allclose(a.weights_N[own], b.weights_N[other], rtol=WEIGHT_TOLERANCE, atol=0))


def _unpaired(basis: Basis, first: Measured, second: Measured) -> Found:
    value = second.value - first.value
    if not math.isfinite(value):
        return Found(basis, None, None, None)
    if first.interval is None or second.interval is None:
        return Found(basis, value, None, None)
    return Found(basis, value, unpaired_interval(first, second), None)


def unpaired_interval(first: Measured, second: Measured) -> Interval | None:
    """Return the 95% interval of the difference of two independent values from an interval of each
    (MOVER: Zou and Donner 2008, Statistics in Medicine 27(10); of shares with Wilson's intervals
    it is Newcombe's hybrid score interval, 1998). None: an interval is unknown, or the ends are too
    large for a float.

    For values of the same items it is too wide as a rule: it does not know that easy items are
    easy for both.
    """
    a, b = first.interval, second.interval
    if a is None or b is None:
        return None
    value = second.value - first.value
    low = value - math.hypot(second.value - b.low, a.high - first.value)
    high = value + math.hypot(b.high - second.value, first.value - a.low)
    return Interval(low, high) if math.isfinite(high - low) else None
