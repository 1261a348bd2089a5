"""The models of a merge, read one part of a tensor at a time. None is ever loaded.

A source is a whole model, or an adapter in its base: then its tensors are the base's with the
adapter merged into them in float32, so that adapters of any rank and kind that can be merged are
merged by what they change. Adding up the matrices A and B of adapters apart would add products of
one adapter's A and another one's B (https://github.com/huggingface/peft/issues/3004).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.merging import AdaptedTensors
from tuneyard_trainer.models.weight_files import StoredTensor, TensorSpec, stored_tensors


class Source(Protocol):
    """The tensors of a model."""

    @property
    def label(self) -> str:
        """The model's name in messages: the field and its value."""

    @property
    def key(self) -> str:
        """The name by which chance tells the models of a merge apart, wherever they stand in it."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The shapes and types of the tensors by name."""

    def dim(self, name: str) -> int:
        """Return the dimension along which the tensor is best read in parts: 0 or 1."""

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        """Read the indices from `start` to `stop` of dimension `dim`, in float32 or better. Raises
        StageError WeightsNotFinite, ModelBroken."""


@dataclass(frozen=True)
class WholeModel:
    """A model with all its weights."""

    label: str
    key: str
    tensors: Mapping[str, StoredTensor]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    def dim(self, name: str) -> int:  # noqa: ARG002
        return 0

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        tensor = self.tensors[name]
        part = tensor.read_part(start, stop, dim) if tensor.spec.shape else tensor.read()
        return _finite(_widened(part), name, self.label)


@dataclass(frozen=True)
class AdaptedModel:
    """A base with an adapter in it."""

    label: str
    key: str
    adapted: AdaptedTensors

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self.adapted.base.items()}

    def dim(self, name: str) -> int:
        if name not in self.adapted.changed:
            return 0
        layer, part = self.adapted.changed[name]
        return layer.outputs_dim(part)

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        if name not in self.adapted.changed:
            return WholeModel(self.label, self.key, self.adapted.base).read(name, start, stop, dim)
        layer, part = self.adapted.changed[name]
        if dim != layer.outputs_dim(part):
            raise ValueError(f"{name} is read along dimension {layer.outputs_dim(part)}, not {dim}")
        merged, _ = layer.merged_block(part, start, stop)
        return _finite(merged, name, self.label)


def open_source(folder: Path, base: Path, label: str, key: str) -> Source:
    """Open a model, or an adapter of the model in `base`, in the folder. Raises StageError
    NotMergeable, or an error of the model or of the adapter."""
    if adapters.is_adapter(folder):
        return AdaptedModel(label, key, AdaptedTensors.of(base, folder))
    return WholeModel(label, key, stored_tensors(folder))


def _widened(part: Tensor) -> Tensor:
    """Return a part in float32 or better; integers and booleans stay."""
    if not part.is_floating_point():
        return part
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _finite(part: Tensor, name: str, label: str) -> Tensor:
    # The sum of finite values may be infinite; where it is finite, all of them are.
    if not math.isfinite(part.sum()) and not bool(part.isfinite().all()):
        wrong = float(part[~part.isfinite()][0])
        raise StageError(
            "WeightsNotFinite",
            f"{label}: {name} holds {wrong}, and what it is merged with would hold it too.",
            advice="Name a model whose weights are numbers, such as an earlier checkpoint of it.",
        )
    return part
