"""A policy: the base model with the weights that earlier stages trained.

Every training stage writes its result relative to the input `model`: one adapter for it, or whole
weights. A later stage continues to train the same adapter instead of adding a second one, so the
last stage's weights are the complete result to export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from tuneyard.api.adapters import Adapter
from tuneyard.api.plan import PlannedStage
from tuneyard.api.stage_settings import TRAINING_KINDS, LoopSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters, sharding
from tuneyard_trainer.models.base import META, load_base, precision_of, save_model
from tuneyard_trainer.models.gathering import names_obstacle, require_same_names, write_model
from tuneyard_trainer.models.layers import freeze, trainable
from tuneyard_trainer.models.probes import base_of
from tuneyard_trainer.models.weight_files import stored_tensors
from tuneyard_trainer.storage.files import disk_error
from tuneyard_trainer.worker import StageContext, Worker

WEIGHTS = "weights"
GPU_SHARE = 0.5
"""The share of a GPU's memory above which `sharding: auto` shards a model. The rest is left for
activations, logits and an adapter's training state."""
FULL_TUNING_BYTES = 16
"""Bytes for each parameter that is trained in float32: itself, its gradient and AdamW's moments."""


def shards(context: StageContext, bytes_per_parameter: int) -> int:
    """Return the number of workers that share the model of a stage, the same on all of them; 1:
    each worker holds all of it.

    `bytes_per_parameter`: the memory of a whole model and its training state. Raises StageError
    NotSharded if the job asks for sharding, and the attempt has one worker.
    """
    worker, wanted = context.worker, context.stage.runtime.sharding
    if wanted == "fsdp" and worker.world_size == 1:
        raise StageError(
            "NotSharded",
            "compute.sharding is fsdp, and this attempt has one worker.",
            advice="Raise compute.workers to 2 or more, or set compute.sharding to none.",
        )
    if wanted == "fsdp":
        return worker.world_size
    if wanted == "none" or worker.world_size == 1 or worker.device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(worker.device).total_memory
    is_large = exceeds_share(_base(context.inputs), bytes_per_parameter, memory)
    exceeds = torch.tensor(float(is_large), device=worker.device)
    dist.all_reduce(exceeds, op=dist.ReduceOp.MAX)  # the GPUs may differ
    if not exceeds:
        return 1
    obstacle = sharding_obstacle(
        _base(context.inputs), worker.world_size, is_trained=_trains_whole_weights(context.stage)
    )
    if obstacle:
        worker.report(message=f"each worker holds the whole model, since {obstacle}")
        return 1
    return worker.world_size


def sharding_obstacle(folder: Path, world_size: int, *, is_trained: bool) -> str | None:
    """Return why a model cannot be sharded over so many workers; None: nothing is known against it.
    No weight is read.

    `is_trained`: whether the weights of the model itself are trained.
    """
    model = load_base(folder, dtype=torch.float32, device=META)
    if is_trained and (found := sharding.tied_obstacle(model, world_size) or names_obstacle(model)):
        return found
    return sharding.plan_obstacle(model)


def _trains_whole_weights(stage: PlannedStage) -> bool:
    """Return whether a stage trains the weights of the model itself."""
    return stage.kind in TRAINING_KINDS and getattr(stage.settings, "adapter", None) is None


def exceeds_share(folder: Path, bytes_per_parameter: int, memory: int) -> bool:
    """Return whether a whole model takes more than its share of a GPU with `memory` bytes."""
    tensors = stored_tensors(folder).values()
    parameters = sum(torch.Size(tensor.spec.shape).numel() for tensor in tensors)
    return bytes_per_parameter * parameters > GPU_SHARE * memory


def bytes_per_parameter(settings: LoopSettings, adapter: Adapter | None, worker: Worker) -> int:
    """Return the bytes that training takes for each parameter of a whole base."""
    return precision_of(settings, worker).itemsize if adapter else FULL_TUNING_BYTES


def load(
    inputs: Mapping[str, Path],
    adapter: Adapter | None,
    loop: LoopSettings,
    *,
    device: torch.device,
    precision: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    gradient_checkpointing: bool = False,
    shards: int = 1,
) -> nn.Module:
    """Load the policy for training: the input `model` with the weights of the input `tuned`.

    Trained parameters are float32; the base of an adapter is in `precision`. Raises StageError.
    """
    trained = _trained(inputs)
    base = load_base(
        _base(inputs),
        dtype=precision if adapter else torch.float32,
        device=device,
        quantize=adapter.qlora if adapter else None,
        dropout=loop.dropout,
        shards=shards,
        computes=precision,
    )
    if shards > 1 and not adapter:
        require_same_names(base)
    model: nn.Module = base
    if adapter and trained and adapters.is_adapter(trained):
        model = adapters.load(base, trained, trainable=True)
    elif adapter:
        model = adapters.attach(base, adapter, seed=loop.seed, tokenizer=tokenizer)
    elif loop.freeze:
        freeze(base, loop.freeze)
    if shards > 1 and not adapter:
        sharding.require_one_copy(base, shards)
    if gradient_checkpointing:
        adapters.enable_gradient_checkpointing(model)
    return model


def save(
    model: nn.Module,
    adapter: Adapter | None,
    folder: Path,
    *,
    is_main: bool = True,
) -> None:
    """Write the adapter, or the whole model if there is no adapter.

    Workers that share the model call it together; one of them, `is_main`, writes. Raises StageError
    DiskFull or WriteFailed.
    """
    try:
        if not adapter and sharding.is_shared(model):
            write_model(folder if is_main else None, base_of(model))
        elif is_main and adapter:
            adapters.save(model, folder)
        elif is_main:
            save_model(model, folder)
    except OSError as error:
        raise disk_error(error, folder) from error


def inference_type(device: torch.device) -> torch.dtype:
    """Return the type of a policy's weights in evaluation mode."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_for_inference(
    inputs: Mapping[str, Path], device: torch.device, shards: int = 1
) -> nn.Module:
    """Load the policy in evaluation mode: bfloat16 on a GPU, float32 on a CPU. `shards`: the
    workers that each keep a part of it; 1: each keeps all of it."""
    base = load_base(_base(inputs), dtype=inference_type(device), device=device, shards=shards)
    trained = _trained(inputs)
    if trained and adapters.is_adapter(trained):
        return adapters.load(base, trained)
    return base.eval()


def _trained(inputs: Mapping[str, Path]) -> Path | None:
    """Return the weights that an earlier stage trained; None: there is no such stage."""
    return inputs["tuned"] / WEIGHTS if "tuned" in inputs else None


def _base(inputs: Mapping[str, Path]) -> Path:
    """Return the folder of the base: an earlier stage's whole weights, or the input `model`."""
    trained = _trained(inputs)
    return trained if trained and not adapters.is_adapter(trained) else inputs["model"]


class Reference:
    """The policy at the start of a stage, without a second model: a copy of the trainable tensors,
    which is swapped in while the reference is active.

    With an adapter of any kind, only the adapter is copied, and of a shared model each worker's
    part. A reference that is created before a checkpoint is restored is the same after a resume.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._parameters = model, trainable(model)
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}

    @property
    def start(self) -> Mapping[str, torch.Tensor]:
        """The trained tensors at the start of the stage, by name, while it is not active."""
        return self._start

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the model is the reference. No backward pass may be pending."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        sharding.reshard(self._model)  # the next forward pass gathers the other weights
        for name, parameter in self._parameters.items():
            current, start = parameter.data, self._start[name]
            if sharding.is_sharded(parameter):  # FSDP2 gathers from this memory
                self._start[name] = current.clone()
                current.copy_(start)
            else:
                self._start[name], parameter.data = current, start
