"""The agreement of scores with preferences: accuracy, margin, calibration.

Shapes: R rows (one completion each), P pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.preference.dataset import Comparisons

Z = 1.959964
"""The normal quantile of a 95% interval."""
BINS = 10
"""Bins of the calibration error."""


class Pairs(NamedTuple):
    """Every pair of every group; ties are excluded, since any order agrees with a tie."""

    better: NDArray[np.int64]
    """(P,) rows."""
    worse: NDArray[np.int64]
    """(P,) rows."""


def pairs_of(comparisons: Comparisons) -> Pairs:
    """Return the pairs of all groups."""
    better: list[int] = []
    worse: list[int] = []
    for group, size in enumerate(comparisons.sizes):
        if comparisons.labels[group] <= 0.5:
            continue
        start = int(comparisons.groups[group])
        for i in range(int(size)):
            for j in range(i + 1, int(size)):
                better.append(start + i)
                worse.append(start + j)
    return Pairs(np.array(better, dtype=np.int64), np.array(worse, dtype=np.int64))


def accuracy(margins_P: NDArray[np.float64]) -> float:
    """Return the share of pairs in the right order. Equal scores count as half."""
    return float(np.mean((margins_P > 0) + 0.5 * (margins_P == 0)))


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a share of `count` independent trials (Wilson 1927)."""
    spread = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    return (middle - spread) / scale, (middle + spread) / scale


def calibration_error(margins_P: NDArray[np.float64]) -> float:
    """Return the expected calibration error of sigmoid(|margin|) as the probability that the order
    is right: the mean gap between confidence and accuracy over BINS bins of confidence from 0.5 to
    1 (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    confidence_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    bins_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    gaps = (
        np.sum(bins_P == b)
        * abs(accuracy(margins_P[bins_P == b]) - float(np.mean(confidence_P[bins_P == b])))
        for b in np.unique(bins_P)
    )
    return float(sum(gaps)) / len(margins_P)


def correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return Pearson's correlation; 0 if one of the variables is constant."""
    if len(first) < 2 or not np.std(first) or not np.std(second):
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def pair_metrics(
    prefix: str, scores_R: NDArray[np.float64], comparisons: Comparisons
) -> dict[str, float]:
    """Return PREFIXAccuracy with its interval, PREFIXMargin and PREFIXCalibrationError over all
    pairs; {} if there are none."""
    pairs = pairs_of(comparisons)
    if not len(pairs.better):
        return {}
    margins_P = scores_R[pairs.better] - scores_R[pairs.worse]
    return {
        **_accuracy_metrics(prefix, accuracy(margins_P), len(margins_P)),
        f"{prefix}Margin": float(np.mean(margins_P)),
        f"{prefix}CalibrationError": calibration_error(margins_P),
        f"{prefix}Pairs": float(len(margins_P)),
    }


def unpaired_metrics(
    prefix: str, scores_R: NDArray[np.float64], comparisons: Comparisons
) -> dict[str, float]:
    """Return PREFIXAccuracy of single completions with its interval, and PREFIXMargin, the
    difference of the mean scores of good and bad ones. A score above 0 stands for good."""
    good = comparisons.labels > 0.5
    metrics = _accuracy_metrics(prefix, float(np.mean((scores_R > 0) == good)), len(good))
    if good.any() and not good.all():
        metrics[f"{prefix}Margin"] = float(scores_R[good].mean() - scores_R[~good].mean())
    return metrics


def _accuracy_metrics(prefix: str, value: float, count: int) -> dict[str, float]:
    low, high = interval(value, count)
    return {
        f"{prefix}Accuracy": value,
        f"{prefix}AccuracyLow": low,
        f"{prefix}AccuracyHigh": high,
    }
