"""How often an epoch contains the rows of each training data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuneyard.errors import StageError

MAX_WEIGHT = 1000.0
"""The most often that an epoch may contain a row. More is a set of a few rows by mistake."""


def mixed_weights(
    counts: Sequence[int],
    weights: Sequence[float],
    *,
    temperature: float | None = None,
    replayed: int = 0,
    share: float = 0.0,
    augmented: bool = False,
) -> list[float]:
    """Return how often an epoch contains each row of each data set.

    `counts`: sequences of each data set. `weights`: those of the manifest. `temperature` T: a data
    set's part of an epoch is in proportion to (weight x count)^(1/T), and the epoch keeps its
    length (Arivazhagan et al. 2019, arXiv:1907.05019, section 4.2); None: 1. `replayed`: the last
    data sets, as many, are general data and are together `share` of an epoch. `augmented`: behind
    these is one of augmented rows, which is like the job's own. Raises StageError ReplayTooSmall.
    """
    if augmented:  # among the job's own, and back
        order = [*range(len(counts) - 1 - replayed), len(counts) - 1]
        order += range(len(counts) - 1 - replayed, len(counts) - 1)
        sorted_counts, sorted_weights = ([values[i] for i in order] for values in (counts, weights))
        mixed = mixed_weights(
            sorted_counts, sorted_weights, temperature=temperature, replayed=replayed, share=share
        )
        return [mixed[order.index(i)] for i in range(len(counts))]
    own = len(counts) - replayed
    parts = _tempered(
        [w * n for w, n in zip(weights[:own], counts[:own], strict=True)], temperature
    )
    general = [w * n for w, n in zip(weights[own:], counts[own:], strict=True)]
    if general:
        wanted = sum(parts) * share / (1 - share)
        parts += [wanted * part / (sum(general) or 1.0) for part in general]
    mixed = [part / count if count else 0.0 for part, count in zip(parts, counts, strict=True)]
    if max(mixed[own:], default=0.0) > MAX_WEIGHT:
        raise StageError(
            "ReplayTooSmall",
            f"the {sum(counts[own:])} sequences of spec.data.replay would be repeated "
            f"{max(mixed[own:]):,.0f} times an epoch to be {share:.0%} of it.",
            advice="Add rows to spec.data.replay.data, or lower spec.data.replay.share.",
        )
    return mixed


def mixture(
    counts: Sequence[int], weights: Sequence[float], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the part of each training data set in an epoch, for the record and the report.
    `counts`: its sequences. `names`: those of the training data sets, which others may follow."""
    parts = [weight * count for weight, count in zip(weights, counts, strict=True)]
    return [
        {"name": name, "weight": weight, "share": part / sum(parts)}
        for name, weight, part in zip(names, weights, parts, strict=False)
    ]


def _tempered(parts: Sequence[float], temperature: float | None) -> list[float]:
    """Return parts of the same sum, in proportion to their 1/T-th powers."""
    if temperature is None:
        return list(parts)
    total = sum(parts)
    largest = max(parts, default=0.0)  # its power is 1, and those of the others may vanish
    flattened = [(part / largest) ** (1 / temperature) if part else 0.0 for part in parts]
    return [total * part / (sum(flattened) or 1.0) for part in flattened]
