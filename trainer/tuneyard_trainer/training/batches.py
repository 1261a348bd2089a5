"""Which rows an optimizer step sees, which worker takes them, and how they share a forward pass.

Everything here is a pure function of the row lengths, the seed and the step, so a resumed run and
a run with another number of workers see the same rows in the same steps: the position in the data
is the step, and nothing else needs saving.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.training.seeds import EPOCH_ORDER, SOURCE_ROWS, row_generator

Indices = NDArray[np.int64]

IGNORE = -100
"""The label of a position without loss, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Order:
    """The rows of every step: a seeded permutation per epoch, cut into batches.

    `copies` says how often an epoch holds each row, from the data sets' weights: a weight of 1.5
    is one copy of every row and a second one of a fixed, seeded half of them.
    """

    rows: Indices
    batch_size: int
    seed: int

    @classmethod
    def of(
        cls, source: NDArray[np.int16], weights: Sequence[float], batch_size: int, seed: int
    ) -> Order:
        """`source`: (N,) index of each row's data set; `weights`: one per data set."""
        chosen = []
        for index, weight in enumerate(weights):
            members = np.flatnonzero(source == index).astype(np.int64)
            whole, part = divmod(weight, 1.0)
            chosen += [members] * int(whole)
            count = round(part * len(members))
            picked = row_generator(seed, SOURCE_ROWS, index).permutation(members)[:count]
            chosen.append(np.sort(picked))
        return cls(np.concatenate(chosen), batch_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def total_steps(self, epochs: float | None, max_steps: int | None) -> int:
        """Steps of the whole run; a part of an epoch is rounded up to a step."""
        if max_steps is not None:
            return max_steps
        return max(1, math.ceil((epochs or 0) * self.steps_per_epoch - 1e-9))

    def epoch(self, number: int) -> Indices:
        """The row indices of epoch `number` (from 0), each copy exactly once."""
        return row_generator(self.seed, EPOCH_ORDER, number).permutation(self.rows)

    def batches(self, first_step: int, total_steps: int) -> Iterator[Indices]:
        """The batches of steps first_step..total_steps-1 (from 0)."""
        step = first_step
        while step < total_steps:
            epoch, batch = divmod(step, self.steps_per_epoch)
            rows = self.epoch(epoch)
            for start in range(batch * self.batch_size, len(rows), self.batch_size):
                if step == total_steps:
                    return
                yield rows[start : start + self.batch_size]
                step += 1


def share(rows: Indices, lengths: Indices, rank: int, world_size: int) -> Indices:
    """The part of a batch that one worker takes: longest first, in a snake over the workers
    (0 1 2 2 1 0 0 1 ...), so that their token counts are about equal."""
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    turn = np.arange(len(rows)) % (2 * world_size)
    return longest_first[np.minimum(turn, 2 * world_size - 1 - turn) == rank]


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass: bins of rows laid end to end, all bins padded to one width."""

    bins: tuple[tuple[int, ...], ...]
    width: int


def passes(
    rows: Indices, lengths: Indices, *, capacity: int, max_tokens: int, pack: bool
) -> list[MicroBatch]:
    """Lays out one worker's share of a step. Every row is in exactly one bin; none is cut.

    With `pack`, rows share bins of `capacity` tokens (or of the longest row, where that is more),
    first fit in descending length, which is within 11/9 of the fewest bins (Johnson 1973).
    Without, each row is its own bin. A pass holds at most `max_tokens` tokens, padding included,
    but always at least one bin.
    """
    longest_first = sorted((int(row) for row in rows), key=lambda row: (-lengths[row], row))
    bins: list[list[int]] = []
    used: list[int] = []
    for row in longest_first:
        length = int(lengths[row])
        space = max(capacity, int(lengths[longest_first[0]])) if pack else 0
        fit = next((i for i, tokens in enumerate(used) if tokens + length <= space), None)
        if fit is None:
            bins.append([row])
            used.append(length)
        else:
            bins[fit].append(row)
            used[fit] += length
    return _group(bins, used, max_tokens)


def _group(bins: list[list[int]], used: list[int], max_tokens: int) -> list[MicroBatch]:
    """Bins of like width together, widest first."""
    groups: list[MicroBatch] = []
    current: list[tuple[int, ...]] = []
    width = 0
    for index in sorted(range(len(bins)), key=lambda i: -used[i]):
        if current and (len(current) + 1) * width > max_tokens:
            groups.append(MicroBatch(tuple(current), width))
            current = []
        if not current:
            width = used[index]
        current.append(tuple(bins[index]))
    if current:
        groups.append(MicroBatch(tuple(current), width))
    return groups
