"""What is trained on top of a model: `spec.adapter`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuneyard.api.meta import Model, OneOf

Rank = Annotated[int, Field(ge=1, le=1024)]
Probability = Annotated[float, Field(ge=0, lt=1)]

LAYERS_PATTERN = r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$"
LayerRanges = Annotated[str, Field(max_length=256, pattern=LAYERS_PATTERN)]
"""Layer indices from 0, as a string: "0-11", "0-3,8"."""

ModuleNames = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64)
]


class Lora(Model):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Rank = 16
    """Rank of the update."""
    alpha: int = Field(default=32, ge=1, le=4096)
    """Scale: the update is multiplied by alpha / rank (alpha / sqrt(rank): `rankStabilized`)."""
    dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear", "attention"] | ModuleNames = "all-linear"
    """Which linear layers: all but the head, the attention projections, or a list of names."""
    layers: LayerRanges | None = None
    """Only these layers, e.g. "15-29". None: all."""
    rank_stabilized: bool = False
    """rsLoRA scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    decomposed: bool = False
    """DoRA: magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)."""


class Qlora(Lora):
    """LoRA over a base quantized to 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314)."""

    double_quantization: bool = True
    """Quantize the quantization constants too (0.4 bits less per weight)."""


class PrefixTuning(Model):
    """Trained keys and values before every layer (Li & Liang 2021, arXiv:2101.00190)."""

    length: int = Field(default=20, ge=1, le=1024)
    """Virtual tokens."""


class PromptTuning(Model):
    """Trained embeddings before the input (Lester et al. 2021, arXiv:2104.08691)."""

    length: int = Field(default=20, ge=1, le=1024)
    """Virtual tokens."""
    initial_text: str | None = Field(default=None, min_length=1, max_length=4096)
    """Start from this text's embeddings, repeated to `length`. None: random vocabulary rows."""


class Ia3(Model):
    """Learned rescaling of keys, values and MLP activations (Liu et al. 2022, arXiv:2205.05638)."""


class Bottleneck(Model):
    """Houlsby adapters: a small two-layer network after attention and after the MLP, inside each
    residual branch (Houlsby et al. 2019, arXiv:1902.00751). Not mergeable: it is not linear."""

    size: int = Field(default=64, ge=1, le=8192)
    """Width of the bottleneck."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """The non-linearity."""
    dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    layers: LayerRanges | None = None
    """Only these layers. None: all."""


class Adapter(OneOf):
    """A parameter-efficient method; exactly one. Absent as a whole: full fine-tuning."""

    lora: Lora | None = None
    """Low-rank adaptation."""
    qlora: Qlora | None = None
    """LoRA over a 4-bit base."""
    prefix: PrefixTuning | None = None
    """Prefix tuning."""
    prompt: PromptTuning | None = None
    """Prompt tuning."""
    ia3: Ia3 | None = None
    """(IA)^3."""
    bottleneck: Bottleneck | None = None
    """Houlsby bottleneck adapters."""


MERGEABLE = ("lora", "qlora", "ia3")
