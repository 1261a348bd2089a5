"""How well numbers for answers agree with what people preferred: accuracy, margin, calibration.

Shapes: R rows, P pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.preference.dataset import Comparisons

Z = 1.959964
"""Of a 95% interval."""
BINS = 10


class Pairs(NamedTuple):
    """Every pair of every group, better row first; ties, which agree with anything, are left
    out."""

    better: NDArray[np.int64]
    worse: NDArray[np.int64]


def pairs_of(comparisons: Comparisons) -> Pairs:
    """(P,) and (P,) rows."""
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
    """The share of pairs in the right order; equal numbers are half right."""
    return float(np.mean((margins_P > 0) + 0.5 * (margins_P == 0)))


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of `count` independent trials (Wilson 1927)."""
    spread = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    return (middle - spread) / scale, (middle + spread) / scale


def calibration_error(margins_P: NDArray[np.float64]) -> float:
    """The expected calibration error of sigmoid(margin) as the probability that the higher answer
    is the better one: mean gap between confidence and accuracy over 10 bins of confidence from 0.5
    to 1 (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    confidence_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    bins_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    gaps = (
        np.sum(bins_P == b)
        * abs(accuracy(margins_P[bins_P == b]) - float(np.mean(confidence_P[bins_P == b])))
        for b in np.unique(bins_P)
    )
    return float(sum(gaps)) / len(margins_P)


def correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if len(first) < 2 or not np.std(first) or not np.std(second):
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def pair_metrics(
    prefix: str, found_R: NDArray[np.float64], comparisons: Comparisons
) -> dict[str, float]:
    """PREFIXAccuracy with its interval, PREFIXMargin and its calibration, on all pairs; {} where
    there are none."""
    pairs = pairs_of(comparisons)
    if not len(pairs.better):
        return {}
    margins_P = found_R[pairs.better] - found_R[pairs.worse]
    right = accuracy(margins_P)
    low, high = interval(right, len(margins_P))
    return {
        f"{prefix}Accuracy": right,
        f"{prefix}AccuracyLow": low,
        f"{prefix}AccuracyHigh": high,
        f"{prefix}Margin": float(np.mean(margins_P)),
        f"{prefix}CalibrationError": calibration_error(margins_P),
        f"{prefix}Pairs": float(len(margins_P)),
    }


def unpaired_metrics(
    prefix: str, found_R: NDArray[np.float64], comparisons: Comparisons
) -> dict[str, float]:
    """PREFIXAccuracy of single answers, a number above 0 standing for thumbs up, with its interval,
    and how far the means of both kinds are apart."""
    good = comparisons.labels > 0.5
    right = float(np.mean((found_R > 0) == good))
    low, high = interval(right, len(good))
    figures = {
        f"{prefix}Accuracy": right,
        f"{prefix}AccuracyLow": low,
        f"{prefix}AccuracyHigh": high,
    }
    if good.any() and not good.all():
        figures[f"{prefix}Margin"] = float(found_R[good].mean() - found_R[~good].mean())
    return figures
