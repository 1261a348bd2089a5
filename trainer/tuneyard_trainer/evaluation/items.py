"""The values of a metric for each item, which gates compare in pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Items:
    """The values of one metric, which is their mean, for each item: a row, a prompt or a pair.
    Shape N: items."""

    ids: tuple[str, ...]
    tuned_N: NDArray[np.float64]
    """Of the tuned model."""
    base_N: NDArray[np.float64] | None
    """Of the model before. None: it was not measured, or the values compare both models."""
    higher_is_better: bool
    weights_N: NDArray[np.float64] | None = None
    """Weights of the mean, such as the tokens of rows. None: all items weigh the same."""
