"""The micro-batches that a trainer gets: the rows of each step, in our order.

transformers accumulates gradients over a fixed number of micro-batches. A step's rows are therefore
cut into equally many on every worker, and a worker without enough rows gets micro-batches that
have no target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.training.batches import IGNORE, Indices, Order, share
from tuneyard_trainer.worker import Worker

Inputs = dict[str, Tensor]
Collate = Callable[[Indices, int], Any]
"""Returns a micro-batch of some rows (or pairs), of a global batch of so many: `Inputs`, or what
else the trainer takes."""


@dataclass(frozen=True)
class Layout:
    """How a worker's share of a step is cut."""

    rows: int
    """Most rows of a micro-batch."""
    accumulated: int
    """Micro-batches of a step on each worker."""

    @classmethod
    def of(cls, order: Order, longest: int, max_tokens: int, world_size: int) -> Layout:
        """Return the layout that keeps each micro-batch within `max_tokens`, padding included,
        whatever its rows. `longest`: tokens of the longest row, which may be a micro-batch of its
        own."""
        each = -(-min(order.batch_size, len(order.rows)) // world_size)
        rows = min(each, max(1, max_tokens // longest))
        return cls(rows, -(-each // rows))

    def share_of_mean(self, count: int, world_size: int) -> float:
        """Return the factor that makes a trainer's mean over the rows of a micro-batch, the
        micro-batches and the workers the mean over the `count` rows of a global batch."""
        return self.rows * self.accumulated * world_size / count

    def cut(self, rows: Indices, lengths: Indices) -> list[Indices]:
        """Return the micro-batches of a worker's share: rows of similar length together, the
        longest first. The last ones may be empty."""
        longest_first = rows[np.lexsort((rows, -lengths[rows]))]
        starts = range(0, self.rows * self.accumulated, self.rows)
        return [longest_first[start : start + self.rows] for start in starts]


class StepBatches(Dataset[Inputs]):
    """One worker's micro-batches of the steps from `first_step` to `total` - 1, in order."""

    def __init__(
        self,
        lengths: Indices,
        collate: Collate,
        order: Order,
        layout: Layout,
        worker: Worker,
        *,
        first_step: int,
        total: int,
    ) -> None:
        """`lengths`: the tokens of each row of the data, or of the longest row of each pair."""
        self._lengths, self._layout, self._worker = lengths, layout, worker
        self._collate, self._count = collate, 0
        self._length = (total - first_step) * layout.accumulated
        self._steps = order.batches(first_step, total)
        self._pending: list[Indices] = []
        self._next = 0
        self.taken: list[Indices] = []
        """The global batches of the steps whose micro-batches were asked for, the oldest first. The
        caller removes what it has seen."""

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Inputs:
        """Return the next micro-batch. Raises IndexError for any other index: a step's rows are
        drawn once, and in order."""
        if index != self._next or index >= self._length:
            raise IndexError(f"micro-batch {index} was asked for, and the next one is {self._next}")
        if not self._pending:
            rows = next(self._steps)
            self.taken.append(rows)
            self._count = len(rows)
            mine = share(rows, self._lengths, self._worker.rank, self._worker.world_size)
            self._pending = self._layout.cut(mine, self._lengths)
        self._next += 1
        return self._collate(self._pending.pop(0), self._count)

    def loader(self) -> DataLoader[Inputs]:
        """Return a loader of the micro-batches as they are."""
        return DataLoader(self, batch_size=None, shuffle=False, num_workers=0)


def collate(rows: Rows, chosen: Indices, pad: int) -> Inputs:
    """Return `input_ids`, `attention_mask` and `labels` (B, L), padded on the right. Without rows,
    one token without a target."""
    members: Sequence[tuple[Indices, Indices]] = [
        (rows.ids(row).astype(np.int64), rows.mask(row).astype(np.int64)) for row in chosen.tolist()
    ] or [(np.array([pad]), np.array([0]))]
    width = max(len(ids) for ids, _ in members)
    shape = (len(members), width)
    ids_BL = np.full(shape, pad, dtype=np.int64)
    labels_BL = np.full(shape, IGNORE, dtype=np.int64)
    attention_BL = np.zeros(shape, dtype=np.int64)
    for b, (ids, mask) in enumerate(members):
        ids_BL[b, : len(ids)] = ids
        labels_BL[b, : len(ids)] = np.where(mask, ids, IGNORE)
        attention_BL[b, : len(ids)] = 1
    arrays = {"input_ids": ids_BL, "attention_mask": attention_BL, "labels": labels_BL}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


EMPTY = -1
"""In place of a row: a row without a completion, which fills a micro-batch."""


def padded(rows: Rows, chosen: Indices, pad: int) -> Inputs:
    """Return `input_ids`, `attention_mask` and `completion_mask` (B, L) of the chosen rows, padded
    on the right. An EMPTY row is padding whose first token has attention: no row may be without."""
    width = max([2, *rows.lengths[chosen[chosen != EMPTY]].tolist()])
    ids_BL = np.full((len(chosen), width), pad, dtype=np.int64)
    completion_BL, attention_BL = np.zeros_like(ids_BL), np.zeros_like(ids_BL)
    attention_BL[:, 0] = 1
    for b, row in enumerate(chosen.tolist()):
        if row == EMPTY:
            continue
        length = int(rows.lengths[row])
        ids_BL[b, :length] = rows.ids(row)
        completion_BL[b, :length] = rows.mask(row)
        attention_BL[b, :length] = 1
    arrays = {
        "input_ids": ids_BL,
        "attention_mask": attention_BL,
        "completion_mask": completion_BL,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
