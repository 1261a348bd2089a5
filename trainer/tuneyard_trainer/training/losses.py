"""Masked cross-entropy over micro-batches. Logits of positions without loss are never computed.

Shapes: B bins of a micro-batch, L their width in tokens, N targets, V vocabulary, K metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.sharing import stop_together
from tuneyard_trainer.models.base import autocast
from tuneyard_trainer.models.layers import head_at, head_of
from tuneyard_trainer.models.sharding import in_step, is_shared, reshard
from tuneyard_trainer.training.batches import IGNORE, Indices, MicroBatch, micro_batches, share
from tuneyard_trainer.training.seeds import derive_seed
from tuneyard_trainer.worker import Interrupted, Worker

EVALUATION_ROWS = 256
"""Rows packed at a time. Another number would change the rounding of held-out losses, which a
resumed run compares with those before it."""
MAX_LOGITS = 1 << 29
"""Logits of one micro-batch, in elements: 2 GiB in float32."""
CPU_CAPACITY = 256
"""Bin width on CPU, in tokens: dense attention over a bin costs 4% of a 135M model's arithmetic at
256 and 17% at 1024, and short chat rows fill 256 to within 5%."""

T = TypeVar("T")


def default_max_tokens(device: torch.device) -> int:
    """Return the tokens of a micro-batch under `microBatchTokens: auto`."""
    return 16384 if device.type == "cuda" else 2048


@dataclass(frozen=True)
class Batch:
    """One micro-batch as tensors on the worker's device."""

    ids_BL: Tensor
    positions_BL: Tensor
    """Position of each token in its own row. It restarts at 0 at each row of a bin, which is how
    attention separates the rows. The padding counts as a row of its own."""
    labels_BL: Tensor
    """The token that each position must predict (already shifted); IGNORE: no loss."""
    packed: bool
    """Whether bins may hold several rows. If not, `attention_BL` masks the padding."""
    attention_BL: Tensor


@dataclass(frozen=True)
class Forward:
    """The forward passes of one worker: packing, padding, device and precision."""

    device: torch.device
    precision: torch.dtype
    pad: int
    """The token that fills bins. It is never a target, and no row attends to it."""
    pack: bool
    """Whether several rows share a bin."""
    capacity: int
    """Bin width of packed rows, in tokens."""
    max_tokens: int
    """The most tokens of a micro-batch, padding included."""

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
        """Return the forward passes of a causal model.

        `auto`: 2048 tokens on CPU and 16384 on GPU, or fewer, so that the logits do not exceed
        MAX_LOGITS.
        """
        if max_tokens == "auto":
            vocabulary = head_of(model).out_features
            budget = min(default_max_tokens(device), max(256, MAX_LOGITS // vocabulary))
        else:
            budget = max_tokens
        capacity = max_length if device.type == "cuda" else min(max_length, CPU_CAPACITY)
        return cls(device, precision, pad, pack, capacity, budget)

    def micro_batches(self, rows: Rows, chosen: Indices) -> list[MicroBatch]:
        """Return micro-batches that cover the chosen rows."""
        return micro_batches(
            chosen,
            rows.lengths,
            capacity=self.capacity,
            max_tokens=self.max_tokens,
            pack=self.pack,
        )

    def loss(
        self,
        model: nn.Module,
        rows: Rows,
        micro_batch: MicroBatch,
        *,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """Return the cross-entropy of a micro-batch's targets, in nats (float32).

        A scalar, or with `reduction` "none" one loss per target (N,), in the order of the bins.
        """
        batch = collate(rows, micro_batch, pad=self.pad, packed=self.pack, device=self.device)
        with autocast(self.device, self.precision):
            return _target_loss(model, batch, reduction)

    def target_logits(
        self, model: nn.Module, rows: Rows, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the logits (N, V) of a micro-batch's targets in float32, in the order of the bins,
        and the targets themselves (N,)."""
        batch = collate(rows, micro_batch, pad=self.pad, packed=self.pack, device=self.device)
        with autocast(self.device, self.precision):
            return _target_logits(model, batch)

    def mean_loss_of_shards(self, model: nn.Module, rows: Rows, worker: Worker) -> float:
        """Return the same mean of a sharded model. Its workers gather its layers together, so each
        of them makes as many forward passes as the others. Raises Interrupted on all of them if any
        is asked to stop."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        model.eval()
        with torch.no_grad():
            own = [*self._evaluation_batches(rows, worker)]
            for batch, is_own in in_step(model, own, spare_batch(own, rows)):
                stop_together(worker)
                loss = self.loss(model, rows, batch).double()
                total += loss if is_own else 0.0
        reshard(model)
        return float(sum_unless_stopped(total, False, worker)) / int(rows.targets.sum())

    def mean_loss(self, model: nn.Module, rows: Rows, worker: Worker) -> float:
        """Return the mean loss over all targets of all rows, in nats. The workers share the rows,
        and all of them return the mean, or raise Interrupted if any of them is asked to stop."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        model.eval()
        with torch.no_grad():
            stopped = False
            for micro_batch in self._evaluation_batches(rows, worker):
                if stopped := worker.stop():
                    break
                total += self.loss(model, rows, micro_batch).double()
        return float(sum_unless_stopped(total, stopped, worker)) / int(rows.targets.sum())

    @torch.no_grad()
    def share_losses(self, model: nn.Module, rows: Rows, worker: Worker) -> Iterator[float]:
        """Yield the summed loss, in nats, of each micro-batch of this worker's share of the rows.
        The other workers are not needed, so the caller adds the losses of all workers."""
        model.eval()
        for micro_batch in self._evaluation_batches(rows, worker):
            yield float(self.loss(model, rows, micro_batch))

    def _evaluation_batches(self, rows: Rows, worker: Worker) -> Iterator[MicroBatch]:
        mine = share(np.arange(len(rows)), rows.lengths, worker.rank, worker.world_size)
        for start in range(0, len(mine), EVALUATION_ROWS):
            yield from self.micro_batches(rows, mine[start : start + EVALUATION_ROWS])


def spare_batch(batches: Sequence[MicroBatch], rows: Rows) -> MicroBatch:
    """Return a micro-batch for `in_step`: the last one, or if there is none the first row."""
    return batches[-1] if batches else MicroBatch(((0,),), int(rows.lengths[0]))


def sum_unless_stopped(values_N: Tensor, stopped: bool, worker: Worker) -> Tensor:
    """Return the sum over the workers (N,). Raises Interrupted on all of them if any has `stopped`,
    and left its values incomplete.

    The request travels with the sum, because the workers have unequal numbers of batches and must
    take part in equally many collective calls.
    """
    flagged = torch.cat([values_N, torch.tensor([float(stopped)]).to(values_N)])
    if worker.world_size > 1:
        dist.all_reduce(flagged)
    if flagged[-1] > 0:
        raise Interrupted(worker.stage, 0)
    return flagged[:-1]


def stop_check(model: nn.Module, worker: Worker) -> Callable[[], None]:
    """Return what a worker calls before each forward pass, to end it if a stop is requested. No
    worker may leave the others alone with a model that they share, so these agree on it."""
    return partial(stop_together, worker) if is_shared(model) else worker.check_stop


def collate(
    rows: Rows, micro_batch: MicroBatch, *, pad: int, packed: bool, device: torch.device
) -> Batch:
    """Return the tensors of a micro-batch: its rows end to end in their bins."""
    shape = (len(micro_batch.bins), micro_batch.width)
    ids = np.full(shape, pad, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    attention = np.zeros(shape, dtype=np.int64)
    for b, members in enumerate(micro_batch.bins):
        start = 0
        for row in members:
            tokens, mask = rows.ids(row), rows.mask(row)
            end = start + len(tokens)
            ids[b, start:end] = tokens
            positions[b, start:end] = np.arange(len(tokens))
            attention[b, start:end] = 1
            labels[b, start : end - 1] = np.where(mask[1:], tokens[1:], IGNORE)
            start = end
        positions[b, start:] = np.arange(micro_batch.width - start)
    tensors = (torch.from_numpy(a).to(device) for a in (ids, positions, labels, attention))
    ids_BL, positions_BL, labels_BL, attention_BL = tensors
    return Batch(ids_BL, positions_BL, labels_BL, packed, attention_BL)


def _target_loss(model: nn.Module, batch: Batch, reduction: str) -> Tensor:
    """Return the cross-entropy of a batch's targets."""
    logits_NV, labels_N = _target_logits(model, batch)
    return F.cross_entropy(logits_NV, labels_N, reduction=reduction)


def _target_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of a batch's targets (N, V), of these positions alone, and the targets.

    In chat data most positions carry no loss, and the head is a fifth of a small model's
    arithmetic.
    """
    bins_N, columns_N = torch.nonzero(batch.labels_BL != IGNORE, as_tuple=True)
    if batch.packed:
        context: dict[str, Any] = {"position_ids": batch.positions_BL}
    else:
        context = {"attention_mask": batch.attention_BL}
    with head_at(model, bins_N, columns_N, batch.ids_BL.shape[1]):
        logits_NV = model(input_ids=batch.ids_BL, use_cache=False, **context).logits[0]
    return logits_NV.float(), batch.labels_BL[bins_N, columns_N]


def accumulate_gradients(
    sums_of: Callable[[T], Tensor],
    batches: Iterable[T],
    *,
    count: int,
    num_metrics: int,
    seed: tuple[int, int],
    worker: Worker,
) -> Tensor:
    """Add the gradient of a worker's share of a global batch, one micro-batch after another.

    `sums_of`: a micro-batch's metrics, summed (K,); the first one is the loss. `count`: the divisor
    of the sums, over the global batch. `seed`: the job's seed and the step. Returns the worker's
    share of each metric's mean (K,).
    """
    means_K = torch.zeros(num_metrics, device=worker.device)
    for index, micro_batch in enumerate(batches):
        # Dropout is a function of (seed, step, worker, micro-batch): a resumed run repeats it.
        torch.manual_seed(derive_seed(*seed, worker.rank, index))
        sums_K = sums_of(micro_batch) / count
        sums_K[0].backward()
        means_K += sums_K.detach()
    return means_K
