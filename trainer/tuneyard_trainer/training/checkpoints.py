"""Training checkpoints: the trained tensors, the optimizer's moments and the loop's position.

A checkpoint is a folder `step-00000120`, written atomically. It holds `weights.safetensors`
(trained parameters by name), `optimizer.safetensors` (`name/exp_avg` and `name/exp_avg_sq`), the
state in `state.json` and `added.json` (fields that trainers of 0.2 refuse), and the other files'
hashes in `digests.json`; no pickle. There is no random state to save, since the data order and
dropout are functions of seed and step. The newest checkpoint and the one before it are kept, so
that a damaged one costs an interval of training and no more.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuneyard.errors import StageError
from tuneyard_trainer.data import sharing
from tuneyard_trainer.models.gathering import write_tensors
from tuneyard_trainer.models.sharding import from_main, is_sharded, like, whole
from tuneyard_trainer.storage.digests import sha256_of
from tuneyard_trainer.storage.files import disk_error
from tuneyard_trainer.training.history import METRICS
from tuneyard_trainer.worker import StageContext

CHECKPOINT_SECONDS = 600.0
"""Time between two checkpoints if the job sets no interval in steps."""

FOLDER = "checkpoints"
"""The folder of the checkpoints, in the stage's work folder."""

STATE = ("state.json", "added.json")
DIGESTS = "digests.json"
ADDED = MappingProxyType({"since": "0.3"})
"""The metadata of a field that is in `added.json`, which trainers of 0.2 do not read."""

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class LoopState:
    """The position of a training loop after `step` optimizer steps."""

    step: int = 0
    tokens: int = 0
    """Tokens trained on so far, without padding."""
    seconds: float = 0.0
    """Training time so far, over all attempts."""
    best_step: int | None = None
    """The step of the best evaluation; None: none yet. With a guard and without held-out rows: the
    last one within the guard's bound."""
    best_loss: float | None = None
    """Its held-out loss, or its value of `bestBy`, negated if the highest is the best."""
    stale: int = 0
    """Evaluations in a row without an improvement that early stopping counts."""
    patience_loss: float | None = field(default=None, metadata=ADDED)
    """The `best_loss` of the last improvement that early stopping counted; None: it is `best_loss`,
    as it always is without `minDelta` and a guard."""
    unmeasured: bool = field(default=False, metadata=ADDED)
    """Whether the evaluation after `step` is due and was left out for a stop request: a resumed run
    begins with it."""
    beyond_guard: int = field(default=0, metadata=ADDED)
    """Evaluations in a row beyond the bound of the guard."""
    base_general_loss: float | None = field(default=None, metadata=ADDED)
    """The loss of the guard's rows before training. None: there is no guard."""

    def optimizer_age(self) -> int:
        """Return the number of optimizer steps, which AdamW's bias correction needs."""
        return self.step


State = TypeVar("State", bound=LoopState)


class Checkpoints(Generic[State]):
    """The checkpoints of one training stage. Rank 0 writes, in the background; all ranks read."""

    def __init__(
        self,
        context: StageContext,
        state_type: type[State],
        parameters: Parameters,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.folder = context.workdir / FOLDER
        self._history = context.workdir / METRICS
        self._worker, self._every = context.worker, context.stage.runtime.checkpoint_steps
        self._state_type, self._parameters, self._optimizer = state_type, parameters, optimizer
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved: State | None = None
        """The state of the newest complete checkpoint."""
        self._former: State | None = None
        """The state of the one before it, on rank 0."""
        self._saved_at = time.monotonic()
        self._group: Any = None
        if context.worker.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=sharing.PATIENCE)

    def due(self, step: int, total: int) -> bool:
        """Return whether to save after `step`. Without an interval in steps, ranks may disagree;
        only the answer on rank 0 matters, since only rank 0 writes."""
        if step == total:
            return False
        if self._every is not None:
            return step % self._every == 0
        return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS

    def save(self, state: State) -> None:
        """Copy the tensors and write them in the background, on rank 0; other ranks do nothing.

        Waits for the previous write. Raises StageError DiskFull or WriteFailed if that write
        failed. Tensors that are sharded are gathered one after the other, by all ranks, while rank
        0 writes them, and all wait until they are durable: for a large model that takes longer than
        a worker may wait for the others in a step.
        """
        if any(map(is_sharded, self._parameters.values())):
            self._save_sharded(state)
        elif self._worker.is_main:
            self.wait()
            weights = {name: whole(tensor) for name, tensor in self._parameters.items()}
            moments = {name: whole(tensor) for name, tensor in self._moments()}
            write = partial(_save_files, weights, moments)
            self._pending = self._writer.submit(self._write, state, write)
        self._saved_at = time.monotonic()

    def _save_sharded(self, state: State) -> None:
        moments = dict(self._moments())
        if self._worker.is_main:
            try:
                self._write(state, partial(_gather_files, self._parameters, moments))
            except OSError as error:
                raise disk_error(error, self.folder) from error
        else:
            write_tensors(None, self._parameters)
            write_tensors(None, moments)
        if self._group is not None:
            dist.barrier(self._group)

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield AdamW's moments by `name/key`, in an order that is the same on every rank."""
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                if key != "step":
                    yield f"{name}/{key}", value

    def wait(self) -> None:
        """Wait until everything saved is on disk. Raises StageError as `save` does, and
        StaleAttempt if a newer attempt has taken over, even if nothing was saved."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except (OSError, SafetensorError) as error:
            raise disk_error(error, self.folder) from error
        if self._worker.is_main:  # after the write, which holds the claim's lock itself
            with self._worker.owned():
                pass

    def resume(self) -> State | None:
        """Load the newest undamaged checkpoint into the parameters and the optimizer, in place.

        Returns its state; None: there is no checkpoint.
        """
        step = self._newest()
        if step is None:
            return None
        state = self._saved = self._state(step)
        assign(self._at(state.step) / "weights.safetensors", self._parameters)
        with safe_open(self._at(state.step) / "optimizer.safetensors", framework="pt") as moments:
            names = set(moments.keys())
            for name, parameter in self._parameters.items():
                if f"{name}/exp_avg" not in names:  # the parameter never had a gradient
                    continue
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.optimizer_age())),
                    "exp_avg": like(moments.get_tensor(f"{name}/exp_avg"), parameter),
                    "exp_avg_sq": like(moments.get_tensor(f"{name}/exp_avg_sq"), parameter),
                }
        self._saved_at = time.monotonic()
        return state

    def _newest(self) -> int | None:
        """Return the step of the newest undamaged checkpoint, the same on every rank; None: there
        is none."""
        step = torch.zeros(1, dtype=torch.int64)
        if self._worker.is_main:  # reads all of a checkpoint, which the others wait for
            folders = self._complete()
            steps = map(_step_of, folders)
            step[0] = next((each for each in steps if self._is_whole(each)), -1)
            self._former = self._readable(next(steps, None))
            if folders and step < 0:
                message = "no checkpoint is undamaged; training starts again"
                self._worker.report(message=message)
        if self._group is not None:
            dist.broadcast(step, src=0, group=self._group)
        return int(step) if step >= 0 else None

    def _is_whole(self, step: int) -> bool:
        """Return whether the checkpoint and its best weights are undamaged; report one that is not.

        Of a checkpoint of 0.2, which has no hashes, only the sizes in the tensors' headers are
        compared.
        """
        try:
            best = self._state(step).best_step
            _check(self._at(step), ("weights.safetensors", "optimizer.safetensors", *STATE))
            if best not in (None, step):
                _check(self._at(best), ("weights.safetensors",))
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            self._worker.report(message=f"the checkpoint of step {step} is damaged: {error}")
            return False
        return True

    def _readable(self, step: int | None) -> State | None:
        """Return the state of a checkpoint; None: there is none, or it cannot be read."""
        try:
            return None if step is None else self._state(step)
        except (OSError, ValueError, TypeError):
            return None

    def _state(self, step: int) -> State:
        values: dict[str, Any] = {}
        for name in STATE:
            path = self._at(step) / name
            values |= json.loads(path.read_text()) if path.exists() else {}
        return self._state_type(**values)

    def restore_best(self, state: State) -> None:
        """Load the weights of the best step unless `state` is at that step. Only on rank 0, which
        writes the result and may be the only one that has the file; of sharded weights, all ranks
        get their parts from it."""
        if state.best_step in (None, state.step):
            return
        file = self._at(state.best_step) / "weights.safetensors"
        if any(map(is_sharded, self._parameters.values())):
            scatter(file if self._worker.is_main else None, self._parameters)
        elif self._worker.is_main:
            assign(file, self._parameters)

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _write(self, state: State, write: Callable[[Path], None]) -> None:
        """Write a checkpoint. `write` writes the tensors' files into a folder."""
        final = self._at(state.step)
        with self._worker.owned():  # what a killed run left needs space
            self._remove_partial()
        # Not the same name as in another attempt, which may be writing the same step.
        folder = final.with_suffix(f".{uuid.uuid4().hex}.partial")
        folder.mkdir(parents=True)
        write(folder)
        _write_state(state, folder)
        digests = {path.name: sha256_of(path) for path in folder.iterdir()}
        (folder / DIGESTS).write_text(json.dumps(digests, indent=2))
        _flush(folder)
        # A late evaluation writes the newest checkpoint again.
        is_again = self._saved is not None and self._saved.step == state.step
        former = self._former if is_again else self._saved
        kept = [each for each in (former, state) if each is not None]
        with self._worker.owned():
            shutil.rmtree(final, ignore_errors=True)
            folder.rename(final)
            self._prune(keep={step for each in kept for step in (each.step, each.best_step)})
        self._former, self._saved = former, state
        if self._history.exists():  # first: a resumed run reads the metrics up to its checkpoint
            self._worker.persist(self._history)
        self._worker.persist(self.folder)

    def _remove_partial(self) -> None:
        """Delete what unfinished writes left."""
        for folder in self.folder.glob("step-*.partial"):
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, keep: set[int | None]) -> None:
        """Delete every other checkpoint: none of them is read again."""
        self._remove_partial()
        for folder in self._complete():
            if _step_of(folder) not in keep:
                shutil.rmtree(folder)

    def _complete(self) -> list[Path]:
        """Return the folders of the checkpoints, the newest first."""
        return sorted(self.folder.glob("step-????????"), reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def assign(file: Path, parameters: Parameters) -> None:
    """Copy the tensors of a file into the parameters of the same names, one after the other. Raises
    StageError CheckpointMismatch if the names differ."""
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        missing = sorted(set(parameters) ^ set(tensors.keys()))
        if missing:
            raise StageError(
                "CheckpointMismatch",
                f"a checkpoint does not match the model: {len(missing)} tensors are in only one of "
                f"them, the first is {missing[0]}.",
                advice="Delete the output folder to start from the beginning.",
            )
        for name, parameter in parameters.items():
            parameter.copy_(like(tensors.get_tensor(name), parameter))


def scatter(file: Path | None, parameters: Parameters) -> None:
    """Copy the tensors of rank 0's file into the parameters of all ranks. `file`: None on other
    ranks."""
    with ExitStack() as stack, torch.no_grad():
        tensors = stack.enter_context(safe_open(file, framework="pt")) if file else None
        for name, parameter in parameters.items():
            tensor = tensors.get_tensor(name) if tensors else torch.empty(parameter.shape)
            parameter.copy_(from_main(tensor.to(parameter.dtype), parameter))


def _save_files(weights: dict[str, Tensor], moments: dict[str, Tensor], folder: Path) -> None:
    save_file(weights, folder / "weights.safetensors")
    save_file(moments, folder / "optimizer.safetensors")


def _gather_files(weights: Parameters, moments: Mapping[str, Tensor], folder: Path) -> None:
    write_tensors(folder / "weights.safetensors", weights)
    write_tensors(folder / "optimizer.safetensors", moments)


def _write_state(state: LoopState, folder: Path) -> None:
    """Write the files of a state."""
    values = asdict(state)
    added = {each.name: values.pop(each.name) for each in fields(state) if each.metadata == ADDED}
    for name, part in zip(STATE, (values, added), strict=True):
        (folder / name).write_text(json.dumps(part, indent=2))


def _check(folder: Path, names: Sequence[str]) -> None:
    """Raise OSError, ValueError or SafetensorError if a file of a checkpoint is damaged."""
    digests = folder / DIGESTS
    if digests.exists():
        expected = json.loads(digests.read_text())
        damaged = [name for name in names if sha256_of(folder / name) != expected.get(name)]
        if damaged:
            raise ValueError(f"the content of {damaged[0]} has changed")
        return
    for name in names:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt"):
                pass


def _flush(folder: Path) -> None:
    """Flush a folder's files to disk, so that they are there before the folder is renamed."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
