"""The batch of each optimizer step, each worker's share of it, and the share's micro-batches.

They are pure functions of the row lengths, the seed and the step. A resumed run, or a run with
another number of workers, therefore trains on the same rows in the same steps, and a checkpoint
saves the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.training.seeds import EPOCH_ORDER, SOURCE_ROWS, row_generator

Indices = NDArray[np.int64]

IGNORE = -100
"""Label of a position without loss: the default `ignore_index` of torch's cross-entropy."""


@dataclass(frozen=True)
class Order:
    """The rows of every step: a seeded permutation per epoch, cut into batches."""

    rows: Indices
    """The rows of an epoch before they are shuffled. A row may occur several times."""
    batch_size: int
    seed: int

    @classmethod
    def of(
        cls, source: NDArray[np.int16], weights: Sequence[float], batch_size: int, seed: int
    ) -> Order:
        """Return the order of rows whose data sets have weights.

        A weight of 1.5 puts every row of the data set into an epoch once, and a fixed, seeded half
        of them a second time. `source`: (N,) the index of each row's data set.
        """
        chosen = []
        for index, weight in enumerate(weights):
            members = np.flatnonzero(source == index).astype(np.int64)
            copies, fraction = divmod(weight, 1.0)
            chosen += [members] * int(copies)
            count = round(fraction * len(members))
            picked = row_generator(seed, SOURCE_ROWS, index).permutation(members)[:count]
            chosen.append(np.sort(picked))
        return cls(np.concatenate(chosen), batch_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def total_steps(self, epochs: float | None, max_steps: int | None) -> int:
        """Return the number of steps of the run. A fraction of a step is rounded up."""
        if max_steps is not None:
            return max_steps
        return max(1, math.ceil((epochs or 0) * self.steps_per_epoch - 1e-9))

    def epoch(self, number: int) -> Indices:
        """Return the shuffled rows of epoch `number` (from 0)."""
        return row_generator(self.seed, EPOCH_ORDER, number).permutation(self.rows)

    def batches(self, first_step: int, total_steps: int) -> Iterator[Indices]:
        """Yield the batches of steps `first_step` to `total_steps` - 1, counted from 0."""
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
    """Return one worker's share of a batch.

    The rows are assigned from the longest to the shortest, to the workers 0 1 2 2 1 0 0 1 ..., so
    the workers' token counts are about equal.
    """
    longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
    turn = np.arange(len(rows)) % (2 * world_size)
    return longest_first[np.minimum(turn, 2 * world_size - 1 - turn) == rank]


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass: bins of rows laid end to end, all bins padded to one width."""

    bins: tuple[tuple[int, ...], ...]
    """The rows of each bin."""
    width: int
    """The width of every bin, in tokens."""

    @property
    def rows(self) -> Indices:
        """(R,) the rows, bin by bin."""
        return np.array([row for members in self.bins for row in members], dtype=np.int64)


class Packing(NamedTuple):
    """How the sequences of some steps are laid out in the rows of their micro-batches."""

    sequences: int
    rows: int
    """The bins. As many as the sequences, unless these are packed."""
    tokens: int
    """Tokens of the sequences."""
    positions: int
    """Tokens of the rows, padding included."""

    @property
    def padding(self) -> float:
        """The share of the positions that is padding."""
        return 1 - self.tokens / self.positions

    @classmethod
    def of(
        cls,
        batches: Iterable[Indices],
        lengths: Indices,
        world_size: int,
        lay_out: Callable[[Indices], Sequence[MicroBatch]],
    ) -> Packing:
        """Return the packing of at least one step. `lay_out`: the micro-batches of a worker's share
        of a step. Nothing is trained: the layout is the same each time."""
        sequences = rows = tokens = positions = 0
        for batch in batches:
            sequences += len(batch)
            tokens += int(lengths[batch].sum())
            for rank in range(world_size):
                for micro_batch in lay_out(share(batch, lengths, rank, world_size)):
                    rows += len(micro_batch.bins)
                    positions += len(micro_batch.bins) * micro_batch.width
        return cls(sequences, rows, tokens, positions)


def micro_batches(
    rows: Indices, lengths: Indices, *, capacity: int, max_tokens: int, pack: bool
) -> list[MicroBatch]:
    """Lay out one worker's share of a step. Every row is in exactly one bin, and no row is cut.

    With `pack`, rows share bins of `capacity` tokens (or of the longest row's length if that is
    more), first fit in descending length, which needs at most 11/9 of the fewest possible bins
    (Johnson 1973). Without `pack`, each row is its own bin. A micro-batch holds at most
    `max_tokens` tokens, padding included; a row that is longer is a micro-batch of its own.
    """
    longest_first = rows[np.lexsort((rows, -lengths[rows]))]
    sorted_lengths = lengths[longest_first]
    if not pack or not len(rows):
        return _group([(row,) for row in longest_first.tolist()], sorted_lengths, max_tokens)
    space = min(max(capacity, int(sorted_lengths[0])), max_tokens)
    placed = _first_fit(sorted_lengths.tolist(), space)
    bins: list[list[int]] = [[] for _ in range(max(placed) + 1)]
    for row, index in zip(longest_first.tolist(), placed, strict=True):
        bins[index].append(row)
    used = np.bincount(placed, weights=sorted_lengths).astype(np.int64)
    return _group([tuple(members) for members in bins], used, max_tokens)


def _first_fit(lengths: Sequence[int], space: int) -> list[int]:
    """Return the bin of each row: the first bin with room for it, in O(N log N).

    A row longer than `space` has a bin of its own. The search descends a binary tree over the
    bins, whose nodes hold the most room of any bin below them; node 1 is the root.
    """
    leaves = 1 << (len(lengths) - 1).bit_length()
    room = [space] * (2 * leaves)
    placed = []
    full = 0
    for length in lengths:
        if length > space:  # these rows come first, since the rows are sorted
            node = leaves + full
            full += 1
            room[node] = -1
        else:
            node = 1
            while node < leaves:
                node = 2 * node if room[2 * node] >= length else 2 * node + 1
            room[node] -= length
        placed.append(node - leaves)
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return placed


def _group(bins: Sequence[tuple[int, ...]], used: Indices, max_tokens: int) -> list[MicroBatch]:
    """Group bins of similar width into micro-batches, the widest bins first."""
    order = np.argsort(-used, kind="stable").tolist()
    widths = used.tolist()
    groups: list[MicroBatch] = []
    start = 0
    for end in range(1, len(order) + 1):
        width = widths[order[start]]
        if end == len(order) or (end - start + 1) * width > max_tokens:
            members = tuple(bins[index] for index in order[start:end])
            groups.append(MicroBatch(members, width))
            start = end
    return groups
