"""Rows through a model: what a policy gives each answer, what a reward model gives each row.

Shapes: R rows, B bins of a pass, L their width, N target positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.models.base import autocast
from tuneyard_trainer.models.layers import head_at
from tuneyard_trainer.models.probes import base_of
from tuneyard_trainer.preference.dataset import Comparisons
from tuneyard_trainer.training.batches import IGNORE, Indices, MicroBatch, passes, share
from tuneyard_trainer.training.losses import Forward, collate
from tuneyard_trainer.worker import Worker

ANY = 1 << 62
"""No limit: the caller has chosen what goes into one pass."""

RowsToScores = Callable[[nn.Module, Rows, Indices, Forward], Tensor]
"""(R,) a number for each chosen row, in one pass."""


def logprobs(model: nn.Module, rows: Rows, chosen: Indices, forward: Forward) -> Tensor:
    """(R,) the log-probability of each row's targets given what is before them, summed, in float32.
    One pass. The head sees the answers alone: prompts are most of a pair's tokens."""
    layout, order = _one_pass(rows, chosen, forward)
    batch = collate(rows, layout, pad=forward.pad, packed=forward.pack, device=forward.device)
    bins_N, columns_N = torch.nonzero(batch.labels_BL != IGNORE, as_tuple=True)
    if forward.pack:
        context: dict[str, Any] = {"position_ids": batch.positions_BL}
    else:
        context = {"attention_mask": batch.attention_BL}
    with (
        autocast(forward.device, forward.precision),
        head_at(model, bins_N, columns_N, layout.width),
    ):
        logits_NV = model(input_ids=batch.ids_BL, use_cache=False, **context).logits[0]
    labels_N = batch.labels_BL[bins_N, columns_N]
    found_N = -F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
    # Positions come bin by bin and, in a bin, row by row.
    owners_N = np.repeat(order, rows.targets[chosen[order]])
    return torch.zeros(len(chosen), device=forward.device).index_add(
        0, torch.from_numpy(owners_N).to(forward.device), found_N
    )


def scores(model: nn.Module, rows: Rows, chosen: Indices, forward: Forward) -> Tensor:
    """(R,) what a sequence classifier's head `score` says at each row's last token, in float32. One
    pass; rows are never packed."""
    layout, order = _one_pass(rows, chosen, forward)
    batch = collate(rows, layout, pad=forward.pad, packed=False, device=forward.device)
    base = base_of(model)
    trunk = getattr(base, base.base_model_prefix)
    last_R = torch.from_numpy(rows.lengths[chosen[order]] - 1).to(forward.device)
    with autocast(forward.device, forward.precision):
        hidden_BLH = trunk(
            input_ids=batch.ids_BL, attention_mask=batch.attention_BL, use_cache=False
        )[0]
        bins_R = torch.arange(len(order), device=forward.device)
        found_R = base.score(hidden_BLH[bins_R, last_R])[:, 0].float()
    return torch.zeros_like(found_R).index_copy(
        0, torch.from_numpy(order).to(forward.device), found_R
    )


def _one_pass(rows: Rows, chosen: Indices, forward: Forward) -> tuple[MicroBatch, Indices]:
    """The rows in one pass, and their places in `chosen` in the order of the pass: a row may be
    there twice."""
    (local,) = passes(
        np.arange(len(chosen)),
        rows.lengths[chosen],
        capacity=forward.capacity,
        max_tokens=ANY,
        pack=forward.pack,
    )
    order = np.array([i for members in local.bins for i in members], dtype=np.int64)
    bins = tuple(tuple(int(chosen[i]) for i in members) for members in local.bins)
    return MicroBatch(bins, local.width), order


def chunks(comparisons: Comparisons, groups: Indices, max_tokens: int) -> Iterator[Indices]:
    """The groups that go through the model together, longest rows first: at most `max_tokens` with
    padding, but always at least one group."""
    rows = comparisons.rows
    longest = np.maximum.reduceat(rows.lengths, comparisons.groups[:-1])
    chunk: list[int] = []
    num_rows = width = 0
    for group in sorted((int(g) for g in groups), key=lambda g: (-longest[g], g)):
        size = int(comparisons.sizes[group])
        if chunk and (num_rows + size) * width > max_tokens:
            yield np.array(chunk, dtype=np.int64)
            chunk, num_rows = [], 0
        if not chunk:
            width = int(longest[group])
        chunk.append(group)
        num_rows += size
    if chunk:
        yield np.array(chunk, dtype=np.int64)


@torch.no_grad()
def over_all(
    measure: RowsToScores, model: nn.Module, rows: Rows, forward: Forward, worker: Worker
) -> NDArray[np.float64]:
    """(R,) a number for every row, in evaluation mode; every worker measures its share and knows
    all of them."""
    model.eval()
    found_R = torch.zeros(len(rows), dtype=torch.float64, device=worker.device)
    mine = share(np.arange(len(rows)), rows.lengths, worker.rank, worker.world_size)
    layouts = passes(mine, rows.lengths, capacity=0, max_tokens=forward.max_tokens, pack=False)
    for layout in layouts:
        chosen = np.array([row for members in layout.bins for row in members], dtype=np.int64)
        places = torch.from_numpy(chosen).to(worker.device)
        found_R[places] = measure(model, rows, chosen, forward).double()
    if worker.world_size > 1:
        dist.all_reduce(found_R)
    return found_R.cpu().numpy()
