"""Merge models tensor by tensor: read their files, write those of the result, read them back.

At any time memory holds one tensor of the result and a block of each model, in float32.

Shapes: M models, B values of a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tuneyard.api.merging import ON_CHANGES, MergeException, MergePart, MergeRecipe
from tuneyard.errors import StageError
from tuneyard_trainer.merging import arithmetic
from tuneyard_trainer.merging.arithmetic import Block, Merger
from tuneyard_trainer.merging.sources import Source
from tuneyard_trainer.models.layers import layer_ranges
from tuneyard_trainer.models.weight_files import TensorSpec, write_checked

BLOCK_VALUES = 1 << 20
"""Values of a tensor that are merged at a time: 4 MiB in float32 of each model."""


@dataclass(frozen=True)
class Merge:
    """The models and the arithmetic of a merge."""

    recipe: MergeRecipe
    models: Sequence[tuple[Source, MergePart]]
    """In slerp two: the way leads from the first to the second."""
    base: Source
    """The model that all were tuned from."""
    specs: Mapping[str, TensorSpec]
    """The tensors of the result."""

    def write(self, folder: Path, before_tensor: Callable[[str], None]) -> None:
        """Write the merged weights into a folder, read them back and compare every bit.

        `before_tensor`: called with the name of each tensor; what it raises ends the merge. Raises
        StageError NotMergeable, WeightsNotFinite, ExportMismatch, ModelBroken.
        """

        def tensor_of(name: str) -> Tensor:
            before_tensor(name)
            return self.tensor(name)

        write_checked(folder, self.specs, tensor_of)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the result."""
        spec = self.specs[name]
        if not spec.dtype.is_floating_point:
            return self._same(name)
        merger, blocks = self._merger(name), _Blocks(self, name)
        result = torch.empty(spec.shape, dtype=spec.dtype)
        for (start, stop), block in zip(blocks.ranges(), blocks(), strict=True):
            part = result.narrow(blocks.dim, start, stop - start) if spec.shape else result
            part.copy_(merger(block).reshape(part.shape))
        return result

    def _merger(self, name: str) -> Merger:
        weights, densities = zip(*(self._terms(part, name) for _, part in self.models), strict=True)
        blocks = _Blocks(self, name)
        if self.recipe.method in ("linear", "slerp") and abs(sum(weights)) < arithmetic.NO_WEIGHT:
            raise _not_mergeable(
                f"the weights of {name} add up to 0, and {self.recipe.method} divides by their sum"
            )
        match self.recipe.method:
            case "linear":
                return arithmetic.linear(weights)
            case "slerp":
                return arithmetic.slerp(weights[1] / sum(weights), blocks)
            case "taskArithmetic":
                return arithmetic.task_arithmetic(weights, self.recipe.scale)
            case "ties":
                return arithmetic.ties(weights, densities, self.recipe.scale, blocks)
            case "dareLinear" | "dareTies":
                draws = [
                    arithmetic.draw(self.recipe.seed, source.key, name) for source, _ in self.models
                ]
                return arithmetic.dare(
                    weights,
                    densities,
                    self.recipe.scale,
                    draws=draws,
                    elect_sign=self.recipe.method == "dareTies",
                )

    def _terms(self, part: MergePart, name: str) -> tuple[float, float]:
        """Return a model's weight and density in a tensor."""
        found = next((each for each in part.exceptions if fits(each, name)), MergeException())
        weight = part.weight if found.weight is None else found.weight
        densities = (found.density, part.density, self.recipe.density)
        return weight, next(each for each in densities if each is not None)

    def _same(self, name: str) -> Tensor:
        """Return a tensor of integers or booleans, which must be equal in all models."""
        spec = self.specs[name]
        rows = spec.shape[0] if spec.shape else 1
        first, *others = [source.read(name, 0, rows, 0) for source, _ in self.models]
        for (source, _), other in zip(self.models[1:], others, strict=True):
            if not torch.equal(first, other):
                raise _not_mergeable(
                    f"{source.label}: {name} has no fractions ({str(spec.dtype)[6:]}), and differs "
                    f"from that of {self.models[0][0].label}"
                )
        return first.to(spec.dtype)


@dataclass(frozen=True)
class _Blocks:
    """Reads a tensor of all models of a merge in blocks."""

    merge: Merge
    name: str

    @property
    def dim(self) -> int:
        """The dimension along which the tensor is read in parts."""
        return max(source.dim(self.name) for source, _ in self.merge.models)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the first and the last index of each block, exclusively."""
        shape = self.merge.specs[self.name].shape
        rows = shape[self.dim] if shape else 1
        step = max(1, BLOCK_VALUES * rows // max(1, torch.Size(shape).numel()))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def __call__(self) -> Iterator[Block]:
        """Yield the blocks, from the first on."""
        base = self.merge.base if self.merge.recipe.method in ON_CHANGES else None
        for number, (start, stop) in enumerate(self.ranges()):
            read = partial(_values, self.name, start, stop, self.dim)
            models_MB = torch.stack([read(source) for source, _ in self.merge.models])
            yield Block(number, models_MB, None if base is None else read(base))


def _values(name: str, start: int, stop: int, dim: int, source: Source) -> Tensor:
    return source.read(name, start, stop, dim).reshape(-1).float()


_LAYER = re.compile(r"\.([0-9]+)\.")


def fits(exception: MergeException, name: str) -> bool:
    """Return whether a tensor is one of those that an exception names."""
    if exception.layers is not None:
        layer = _LAYER.search(name)
        ranges = layer_ranges(exception.layers)
        if layer is None or not any(low <= int(layer[1]) <= high for low, high in ranges):
            return False
    return exception.modules is None or any(f".{m}." in f".{name}." for m in exception.modules)


def _not_mergeable(what: str) -> StageError:
    return StageError(
        "NotMergeable",
        f"{what}.",
        advice="Change the weights of the models, or leave one of them out.",
    )
