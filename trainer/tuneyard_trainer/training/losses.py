"""Masked cross-entropy over rows laid out in passes, without logits that carry no loss.

Shapes: B bins of a pass, L their width, N target positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.models.base import autocast
from tuneyard_trainer.models.layers import head_at, head_of
from tuneyard_trainer.training.batches import IGNORE, Indices, MicroBatch, passes, share

EVALUATION_ROWS = 256
"""Rows laid out at a time: first fit is quadratic in the number of bins."""
MAX_LOGITS = 1 << 29
"""Logits of one pass, in elements: 2 GiB in float32."""
CPU_CAPACITY = 256
"""Bin width on CPU, in tokens: dense attention over a bin costs 4% of a 135M model's arithmetic at
256 and 17% at 1024, and short chat rows fill 256 to within 5%."""


@dataclass(frozen=True)
class Batch:
    """One pass as tensors on the worker's device."""

    ids_BL: Tensor
    positions_BL: Tensor
    """Position of each token in its own row; restarts at 0 where a bin's next row begins, which is
    how attention tells rows apart. Padding is a row of its own."""
    labels_BL: Tensor
    """The token each position must predict (already shifted), IGNORE where none."""
    packed: bool
    """Whether bins may hold several rows; if not, attention_mask hides the padding."""
    attention_BL: Tensor

    @property
    def num_targets(self) -> int:
        return int((self.labels_BL != IGNORE).sum())


@dataclass(frozen=True)
class Forward:
    """How rows become losses on this worker: layout, padding, device and precision."""

    device: torch.device
    precision: torch.dtype
    pad: int
    """The token that fills bins; never a target, never attended to by a row."""
    pack: bool
    """Several rows to a bin."""
    capacity: int
    """Bin width in tokens, where rows are packed."""
    max_tokens: int
    """The most tokens of a pass."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        device: torch.device,
        precision: torch.dtype,
        pad: int,
        pack: bool,
        max_length: int,
        max_tokens: int | Literal["auto"],
    ) -> Forward:
        """`auto`: 2048 tokens on CPU, 16384 on GPU, fewer where the vocabulary is large."""
        on_gpu = device.type == "cuda"
        vocabulary = head_of(model).out_features
        default = min(16384 if on_gpu else 2048, max(256, MAX_LOGITS // vocabulary))
        budget = default if max_tokens == "auto" else max_tokens
        capacity = max_length if on_gpu else min(max_length, CPU_CAPACITY)
        return cls(device, precision, pad, pack, capacity, budget)

    def passes(self, rows: Rows, chosen: Indices) -> list[MicroBatch]:
        """The passes that cover the chosen rows."""
        return passes(
            chosen,
            rows.lengths,
            capacity=self.capacity,
            max_tokens=self.max_tokens,
            pack=self.pack,
        )

    def loss(self, model: nn.Module, rows: Rows, layout: MicroBatch) -> Tensor:
        """The sum of the losses of a pass's targets, in nats (scalar)."""
        batch = collate(rows, layout, pad=self.pad, packed=self.pack, device=self.device)
        with autocast(self.device, self.precision):
            return target_loss(model, batch)

    def mean_loss(self, model: nn.Module, rows: Rows, rank: int, world_size: int) -> float:
        """Mean loss over all targets of all rows, in nats; every worker takes its share."""
        mine = share(np.arange(len(rows)), rows.lengths, rank, world_size)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        model.eval()
        with torch.no_grad():
            for start in range(0, len(mine), EVALUATION_ROWS):
                for layout in self.passes(rows, mine[start : start + EVALUATION_ROWS]):
                    total += self.loss(model, rows, layout).double()
        if world_size > 1:
            dist.all_reduce(total)
        return float(total) / int(rows.targets.sum())


def collate(
    rows: Rows, layout: MicroBatch, *, pad: int, packed: bool, device: torch.device
) -> Batch:
    """Lays the rows of a pass end to end in their bins."""
    shape = (len(layout.bins), layout.width)
    ids = np.full(shape, pad, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    attention = np.zeros(shape, dtype=np.int64)
    for b, members in enumerate(layout.bins):
        start = 0
        for row in members:
            tokens, mask = rows.ids(row), rows.mask(row)
            end = start + len(tokens)
            ids[b, start:end] = tokens
            positions[b, start:end] = np.arange(len(tokens))
            attention[b, start:end] = 1
            labels[b, start : end - 1] = np.where(mask[1:], tokens[1:], IGNORE)
            start = end
        positions[b, start:] = np.arange(layout.width - start)
    tensors = (torch.from_numpy(a).to(device) for a in (ids, positions, labels, attention))
    ids_BL, positions_BL, labels_BL, attention_BL = tensors
    return Batch(ids_BL, positions_BL, labels_BL, packed, attention_BL)


def target_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the cross-entropies of a pass's targets, in nats (scalar, float32).

    The logits of positions without loss are never computed: in chat data that is most of them, and
    the head is a fifth of a small model's arithmetic.
    """
    bins_N, columns_N = torch.nonzero(batch.labels_BL != IGNORE, as_tuple=True)
    if batch.packed:
        context: dict[str, Any] = {"position_ids": batch.positions_BL}
    else:
        context = {"attention_mask": batch.attention_BL}
    with head_at(model, bins_N, columns_N, batch.ids_BL.shape[1]):
        logits_NV = model(input_ids=batch.ids_BL, use_cache=False, **context).logits[0]
    return F.cross_entropy(logits_NV.float(), batch.labels_BL[bins_N, columns_N], reduction="sum")
