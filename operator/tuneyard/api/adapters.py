"""Parameter-efficient fine-tuning methods: `spec.adapter`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuneyard.api.meta import Model, OneOf

Rank = Annotated[int, Field(ge=1, le=1024)]
Probability = Annotated[float, Field(ge=0, lt=1)]

LAYERS_PATTERN = r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$"
LayerRanges = Annotated[str, Field(max_length=256, pattern=LAYERS_PATTERN)]
"""Layer indices and ranges, counted from 0, as a string: "0-11", "0-3,8"."""

ModuleNames = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64)
]


class Lora(Model):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Rank = 16
    """Rank of the weight update."""
    alpha: int = Field(default=32, ge=1, le=4096)
    """Scale of the weight update: alpha / rank, or alpha / sqrt(rank) if `rankStabilized`."""
    dropout: Probability = 0.0
    """Dropout probability on the adapter's input."""
    targets: Literal["all-linear", "attention"] | ModuleNames = "all-linear"
    """Linear layers to adapt: all-linear (all but the head), attention (the attention
    projections), or a list of module names."""
    layers: LayerRanges | None = None
    """Decoder layers to adapt, e.g. "15-29". None: all."""
    rank_stabilized: bool = False
    """Use rsLoRA scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    decomposed: bool = False
    """Use DoRA: train magnitude and direction separately (Liu et al. 2024, arXiv:2402.09353)."""


class Qlora(Lora):
    """LoRA on a base model quantized to 4-bit NormalFloat (Dettmers et al. 2023,
    arXiv:2305.14314)."""

    double_quantization: bool = True
    """Quantize the quantization constants too; saves 0.4 bits per weight."""


class PrefixTuning(Model):
    """Trained keys and values before the sequence in every layer (Li & Liang 2021,
    arXiv:2101.00190)."""

    length: int = Field(default=20, ge=1, le=1024)
    """Number of virtual tokens."""


class PromptTuning(Model):
    """Trained embeddings before the input (Lester et al. 2021, arXiv:2104.08691)."""

    length: int = Field(default=20, ge=1, le=1024)
    """Number of virtual tokens."""
    initial_text: str | None = Field(default=None, min_length=1, max_length=4096)
    """Initialize from the embeddings of this text, repeated to `length` tokens. None: from random
    rows of the vocabulary."""


class Ia3(Model):
    """Learned rescaling of keys, values and MLP activations (Liu et al. 2022, arXiv:2205.05638)."""


class Bottleneck(Model):
    """Houlsby adapters: a small two-layer network after the attention and after the MLP, inside
    each residual branch (Houlsby et al. 2019, arXiv:1902.00751). These networks are not linear, so
    they cannot be merged into the base weights."""

    size: int = Field(default=64, ge=1, le=8192)
    """Width of the bottleneck layer."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """The activation function."""
    dropout: Probability = 0.0
    """Dropout probability on the adapter's input."""
    layers: LayerRanges | None = None
    """Decoder layers to adapt. None: all."""


class Adapter(OneOf):
    """A parameter-efficient fine-tuning method. Set exactly one field."""

    lora: Lora | None = None
    """Low-rank adaptation."""
    qlora: Qlora | None = None
    """LoRA on a base model quantized to 4 bits."""
    prefix: PrefixTuning | None = None
    """Prefix tuning."""
    prompt: PromptTuning | None = None
    """Prompt tuning."""
    ia3: Ia3 | None = None
    """(IA)^3: learned rescaling of activations."""
    bottleneck: Bottleneck | None = None
    """Houlsby bottleneck adapters."""


MERGEABLE = ("lora", "qlora", "ia3")
"""The adapters that can be merged into the base weights."""
