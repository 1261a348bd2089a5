"""Training checkpoints: the trained tensors, the optimizer's moments and the loop's position.

A checkpoint is a folder `step-00000120` that appears whole or not at all. It holds
`weights.safetensors` (trained parameters by name), `optimizer.safetensors` (`name/exp_avg` and
`name/exp_avg_sq`) and `state.json`. There is no random state to save: the data order and dropout
are functions of seed and step. No pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuneyard.errors import StageError
from tuneyard_trainer.storage.files import disk_error

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class LoopState:
    """Where the loop stands after `step` optimizer steps."""

    step: int = 0
    tokens: int = 0
    """Tokens trained on so far, padding excluded."""
    seconds: float = 0.0
    """Time spent training so far, over all attempts."""
    best_step: int | None = None
    """The evaluated step with the lowest held-out loss; None: none evaluated."""
    best_loss: float | None = None
    """Its held-out loss."""
    stale: int = 0
    """Evaluations in a row without improvement."""

    def optimizer_age(self) -> int:
        """How often the optimizer has stepped: AdamW's bias correction needs it."""
        return self.step


class Checkpoints:
    """The checkpoints of one training stage. Rank 0 writes, in the background; all ranks read."""

    def __init__(
        self,
        folder: Path,
        persist: Callable[[Path], None],
        state_type: type[LoopState] = LoopState,
    ) -> None:
        self.folder, self._persist, self._state_type = folder, persist, state_type
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self, state: LoopState, parameters: Parameters, optimizer: torch.optim.Optimizer
    ) -> None:
        """Snapshots now and writes in the background; waits for the previous write first.

        Raises StageError DiskFull or CheckpointFailed if that one failed.
        """
        self.wait()
        weights = {name: _snapshot(p) for name, p in parameters.items()}
        moments = {
            f"{name}/{key}": _snapshot(value)
            for name, p in parameters.items()
            for key, value in optimizer.state[p].items()
            if key != "step"
        }
        self._pending = self._writer.submit(self._write, state, weights, moments)

    def wait(self) -> None:
        """Returns once everything saved is on disk."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (OSError, SafetensorError) as error:
            raise disk_error(error, self.folder) from error

    def latest(self) -> LoopState | None:
        """The newest complete checkpoint's state; None: there is none."""
        steps = sorted(self.folder.glob("step-????????/state.json"))
        return self._state_type(**json.loads(steps[-1].read_text())) if steps else None

    def weights(self, step: int) -> dict[str, Tensor]:
        """The trained tensors of a checkpoint, on the CPU."""
        return load_file(self._at(step) / "weights.safetensors")

    def restore(
        self, state: LoopState, parameters: Parameters, optimizer: torch.optim.Optimizer
    ) -> None:
        """Puts a checkpoint's tensors back into the parameters and a fresh optimizer, in place."""
        assign(self.weights(state.step), parameters)
        moments = load_file(self._at(state.step) / "optimizer.safetensors")
        for name, parameter in parameters.items():
            if f"{name}/exp_avg" not in moments:  # it never had a gradient
                continue
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.optimizer_age())),
                "exp_avg": moments[f"{name}/exp_avg"].to(parameter.device),
                "exp_avg_sq": moments[f"{name}/exp_avg_sq"].to(parameter.device),
            }

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _write(
        self, state: LoopState, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        final = self._at(state.step)
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights, partial / "weights.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2))
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._prune(keep={state.step, state.best_step})
        self._persist(self.folder)

    def _prune(self, keep: set[int | None]) -> None:
        """Only the newest and the best are ever read again."""
        for folder in self.folder.glob("step-*"):
            if folder.suffix == ".partial" or int(folder.name.removeprefix("step-")) not in keep:
                shutil.rmtree(folder)


def assign(tensors: Mapping[str, Tensor], parameters: Parameters) -> None:
    """Copies tensors into the parameters of the same names; raises StageError if any is missing."""
    missing = sorted(set(parameters) ^ set(tensors))
    if missing:
        raise StageError(
            "CheckpointMismatch",
            f"a checkpoint does not fit the model: {missing[0]} and {len(missing) - 1} other "
            "tensors are in only one of them.",
            advice="Delete the output folder to start afresh.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _flush(folder: Path) -> None:
    """Forces a folder's files to the disk, so that the rename never outruns them."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
