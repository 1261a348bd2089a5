"""The values of one metric for each item (a held-out row or completion), and what they show.

Shapes: N items.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.evaluation.evidence import (
    Interval,
    flip_interval,
    mcnemar,
    ratio_interval,
    share_interval,
)

MAX_ITEMS = 10_000
"""The items whose values `evaluation.json` holds."""
MAX_FLIPPED = 20
"""The flipped items of each direction that are named."""


@dataclass(frozen=True)
class Items:
    """The values of one metric, which is their mean, for each item."""

    ids: tuple[str, ...]
    """Names of the items for people, such as `row 12`."""
    tuned_N: NDArray[np.float64]
    """Values of the tuned model."""
    base_N: NDArray[np.float64] | None
    """Values of the base model. None: it was not measured."""
    higher_is_better: bool
    weights_N: NDArray[np.float64] | None = None
    """Weights of the mean, such as the tokens of rows. None: all items weigh the same."""

    def __post_init__(self) -> None:
        """Raise ValueError for values of another number than the items."""
        for values_N in (self.tuned_N, self.base_N, self.weights_N):
            if values_N is not None and values_N.shape != (len(self.ids),):
                raise ValueError(f"{len(self.ids)} items with values of shape {values_N.shape}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_usable(self) -> bool:
        """Whether there are items, and all values are finite."""
        found = [values for values in (self.tuned_N, self.base_N) if values is not None]
        return bool(self.ids) and all(bool(np.isfinite(values).all()) for values in found)

    @cached_property
    def value_interval(self) -> Interval | None:
        """The 95% interval of the tuned model's mean. None: the items are not usable."""
        if not self.is_usable:
            return None
        return self._mean_interval(self.tuned_N)

    @cached_property
    def base_interval(self) -> Interval | None:
        """The 95% interval of the base model's mean. None: it was not measured, or the items are
        not usable."""
        if self.base_N is None or not self.is_usable:
            return None
        return self._mean_interval(self.base_N)

    @cached_property
    def difference_interval(self) -> Interval | None:
        """The 95% interval of the mean of tuned - base. None: it is not known."""
        if self.base_N is None or not self.is_usable:
            return None
        flipped = self.flipped()
        if self.weights_N is None and flipped is not None:
            return flip_interval(len(flipped[0]), len(flipped[1]), len(self))
        return self._interval(self.tuned_N - self.base_N)

    @cached_property
    def reduction_interval(self) -> Interval | None:
        """The 95% interval of 1 - (mean of tuned) / (mean of base). None: it is not known, such as
        where the base has so few values above 0 that a resample may have none."""
        if self.base_N is None or not self.is_usable:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            found = ratio_interval(
                (self.base_N - self.tuned_N) * self._weights, self.base_N * self._weights
            )
        return found if np.isfinite(found).all() else None

    def mean(self, values_N: NDArray[np.float64]) -> float:
        """Return the mean over the items, of which there must be some."""
        return float(np.average(values_N, weights=self.weights_N))

    def flipped(self) -> tuple[list[str], list[str]] | None:
        """Return the items that only the tuned model has right, and those that only the base model
        has right. None: the values are not right (1) or wrong (0), or the base has none."""
        if self.base_N is None:
            return None
        if not _is_right_or_wrong(self.tuned_N) or not _is_right_or_wrong(self.base_N):
            return None
        gained, lost = self.tuned_N > self.base_N, self.tuned_N < self.base_N
        names = np.array(self.ids, dtype=object)
        return list(names[gained]), list(names[lost])

    # ---- as JSON --------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Return what the items show, as JSON: means, intervals and flipped items."""
        found: dict[str, Any] = {"items": len(self), "higherIsBetter": self.higher_is_better}
        if not self.is_usable:
            return found
        found |= {"value": self.mean(self.tuned_N), "interval": self.value_interval}
        if self.base_N is not None:
            found |= {
                "base": self.mean(self.base_N),
                "baseInterval": self.base_interval,
                "difference": self.mean(self.tuned_N - self.base_N),
                "differenceInterval": self.difference_interval,
            }
        if flipped := self.flipped():
            gained, lost = flipped
            found["flips"] = {
                "gained": len(gained),
                "lost": len(lost),
                "pValue": mcnemar(len(gained), len(lost)),
                "gainedItems": gained[:MAX_FLIPPED],
                "lostItems": lost[:MAX_FLIPPED],
            }
        return found

    def values(self) -> dict[str, Any]:
        """Return the first MAX_ITEMS items with their values, as JSON: None is not finite."""
        columns = {"tuned": self.tuned_N, "base": self.base_N, "weight": self.weights_N}
        shown = {
            name: [value if np.isfinite(value) else None for value in values[:MAX_ITEMS].tolist()]
            for name, values in columns.items()
            if values is not None
        }
        return {"ids": list(self.ids[:MAX_ITEMS]), **shown}

    def _mean_interval(self, values_N: NDArray[np.float64]) -> Interval:
        if self.weights_N is None and _is_right_or_wrong(values_N):
            return share_interval(int(values_N.sum()), len(self))
        return self._interval(values_N)

    def _interval(self, values_N: NDArray[np.float64]) -> Interval:
        return ratio_interval(values_N * self._weights, self._weights)

    @property
    def _weights(self) -> NDArray[np.float64]:
        return np.ones(len(self)) if self.weights_N is None else self.weights_N


def _is_right_or_wrong(values_N: NDArray[np.float64]) -> bool:
    return bool(np.isin(values_N, (0.0, 1.0)).all())
