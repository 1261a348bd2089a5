"""Forward passes over rows: log-probabilities under a policy, and scores of a reward model.

Shapes: R rows, B bins of a micro-batch, L their width, N targets, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.models.base import autocast
from tuneyard_trainer.models.probes import base_of
from tuneyard_trainer.models.sharding import in_step, reshard
from tuneyard_trainer.preference.dataset import Comparisons
from tuneyard_trainer.training.batches import Indices, MicroBatch, micro_batches, share
from tuneyard_trainer.training.losses import (
    Forward,
    collate,
    spare_batch,
    stop_check,
    sum_unless_stopped,
)
from tuneyard_trainer.worker import Interrupted, Worker

UNLIMITED = 1 << 62
"""Tokens of a micro-batch whose rows the caller has chosen."""

Scorer = Callable[[nn.Module, Rows, Indices, Forward], Tensor]
"""Returns one number for each chosen row (R,), from one forward pass."""


def logprobs(model: nn.Module, rows: Rows, chosen: Indices, forward: Forward) -> Tensor:
    """Return the log-probability of each row's targets, summed over the row (R,), in float32, from
    one forward pass."""
    micro_batch, order = _as_micro_batch(rows, chosen, forward)
    logprobs_N = -forward.loss(model, rows, micro_batch, reduction="none")
    # Targets come bin by bin and, in a bin, row by row.
    owners_N = np.repeat(order, rows.targets[chosen[order]])
    return torch.zeros(len(chosen), device=forward.device).index_add(
        0, torch.from_numpy(owners_N).to(forward.device), logprobs_N
    )


def scores(model: nn.Module, rows: Rows, chosen: Indices, forward: Forward) -> Tensor:
    """Return the output of a sequence classifier's head `score` at each row's last token (R,), in
    float32, from one forward pass. Rows must not be packed."""
    micro_batch, order = _as_micro_batch(rows, chosen, forward)
    batch = collate(rows, micro_batch, pad=forward.pad, packed=False, device=forward.device)
    base = base_of(model)
    trunk = getattr(base, base.base_model_prefix)
    last_R = torch.from_numpy(rows.lengths[chosen[order]] - 1).to(forward.device)
    with autocast(forward.device, forward.precision):
        hidden_BLH = trunk(
            input_ids=batch.ids_BL, attention_mask=batch.attention_BL, use_cache=False
        )[0]
        bins_R = torch.arange(len(order), device=forward.device)
        scores_R = base.score(hidden_BLH[bins_R, last_R])[:, 0].float()
    return torch.zeros_like(scores_R).index_copy(
        0, torch.from_numpy(order).to(forward.device), scores_R
    )


def _as_micro_batch(rows: Rows, chosen: Indices, forward: Forward) -> tuple[MicroBatch, Indices]:
    """Return the rows as one micro-batch, and the positions in `chosen` of its rows. A row may be
    chosen twice.

    The rows share bins only where that needs no more tokens, padding included, than one bin for
    each row, which is what the caller has limited.
    """
    lengths = rows.lengths[chosen]
    local = _laid_out(lengths, forward, pack=forward.pack)
    if len(local.bins) * local.width > len(chosen) * int(lengths.max()):
        local = _laid_out(lengths, forward, pack=False)
    bins = tuple(tuple(int(chosen[i]) for i in members) for members in local.bins)
    return MicroBatch(bins, local.width), local.rows


def _laid_out(lengths: NDArray[np.int64], forward: Forward, *, pack: bool) -> MicroBatch:
    (local,) = micro_batches(
        np.arange(len(lengths)),
        lengths,
        capacity=forward.capacity,
        max_tokens=UNLIMITED,
        pack=pack,
    )
    return local


def group_micro_batches(
    comparisons: Comparisons, groups: Indices, max_tokens: int
) -> Iterator[Indices]:
    """Yield micro-batches of whole groups, the groups with the longest rows first: at most
    `max_tokens` tokens each, padding included. A group that is larger is a micro-batch of its own,
    since its rows are compared with each other."""
    longest = comparisons.longest
    micro_batch: list[int] = []
    num_rows = width = 0
    for group in groups[np.lexsort((groups, -longest[groups]))].tolist():
        size = int(comparisons.sizes[group])
        if micro_batch and (num_rows + size) * width > max_tokens:
            yield np.array(micro_batch, dtype=np.int64)
            micro_batch, num_rows = [], 0
        if not micro_batch:
            width = int(longest[group])
        micro_batch.append(group)
        num_rows += size
    if micro_batch:
        yield np.array(micro_batch, dtype=np.int64)


def evaluate_rows(
    scorer: Scorer, model: nn.Module, rows: Rows, forward: Forward, worker: Worker
) -> NDArray[np.float64]:
    """Return one number for every row (R,), in evaluation mode. The workers share the rows, and all
    of them return all numbers, or raise Interrupted if any of them is asked to stop. Those of a
    sharded model make equally many forward passes."""
    values_R = np.zeros(len(rows))
    mine = share(np.arange(len(rows)), rows.lengths, worker.rank, worker.world_size)
    stopped = False
    try:
        check_stop = stop_check(model, worker)
        values_R[mine] = row_values(scorer, model, rows, mine, forward, check_stop)
    except Interrupted:
        stopped = True
    total_R = torch.from_numpy(values_R).to(worker.device)
    return sum_unless_stopped(total_R, stopped, worker).cpu().numpy()


@torch.no_grad()
def row_values(
    scorer: Scorer,
    model: nn.Module,
    rows: Rows,
    chosen: Indices,
    forward: Forward,
    before_batch: Callable[[], None],
) -> NDArray[np.float64]:
    """Return one number for each chosen row (R,), in evaluation mode, without other workers unless
    they share the model.

    `before_batch`: called before each micro-batch; what it raises ends the call.
    """
    model.eval()
    values = np.zeros(len(rows))
    batches = micro_batches(
        chosen, rows.lengths, capacity=0, max_tokens=forward.max_tokens, pack=False
    )
    for micro_batch, is_own in in_step(model, batches, spare_batch(batches, rows)):
        before_batch()
        values_R = scorer(model, rows, micro_batch.rows, forward)
        if is_own:
            values[micro_batch.rows] = values_R.double().cpu().numpy()
    reshard(model)
    return values[chosen]
