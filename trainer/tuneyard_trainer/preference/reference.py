"""Log-probabilities under the reference model: computed once before training, cached by content.

A stage's reference is the model that it starts from. Before the first step the loaded model is the
reference, so no second model is ever in memory. The cache key is a digest of that model's weights
and of the rows: a resumed run, or one with other settings, reads the cached numbers, and a run with
another model or other rows computes its own.

Shapes: R rows.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Rows, RowWriter
from tuneyard_trainer.models.sharding import is_sharded, whole
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.micro_batches import evaluate_rows, logprobs
from tuneyard_trainer.storage.files import disk_error
from tuneyard_trainer.training.batches import Indices
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

FOLDER = "reference"
MISMATCHED = "mismatched"


# ---- log-probabilities --------------------------------------------------------------------------


def model_digest(model: nn.Module) -> str:
    """Return the digest of every weight and buffer, by name. It takes seconds for billions of
    parameters. Workers that share a model call it together, and gather one tensor at a time."""
    content = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole_tensor = whole(tensor) if is_sharded(tensor) else tensor.detach()
        flat = whole_tensor.contiguous().reshape(-1).view(torch.uint8)
        content.update(flat.cpu().numpy().tobytes())
    return content.hexdigest()


def reference_logprobs(
    model: nn.Module, model_key: str, rows: Rows, forward: Forward, workdir: Path, worker: Worker
) -> NDArray[np.float64]:
    """Return the log-probability of each row's targets (R,) under the model of digest `model_key`.

    Cached numbers are read, even if the model has changed since the digest was taken. Otherwise
    they are computed with `model` and written. Raises StageError DiskFull.
    """
    file = workdir / FOLDER / f"{_key(model_key, rows, forward)}.npy"
    cached = _read(file, len(rows)) if worker.is_main else None
    if _agreed(cached is not None, worker):
        return _shared(cached, len(rows), worker)
    values = evaluate_rows(logprobs, model, rows, forward, worker)
    if worker.is_main:
        _write(file, values)
        worker.persist(file.parent)
    return values


def _key(model_key: str, rows: Rows, forward: Forward) -> str:
    content = hashlib.blake2b(f"{model_key} {forward.precision}".encode(), digest_size=16)
    for array in (rows.tokens, rows.flat_mask, rows.offsets):
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def _read(file: Path, count: int) -> NDArray[np.float64] | None:
    """Return the cached numbers; None if the file is missing or a killed run truncated it."""
    try:
        values: NDArray[np.float64] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == (count,) and values.dtype == np.float64 else None


def _write(file: Path, values: NDArray[np.float64]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npy")
        np.save(partial, values)
        partial.rename(file)
    except OSError as error:
        raise disk_error(error, file) from error


def _agreed(cached: bool, worker: Worker) -> bool:
    """Return rank 0's value on every rank."""
    if worker.world_size == 1:
        return cached
    value = torch.tensor(float(cached), device=worker.device)
    dist.broadcast(value, src=0)
    return bool(value)


def _shared(cached: NDArray[np.float64] | None, count: int, worker: Worker) -> NDArray[np.float64]:
    """Return rank 0's numbers on every rank."""
    values = np.zeros(count) if cached is None else cached
    if worker.world_size == 1:
        return values
    tensor = torch.from_numpy(values).to(worker.device)
    dist.broadcast(tensor, src=0)
    return np.asarray(tensor.cpu().numpy())


# ---- log-ratios ---------------------------------------------------------------------------------


class ReferencedRows(NamedTuple):
    """Rows with their log-probabilities under the reference."""

    rows: Rows
    reference: NDArray[np.float64]
    """(R,)"""

    def log_ratios(self, model: nn.Module, chosen: Indices, forward: Forward) -> Tensor:
        """Return log pi(y|x) - log ref(y|x) of the chosen rows, from one forward pass with
        gradients."""
        logprobs_R = logprobs(model, self.rows, chosen, forward)
        return logprobs_R - torch.from_numpy(self.reference[chosen]).to(logprobs_R)

    def all_log_ratios(
        self, model: nn.Module, forward: Forward, worker: Worker
    ) -> NDArray[np.float64]:
        """Return log pi(y|x) - log ref(y|x) of all rows (R,), over all workers."""
        return evaluate_rows(logprobs, model, self.rows, forward, worker) - self.reference


class ReferencedPreferences(NamedTuple):
    """The rows of a `Preferences` with their log-probabilities under the reference."""

    train: ReferencedRows
    validation: ReferencedRows | None
    """None: nothing is held out."""
    mismatched: ReferencedRows | None
    """For KTO: each training row's prompt with a completion of another prompt."""

    @classmethod
    def of(
        cls,
        data: Preferences,
        model: nn.Module,
        forward: Forward,
        workdir: Path,
        worker: Worker,
        *,
        mismatched: bool,
    ) -> ReferencedPreferences:
        """Return the rows with their log-probabilities under the present weights of `model`."""
        others = mismatched_rows(data, workdir, worker) if mismatched else None
        key = model_digest(model)

        def referenced(rows: Rows) -> ReferencedRows:
            return ReferencedRows(
                rows, reference_logprobs(model, key, rows, forward, workdir, worker)
            )

        held_out = data.validation
        return cls(
            referenced(data.train.rows),
            referenced(held_out.rows) if held_out else None,
            referenced(others) if others else None,
        )


def mismatched_rows(data: Preferences, workdir: Path, worker: Worker) -> Rows:
    """Write each training row's prompt with the completion of a row with another prompt.

    The completion is truncated so that no row is longer than the longest one of `data`. The KL on
    these rows measures the policy on completions that do not belong to their prompts. TRL pairs the
    rows of a batch instead, also two rows of one prompt.
    """
    rows = data.train.rows
    folder = workdir / MISMATCHED / str(worker.rank)
    folder.mkdir(parents=True, exist_ok=True)
    if worker.is_main:  # what an attempt with more workers left, which nobody reads
        for left in folder.parent.iterdir():
            if int(left.name) >= worker.world_size:
                shutil.rmtree(left, ignore_errors=True)
    starts = [_completion_start(rows, row) for row in range(len(rows))]
    others = rows_of_other_prompts(
        [_prompt_digest(rows, row, starts[row]) for row in range(len(rows))]
    )
    with RowWriter(folder, "train") as writer:
        for row, other in enumerate(others):
            prompt = rows.ids(row)[: starts[row]]
            completion = rows.ids(other)[starts[other] :]
            completion = completion[: max(1, data.max_length - len(prompt))]
            mask = np.concatenate([np.zeros(len(prompt)), np.ones(len(completion))])
            writer.append(np.concatenate([prompt, completion]), mask.astype(np.uint8), 0)
    mismatched = Rows.open(folder, "train")
    if mismatched is None:
        raise TypeError("no rows to mismatch")
    return mismatched


def rows_of_other_prompts(prompts: Sequence[bytes]) -> list[int]:
    """Return for each row the index of a row with another prompt (N,). `prompts`: a digest of each
    row's prompt.

    The rows are ordered by the first occurrence of their prompt. A prompt's rows take the rows
    after its last one in turn, and the first row follows the last one: where all prompts have
    equally many rows, every row is taken once. Raises StageError TooFewRows if there is one prompt
    only.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(row)
    if len(by_prompt) < 2:
        raise StageError(
            "TooFewRows",
            f"KTO compares each prompt with completions of other prompts, and all {len(prompts)} "
            "training rows have the same prompt.",
            advice="Add rows with other prompts to spec.preferences.",
        )
    order = [row for rows in by_prompt.values() for row in rows]
    others = [0] * len(order)
    end = 0
    for rows in by_prompt.values():
        end += len(rows)
        for place, row in enumerate(rows):
            others[row] = order[(end + place % (len(order) - len(rows))) % len(order)]
    return others


def _prompt_digest(rows: Rows, row: int, start: int) -> bytes:
    """Return a digest of a row's tokens before `start`: the prompts of a large data set do not fit
    in memory, once on every worker."""
    return hashlib.blake2b(rows.ids(row)[:start].tobytes(), digest_size=16).digest()


def _completion_start(rows: Rows, row: int) -> int:
    return int(np.argmax(rows.mask(row)))
