"""Merging: a model made from the weights of several."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuneyard.api.adapters import LayerRanges, ModuleNames
from tuneyard.api.meta import Model

MergeMethod = Literal["linear", "slerp", "taskArithmetic", "ties", "dareLinear", "dareTies"]
ON_CHANGES: tuple[MergeMethod, ...] = ("taskArithmetic", "ties", "dareLinear", "dareTies")
"""The methods that merge what tuning changed, and so need the base."""
THINNING: tuple[MergeMethod, ...] = ("ties", "dareLinear", "dareTies")
"""The methods that leave out a share of the changes."""

Weight = Annotated[float, Field(ge=-10, le=10)]
Density = Annotated[float, Field(gt=0, le=1)]


class MergeException(Model):
    """Another weight or density for some tensors. A tensor must fit all fields that are set."""

    layers: LayerRanges | None = None
    """Decoder layers, e.g. "0-11". None: all, and the tensors outside of the layers."""
    modules: ModuleNames | None = None
    """Modules whose tensors are meant, e.g. mlp, self_attn.q_proj or embed_tokens. None: all."""
    weight: Weight | None = None
    """The model's weight in these tensors. None: the model's."""
    density: Density | None = None
    """The model's density in these tensors. None: the model's."""


class MergePart(Model):
    """A model's part in a merge."""

    weight: Weight = 1.0
    """Weight of the model. linear and slerp divide it by the sum of all weights."""
    density: Density | None = None
    """Share of the changes that is kept (ties: the largest; dareLinear, dareTies: drawn). None: the
    recipe's."""
    exceptions: list[MergeException] = Field(default=[], max_length=64)
    """Tensors with another weight or density. The first that fits holds."""


class MergeRecipe(Model):
    """The arithmetic of a merge."""

    method: MergeMethod = "linear"
    """linear: the weighted mean (model soups). slerp: a point of the arc between two models.
    taskArithmetic: the base plus the weighted sum of the changes; of one model with a weight below
    1, a way back toward the base (WiSE-FT). ties: the base plus the mean of the largest changes
    that agree in sign. dareLinear, dareTies: the base plus the sum of changes of which a random
    share is kept and scaled up; dareTies leaves out those that disagree in sign."""
    density: Density = 0.5
    """Share of the changes that is kept, of models that state none. ties keeps the largest, DARE
    draws them. The other methods keep all."""
    scale: float = Field(default=1.0, gt=0, le=10)
    """Factor of the merged change. linear and slerp have none."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    """Seed of the changes that DARE draws."""
    tokenizer: Literal["base", "union"] = "base"
    """Tokens of the result. base: those of the base; tokens that models have added are left out.
    union: these too."""
