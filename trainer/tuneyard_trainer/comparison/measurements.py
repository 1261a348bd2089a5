"""The measurements in an `evaluation.json`: intervals, numbers of items, and values by item.

The file may be of another version, or damaged: what is not of the expected form is not known.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.comparison.differences import Values
from tuneyard_trainer.comparison.item_keys import AskedItems
from tuneyard_trainer.evaluation.evidence import Interval


@dataclass(frozen=True)
class Measurements:
    """The measurements of one evaluation."""

    evidence: Mapping[str, Any]
    """The interval and the number of items of each metric."""
    items: Mapping[str, Any]
    """The items of each metric with their values."""
    asked: AskedItems

    @classmethod
    def of(cls, evaluation: Mapping[str, Any], asked: AskedItems) -> Measurements:
        """Return the measurements in the contents of the file; {}: there is none."""
        return cls(_mapping(evaluation.get("evidence")), _mapping(evaluation.get("items")), asked)

    def interval(self, metric: str) -> Interval | None:
        """Return the 95% interval of a metric. None: unknown."""
        return interval_of(_mapping(self.evidence.get(metric)).get("interval"))

    def num_items(self, metric: str) -> int | None:
        """Return the items that a metric is the mean of. None: unknown."""
        found = _mapping(self.evidence.get(metric)).get("items")
        return found if isinstance(found, int) else None

    def values(self, metric: str) -> Values | None:
        """Return the value of a metric for each item. None: unknown."""
        found = _mapping(self.items.get(metric))
        ids, weights = found.get("ids"), found.get("weight")
        if not isinstance(ids, list) or not ids:
            return None
        values_N = _numbers(found.get("tuned"), len(ids))
        weights_N = None if weights is None else _numbers(weights, len(ids))
        if values_N is None or (weights is not None and not _are_weights(weights_N)):
            return None
        return Values(self.asked.keys(metric, [str(name) for name in ids]), values_N, weights_N)


def interval_of(value: Any) -> Interval | None:
    """Return an interval. None: these are not two finite numbers in their order."""
    ends = value if isinstance(value, list | tuple) else ()
    if len(ends) != 2 or not all(map(_is_finite, ends)) or ends[0] > ends[1]:
        return None
    return Interval(float(ends[0]), float(ends[1]))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(values: Any, count: int) -> NDArray[np.float64] | None:
    """Return numbers, with NaN for null. None: there are not `count` numbers."""
    if not isinstance(values, list) or len(values) != count:
        return None
    if not all(value is None or _is_finite(value) for value in values):
        return None
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _is_finite(value: Any) -> bool:
    """Return whether this is a number that a float can have: JSON also has larger integers."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _are_weights(weights_N: NDArray[np.float64] | None) -> bool:
    return weights_N is not None and bool(np.isfinite(weights_N).all() and (weights_N > 0).all())
