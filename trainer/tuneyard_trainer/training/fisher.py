"""The diagonal Fisher information of a model's trained parameters, for EWC.

F_i is the mean, over the target tokens of a sample of general rows, of the squared derivative of a
token's log-probability by parameter i. The tokens are drawn from the model's own distribution, as
the definition asks (with the tokens of the data it would be the empirical Fisher; Kunstner et al.
2019, arXiv:1905.12558). The tokens of a row are drawn independently given the row, so that the
expected square of a row's summed gradient is the sum over its tokens: one backward pass a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.models import layers
from tuneyard_trainer.storage.digests import sha256_of
from tuneyard_trainer.storage.files import disk_error, write_atomically
from tuneyard_trainer.training.batches import Indices, MicroBatch
from tuneyard_trainer.training.losses import Forward, sum_unless_stopped
from tuneyard_trainer.training.seeds import FISHER_LABELS, FISHER_ROWS, derive_seed, row_generator
from tuneyard_trainer.worker import Worker

FILE = "fisher.safetensors"
DIGEST = "fisher.json"
"""The file's hash. It is written last: without it the file is not complete."""


def stored_fisher(
    folder: Path,
    model: nn.Module,
    rows: Rows,
    forward: Forward,
    samples: int,
    seed: int,
    worker: Worker,
) -> dict[str, Tensor]:
    """Return the Fisher information at the model's present weights, by the parameters' names.

    It is read from `folder` if an earlier attempt has stored it there; otherwise it is computed,
    by all workers together, and stored. Raises Interrupted and StageError.
    """
    if (found := _read(folder, model, worker)) is not None:
        return found
    worker.report(message="estimating the Fisher information")
    chosen = row_generator(seed, FISHER_ROWS, 0).permutation(len(rows))[:samples]
    fisher = fisher_information(model, rows, chosen, forward, seed, worker)
    if worker.is_main:
        with worker.owned():
            _write(folder, fisher)
        worker.persist(folder)
    return fisher


def fisher_information(
    model: nn.Module, rows: Rows, chosen: Indices, forward: Forward, seed: int, worker: Worker
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information per target token, over the chosen rows, in float32.

    The workers share the rows and all of them return the same. Raises Interrupted on all workers if
    any of them is asked to stop.
    """
    parameters = layers.trainable(model)
    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    model.eval()
    stopped = False
    for row in chosen[worker.rank :: worker.world_size].tolist():
        if stopped := worker.stop():
            break
        random = torch.Generator(worker.device)
        random.manual_seed(derive_seed(seed, FISHER_LABELS, row))
        alone = MicroBatch(((row,),), int(rows.lengths[row]))
        logits_NV, _ = forward.target_logits(model, rows, alone)
        probabilities_NV = logits_NV.detach().softmax(-1)
        drawn_N = torch.multinomial(probabilities_NV, 1, generator=random)[:, 0]
        F.cross_entropy(logits_NV, drawn_N, reduction="sum").backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                fisher[name] += parameter.grad.float() ** 2
                parameter.grad = None
    sum_unless_stopped(torch.zeros(1, device=worker.device), stopped, worker)
    targets = int(rows.targets[chosen].sum())
    for tensor in fisher.values():
        if worker.world_size > 1:
            dist.all_reduce(tensor)
        tensor /= targets
    return fisher


def _write(folder: Path, fisher: dict[str, Tensor]) -> None:
    """Raises StageError DiskFull or WriteFailed."""
    (folder / DIGEST).unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(fisher, folder / FILE)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, folder) from error
    digest = {"sha256": sha256_of(folder / FILE)}
    write_atomically(folder / DIGEST, json.dumps(digest).encode())


def _read(folder: Path, model: nn.Module, worker: Worker) -> dict[str, Tensor] | None:
    """Return what an earlier attempt stored, the same on all workers; None: there is nothing, or it
    is damaged."""
    is_whole = torch.tensor(float(worker.is_main and _is_whole(folder)), device=worker.device)
    if worker.world_size > 1:
        dist.broadcast(is_whole, src=0)
    if not is_whole:
        return None
    stored: Mapping[str, Tensor] = load_file(folder / FILE)
    return {name: stored[name].to(p.device) for name, p in layers.trainable(model).items()}


def _is_whole(folder: Path) -> bool:
    try:
        expected = json.loads((folder / DIGEST).read_text())["sha256"]
        return bool(sha256_of(folder / FILE) == expected)
    except (OSError, ValueError, KeyError, TypeError):
        return False
