"""Merge a saved adapter into its base, one layer at a time.

PEFT computes the merged weights. Its layers are built over a model without memory (torch's meta
device), and one layer at a time receives its weights, in blocks of outputs: the rows of a weight
matrix do not depend on each other. Float64 arithmetic of our own checks every weight.

Shapes: O outputs of a layer, I inputs, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters, base, weight_files
from tuneyard_trainer.models.base import read_back_mismatch
from tuneyard_trainer.models.files import stored_dtype
from tuneyard_trainer.models.probes import base_of
from tuneyard_trainer.models.weight_files import StoredTensor, stored_tensors, tensors_in

BLOCK_WEIGHTS = 1 << 20
"""Weights of a layer that are merged at a time. PEFT and the check hold ten copies of a block
in float32 and float64: about 60 MiB."""

TOLERANCE = 1e-5
"""Largest difference of a weight from float64 arithmetic, relative to the sum of the absolute terms
that it is computed from. Float32 sums of 16 to 1,024 terms err by 1e-7 to 1e-6."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest float32 of full precision: relative differences of smaller weights mean nothing."""

PEFT_NAMES: Mapping[str, tuple[str, int | None]] = {
    "lora_A.weight": ("lora_A.default.weight", None),
    "lora_B.weight": ("lora_B.default.weight", 0),
    "lora_magnitude_vector": ("lora_magnitude_vector.default.weight", 0),
    "ia3_l": ("ia3_l.default", 0),
}
"""The tensors of an adapter's layer by their names in the file: their names in PEFT's layer, and
the dimension of the layer's outputs (None: there is none)
(https://huggingface.co/docs/peft/developer_guides/checkpoint)."""


def write_merged(model: Path, adapter: Path, folder: Path) -> float:
    """Write the base in `model` with the adapter merged into it, with its config and generation
    config. Return the largest relative difference of a merged weight from float64 arithmetic.

    The result has the tensors, names and types of the base's files: what the adapter changes is
    merged in float32 and cast to its type in the base, everything else is copied. `model` holds the
    original precision, also for QLoRA. Raises StageError: NotMergeable, ExportMismatch,
    WeightsNotFinite, or an error of the base or of the adapter.
    """
    adapted = AdaptedTensors.of(model, adapter)
    base.save_configs(adapted.skeleton, folder)
    specs = {name: tensor.spec for name, tensor in adapted.base.items()}
    differences = [0.0]

    def tensor_of(name: str) -> Tensor:
        merged, difference = adapted.merged(name)
        differences.append(difference)
        return merged

    weight_files.write_checked(folder, specs, tensor_of)
    base.load_base(folder, dtype=stored_dtype(model), device=base.META)
    return max(differences)


@dataclass(frozen=True)
class AdaptedTensors:
    """The tensors of a base with an adapter merged into them. None is in memory."""

    skeleton: PreTrainedModel
    """The base without memory."""
    base: Mapping[str, StoredTensor]
    """By their names in the base's files."""
    changed: Mapping[str, tuple[_Layer, str]]
    """The layer of each tensor that the adapter changes, and its weight or bias."""

    @classmethod
    def of(cls, model: Path, adapter: Path) -> AdaptedTensors:
        """Open the base in `model`, which holds the original precision, and an adapter of it.

        Raises StageError NotMergeable, or an error of the base or of the adapter.
        """
        adapters.require_mergeable(adapter)
        skeleton = base.load_base(model, dtype=stored_dtype(model), device=base.META)
        tensors = stored_tensors(model)
        changed = {
            stored.name: (layer, parameter)
            for layer in _layers(skeleton, tensors, adapter)
            for parameter, stored in layer.changed.items()
        }
        return cls(skeleton, tensors, changed)

    def merged(self, name: str) -> tuple[Tensor, float]:
        """Return a tensor in its type in the base, and its largest relative difference from float64
        arithmetic. Raises StageError ExportMismatch or WeightsNotFinite."""
        if name not in self.changed:
            return self.base[name].read(), 0.0
        layer, parameter = self.changed[name]
        return layer.merged(parameter)


def _layers(
    skeleton: PreTrainedModel, tensors: Mapping[str, StoredTensor], adapter: Path
) -> list[_Layer]:
    """Return the layers that an adapter changes. Raises StageError NotMergeable if a layer's weight
    is not one of the base's stored tensors, or if a tensor of the adapter belongs to no layer."""
    stored = _stored_by_parameter(skeleton, tensors)
    saved = {tensor.name: tensor for tensor in tensors_in(adapter / adapters.WEIGHTS)}
    adapted = base_of(adapters.load(skeleton, adapter))
    config = adapters.config_of(adapter)
    layers = []
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            own = {
                part: saved.pop(f"base_model.model.{name}.{part}")
                for part in PEFT_NAMES
                if f"base_model.model.{name}.{part}" in saved
            }
            layers.append(_Layer(name, module, config, own, _weights_of(name, module, stored)))
    if saved:
        raise _not_mergeable(f"{len(saved)} of its tensors belong to no layer: {min(saved)}")
    return layers


def _stored_by_parameter(
    skeleton: PreTrainedModel, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the stored tensors by the names of the parameters that they are loaded into, without
    those that transformers splits or joins on loading (the experts of some mixtures)."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    parameters = skeleton.state_dict()
    found = {}
    for name, tensor in tensors.items():
        parameter, converter = rename_source_key(
            name, renamings, converters, skeleton.base_model_prefix, parameters
        )
        if parameter not in parameters and name in parameters:
            parameter, converter = name, None
        if converter is None:
            found[parameter] = tensor
    return found


def _weights_of(
    name: str, module: Any, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    own = {part: f"{name}.{part}" for part, _ in module.get_base_layer().named_parameters()}
    for part, parameter in own.items():
        shape = tuple(module.get_base_layer().get_parameter(part).shape)
        if parameter not in stored or stored[parameter].spec.shape != shape:
            raise _not_mergeable(f"{parameter} is not one tensor of the base's files")
    return {part: stored[parameter] for part, parameter in own.items()}


def _not_mergeable(what: str) -> StageError:
    return StageError(
        "NotMergeable",
        f"the adapter cannot be merged into the base's files: {what}.",
        advice="Set output.merge to false.",
    )


@dataclass(frozen=True)
class _Layer:
    """An adapted layer: PEFT's layer without memory, and the tensors of the base and adapter."""

    name: str
    module: Any
    config: Mapping[str, Any]
    adapter: Mapping[str, StoredTensor]
    """By the names of PEFT_NAMES."""
    base: Mapping[str, StoredTensor]
    """The layer's own weight and bias."""

    @property
    def changed(self) -> dict[str, StoredTensor]:
        """The stored tensors that the adapter changes: the weight, and the bias if (IA)^3 rescales
        the outputs."""
        rescaled = "ia3_l" in self.adapter and not self.module.is_feedforward
        return {part: stored for part, stored in self.base.items() if part == "weight" or rescaled}

    def merged(self, part: str) -> tuple[Tensor, float]:
        """Return the merged weight or bias in its type in the base, and its largest relative
        difference from float64 arithmetic before the cast. Raises StageError ExportMismatch,
        WeightsNotFinite.
        """
        stored = self.base[part]
        outputs_dim = self.outputs_dim(part)
        result = torch.empty(stored.spec.shape, dtype=stored.spec.dtype)
        differences = []
        for start, stop in self._blocks():
            merged, difference = self.merged_block(part, start, stop)
            result.narrow(outputs_dim, start, stop - start).copy_(merged)
            differences.append(difference)
            del merged  # before the next block is read
        weight_files.require_finite(stored.name, result)
        return result, max(differences)

    def merged_block(self, part: str, start: int, stop: int) -> tuple[Tensor, float]:
        """Return the merged weight or bias of the outputs from `start` to `stop`, in float32 or
        better, and the largest relative difference from float64 arithmetic. Raises StageError
        ExportMismatch above the tolerance."""
        block = {name: self._read(name, start, stop) for name in (*self.base, *self.adapter)}
        expected, terms = self._expected(part, block)
        merged = self._merge(block)[part]
        found = merged.T if part == "weight" and self._transposed else merged
        difference = expected.sub_(found.reshape(expected.shape)).abs_()
        largest = float(difference.div_(terms.clamp_(min=TINY)).max())
        if largest > TOLERANCE:  # NaN is told by the check of the weights
            raise read_back_mismatch(
                "ExportMismatch",
                f"the merged {self.base[part].name} differs from float64 arithmetic by "
                f"{largest:.3g} of its terms, and at most {TOLERANCE:g} is allowed.",
            )
        return merged, largest

    def outputs_dim(self, part: str) -> int:
        """Return the dimension of the layer's outputs in its weight or bias."""
        return 1 if part == "weight" and self._transposed else 0  # GPT-2's Conv1D is (I, O)

    def _outputs_dim(self, part: str) -> int | None:
        """Return the dimension of the layer's outputs in a tensor; None: there is none."""
        if part in self.base:
            return self.outputs_dim(part)
        return None if part == "ia3_l" and self.module.is_feedforward else PEFT_NAMES[part][1]

    @property
    def _transposed(self) -> bool:
        return isinstance(self.module.get_base_layer(), Conv1D)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of outputs that are merged at a time."""
        shape = self.base["weight"].spec.shape
        outputs, inputs = shape[::-1] if self._transposed else shape
        step = max(1, BLOCK_WEIGHTS // inputs)
        for start in range(0, outputs, step):
            yield start, min(start + step, outputs)

    def _read(self, part: str, start: int, stop: int) -> Tensor:
        """Read a tensor's share in the outputs from `start` to `stop`, or a tensor without outputs,
        in float32 or better."""
        stored = self.base[part] if part in self.base else self.adapter[part]
        dim = self._outputs_dim(part)
        tensor = stored.read() if dim is None else stored.read_part(start, stop, dim)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def _merge(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weight and the bias that PEFT's layer merges from the tensors, in place."""
        layer = self.module.get_base_layer()
        owners = {
            part: (layer, part) if part in self.base else _owner(self.module, PEFT_NAMES[part][0])
            for part in block
        }
        without_memory = {part: getattr(*owner) for part, owner in owners.items()}
        for part, (owner, name) in owners.items():
            setattr(owner, name, nn.Parameter(block[part], requires_grad=False))
        try:
            self.module.merge()
            return {part: getattr(layer, part).data for part in self.base}
        finally:
            self.module.merged_adapters.clear()
            for part, (owner, name) in owners.items():
                setattr(owner, name, without_memory[part])

    def _expected(self, part: str, block: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the merged weight (O, I) or bias (O, 1) in float64, and the sum of the absolute
        terms of each number."""
        exact = {name: tensor.double() for name, tensor in block.items()}
        weight_OI = exact["weight"].T if self._transposed else exact["weight"]
        if "ia3_l" in exact:
            rescaled = (weight_OI if part == "weight" else exact["bias"][:, None]) * exact["ia3_l"]
            return rescaled, rescaled.abs()
        scaling = _scaling(self.config, self.name, len(exact["lora_A.weight"]))
        return _low_rank(weight_OI, exact, scaling)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the factor of a layer's update: alpha / R (Hu et al. 2021, arXiv:2106.09685), or
    alpha / sqrt(R) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    matching = (a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha = next(matching, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _low_rank(
    weight_OI: Tensor, adapter: Mapping[str, Tensor], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the merged weight of LoRA or DoRA, and the sum of the absolute terms of each weight.

    LoRA: W + s B A (Hu et al. 2021, arXiv:2106.09685). DoRA: m (W + s B A) / |W + s B A|, with the
    norm over the inputs of each output (Liu et al. 2024, arXiv:2402.09353, equation 5).
    """
    a_RI, b_OR = adapter["lora_A.weight"], adapter["lora_B.weight"]
    merged_OI = (b_OR @ a_RI).mul_(scaling).add_(weight_OI)
    terms_OI = (b_OR.abs() @ a_RI.abs()).mul_(abs(scaling)).add_(weight_OI.abs())
    if (magnitude_O := adapter.get("lora_magnitude_vector")) is not None:
        factor_O1 = magnitude_O[:, None] / merged_OI.norm(dim=1, keepdim=True)
        merged_OI.mul_(factor_O1)
        terms_OI.mul_(factor_O1.abs())
    return merged_OI, terms_OI
