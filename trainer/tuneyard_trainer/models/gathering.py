"""Writing tensors that are sharded over the workers, each one gathered when its turn comes.

All workers take part in gathering; rank 0 writes. No worker ever has more than its part of the
model and the tensor at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tuneyard.errors import StageError
from tuneyard_trainer.models.base import META, save_configs
from tuneyard_trainer.models.sharding import architecture, whole
from tuneyard_trainer.models.weight_files import (
    TensorSpec,
    order_in_file,
    write,
    write_file,
    writing_order,
)


def write_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors into one safetensors file. All workers call it with the same names, and
    those that do not write with the path None."""
    specs = _specs(tensors)
    if path is not None:
        write_file(path, specs, lambda name: whole(tensors[name]))
        return
    for name in order_in_file(specs):
        whole(tensors[name])


def write_model(folder: Path | None, model: PreTrainedModel) -> None:
    """Write a whole model, as `base.save_model` does. All workers call it, and those that do not
    write with the folder None."""
    tensors = _stored(model)
    specs = _specs(tensors)
    if folder is not None:
        save_configs(model, folder)
        write(folder, specs, lambda name: whole(tensors[name]))
        return
    for name in writing_order(specs):
        whole(tensors[name])


def require_same_names(model: PreTrainedModel) -> None:
    """Raise StageError NotSharded if a fully tuned model cannot be written one tensor at a time."""
    obstacle = names_obstacle(model)
    if obstacle:
        raise StageError(
            "NotSharded",
            f"compute.sharding is fsdp, and {obstacle}.",
            advice="Add adapter.lora, or set compute.sharding to none.",
        )


def names_obstacle(model: PreTrainedModel) -> str | None:
    """Return why a fully tuned model cannot be written one tensor at a time; None: it can. The
    files of GPT-NeoX and some mixtures of experts have other tensors than the layers."""
    shapes = {name: torch.empty(t.shape, device=META) for name, t in _stored(model).items()}
    if revert_weight_conversion(model, dict(shapes)).keys() == shapes.keys():
        return None
    return (
        f"the files of {architecture(model)} have other tensors than its layers, so that a fully "
        "tuned model cannot be written one tensor at a time"
    )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are stored of a model, tied weights once."""
    # First: it shards again what FSDP2 keeps whole after an evaluation, as two weights if tied.
    tensors = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
