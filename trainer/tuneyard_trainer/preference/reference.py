"""The reference's log-probabilities: computed once before training, kept by content.

A stage's reference is the model that it starts from, so before the first step the model at hand is
the reference, whatever was trained of it: no second model is ever in memory. The numbers are kept
under a digest of that model's weights and of the rows, so that a resumed run, or one with other
settings, finds them again, and one with another model or other rows never does.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from tuneyard.api.stage_settings import DpoSettings
from tuneyard_trainer.data.prepared import Rows, RowWriter
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.micro_batches import logprobs, over_all
from tuneyard_trainer.storage.files import disk_error
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker

FOLDER = "reference"


def model_digest(model: nn.Module) -> str:
    """Of every weight and buffer, by name; some seconds for a model of billions."""
    content = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        content.update(flat.cpu().numpy().tobytes())
    return content.hexdigest()


def reference_logprobs(
    model: nn.Module, model_key: str, rows: Rows, forward: Forward, workdir: Path, worker: Worker
) -> NDArray[np.float64]:
    """(R,) the log-probability of each row's targets under the model as it is now. `model_key`: its
    digest, taken before anything was trained; where the numbers of that model are on disk, they are
    read, and the model may have changed."""
    file = workdir / FOLDER / f"{_key(model_key, rows, forward)}.npy"
    known = _read(file, len(rows)) if worker.is_main else None
    if _agreed(known is not None, worker):
        return _shared(known, len(rows), worker)
    found = over_all(logprobs, model, rows, forward, worker)
    if worker.is_main:
        _write(file, found)
        worker.persist(file.parent)
    return found


def _key(model_key: str, rows: Rows, forward: Forward) -> str:
    content = hashlib.blake2b(f"{model_key} {forward.precision}".encode(), digest_size=16)
    for array in (rows.tokens, rows.flat_mask, rows.offsets):
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


def _read(file: Path, count: int) -> NDArray[np.float64] | None:
    """None where there are none, or the file of a killed run is cut off."""
    try:
        found: NDArray[np.float64] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (count,) and found.dtype == np.float64 else None


def _write(file: Path, found: NDArray[np.float64]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npy")
        np.save(partial, found)
        partial.rename(file)
    except OSError as error:
        raise disk_error(error, file) from error


def _agreed(known: bool, worker: Worker) -> bool:
    """Rank 0's word."""
    if worker.world_size == 1:
        return known
    word = torch.tensor(float(known), device=worker.device)
    dist.broadcast(word, src=0)
    return bool(word)


def _shared(known: NDArray[np.float64] | None, count: int, worker: Worker) -> NDArray[np.float64]:
    """Rank 0's numbers, on every rank."""
    values = np.zeros(count) if known is None else known
    if worker.world_size == 1:
        return values
    tensor = torch.from_numpy(values).to(worker.device)
    dist.broadcast(tensor, src=0)
    return np.asarray(tensor.cpu().numpy())


MISMATCHED = "mismatched"


class ReferencedGroups(NamedTuple):
    """Groups, and what the reference gives to their rows."""

    groups: Comparisons
    reference: NDArray[np.float64]
    """(R,)"""


class ReferencedPreferences(NamedTuple):
    """What is learnt from, measured by the reference."""

    train: ReferencedGroups
    validation: ReferencedGroups | None
    mismatched: Rows | None
    """For KTO: each training row's prompt with another row's answer."""
    mismatched_reference: NDArray[np.float64] | None

    @classmethod
    def of(
        cls,
        settings: DpoSettings,
        data: Preferences,
        model: nn.Module,
        forward: Forward,
        workdir: Path,
        worker: Worker,
    ) -> ReferencedPreferences:
        key = model_digest(model)

        def measured(rows: Rows) -> NDArray[np.float64]:
            return reference_logprobs(model, key, rows, forward, workdir, worker)

        held_out = data.validation
        mismatched = _mismatched(data, workdir, worker) if settings.loss == "kto" else None
        return cls(
            ReferencedGroups(data.train, measured(data.train.rows)),
            ReferencedGroups(held_out, measured(held_out.rows)) if held_out else None,
            mismatched,
            measured(mismatched) if mismatched else None,
        )


def validation_of(learnt: ReferencedPreferences) -> ReferencedGroups:
    if learnt.validation is None:
        raise ValueError("nothing is held out")
    return learnt.validation


def _mismatched(data: Preferences, workdir: Path, worker: Worker) -> Rows:
    """Each training row's prompt with the next row's answer (cut to the longest row), as TRL pairs
    them: what the policy gives to answers that are not to the point."""
    rows = data.train.rows
    folder = workdir / MISMATCHED / str(worker.rank)
    folder.mkdir(parents=True, exist_ok=True)
    with RowWriter(folder, "train") as writer:
        for row in range(len(rows)):
            other = (row + 1) % len(rows)
            prompt = rows.ids(row)[: _answer_start(rows, row)]
            answer = rows.ids(other)[_answer_start(rows, other) :]
            answer = answer[: max(1, data.max_length - len(prompt))]
            mask = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer))])
            writer.append(np.concatenate([prompt, answer]), mask.astype(np.uint8), 0)
    found = Rows.open(folder, "train")
    if found is None:
        raise TypeError("no rows to mismatch")
    return found


def _answer_start(rows: Rows, row: int) -> int:
    return int(np.argmax(rows.mask(row)))
