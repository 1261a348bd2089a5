"""The parameters that are trained, and the bytes of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tuneyard.api.adapters import Adapter, Lora, Qlora
from tuneyard.api.model_facts import LinearShape, ModelFacts
from tuneyard.api.training import Freeze

TRAINED_BYTES = 4
"""Trained parameters, their gradients and AdamW's two moments are float32."""
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256
"""Weights of a scale, and 8-bit scales of a scale under double quantization (bitsandbytes)."""


@dataclass(frozen=True)
class Trained:
    """The trained parameters of a model."""

    per_layer: int
    """In each decoder layer of which any parameter is trained."""
    layers: int
    """Number of these layers."""
    outside: int
    """Outside of the decoder layers: embeddings, head, last norm, virtual tokens."""
    first_layer: int
    """The lowest decoder layer that gradients reach, counted from 0."""
    keeps_input: frozenset[str]
    """Names of the linear layers whose input the backward pass needs."""
    norms: bool
    """Whether the norms are trained."""
    head: bool
    """Whether the head is trained."""
    adapter: Adapter | None
    """None: the model's own parameters are trained."""
    added_linears: tuple[LinearShape, ...] = ()
    """The linear layers that LoRA adapts, in each of the layers."""

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return self.layers * self.per_layer + self.outside

    @property
    def lora(self) -> Lora | None:
        """The settings of LoRA or QLoRA. None: neither is trained."""
        return None if self.adapter is None else self.adapter.lora or self.adapter.qlora


def trained(facts: ModelFacts, adapter: Adapter | None, freeze: Freeze | None) -> Trained:
    """Return the trained parameters under an adapter, or of full fine-tuning without `freeze`."""
    if adapter is None:
        return _full(facts, freeze)
    if lora := adapter.lora or adapter.qlora:
        return _lora(facts, adapter, lora)
    return _small_adapter(facts, adapter)


def _full(facts: ModelFacts, freeze: Freeze | None) -> Trained:
    frozen = LayerSpans.of(freeze.layers, facts.layers) if freeze and freeze.layers else NO_LAYERS
    embeddings = not (freeze and freeze.embeddings)
    head = embeddings if facts.tied_embeddings else not (freeze and freeze.head)
    outside = facts.final_norm_parameters
    outside += facts.embedding_parameters if embeddings else 0
    outside += facts.head_parameters if head else 0
    first = 0 if embeddings else frozen.first_other
    return Trained(
        per_layer=facts.layer_parameters,
        layers=facts.layers - frozen.number,
        outside=outside,
        first_layer=first,
        keeps_input=frozenset(linear.name for linear in facts.linears),
        norms=True,
        head=head,
        adapter=None,
    )


def _lora(facts: ModelFacts, adapter: Adapter, lora: Lora) -> Trained:
    adapted = tuple(linear for linear in facts.linears if _is_target(linear, lora))
    chosen = LayerSpans.of(lora.layers, facts.layers)
    magnitudes = sum(linear.outputs for linear in adapted) if lora.decomposed else 0
    width = sum(linear.inputs + linear.outputs for linear in adapted)
    return Trained(
        per_layer=lora.rank * width + magnitudes,
        layers=chosen.number,
        outside=0,
        first_layer=chosen.first(facts.layers),
        keeps_input=frozenset(linear.name for linear in adapted),
        norms=False,
        head=False,
        adapter=adapter,
        added_linears=adapted,
    )


def _is_target(linear: LinearShape, lora: Lora) -> bool:
    if lora.targets == "all-linear":
        return True
    if lora.targets == "attention":
        return linear.in_attention
    return any(f".{linear.name}".endswith(f".{target}") for target in lora.targets)


def _small_adapter(facts: ModelFacts, adapter: Adapter) -> Trained:
    """Return what the adapters other than LoRA train."""
    per_layer = outside = 0
    layers, first = facts.layers, 0
    if adapter.bottleneck:
        chosen = LayerSpans.of(adapter.bottleneck.layers, facts.layers)
        layers, first = chosen.number, chosen.first(facts.layers)
        size = adapter.bottleneck.size
        per_layer = 2 * (2 * facts.hidden_size * size + size + facts.hidden_size)
    elif adapter.prefix:
        per_layer = adapter.prefix.length * 2 * facts.key_value_size
    elif adapter.prompt:
        outside = adapter.prompt.length * facts.hidden_size
    elif adapter.ia3:
        per_layer = 2 * facts.key_value_size + facts.intermediate_size
    return Trained(
        per_layer=per_layer,
        layers=layers,
        outside=outside,
        first_layer=first,
        keeps_input=frozenset(),
        norms=False,
        head=False,
        adapter=adapter,
    )


class LayerSpans(NamedTuple):
    """Some layers of a model, as disjoint spans in order: the first layer, and the one after the
    last. Spans and not sets, since a driver that posts facts decides how many layers there are."""

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, ranges: str | None, count: int) -> LayerSpans:
        """Return the layers that ranges such as "0-3,8" name, without those that a model of `count`
        layers lacks. None: all layers."""
        if ranges is None:
            return cls(((0, count),))
        merged: list[tuple[int, int]] = []
        for start, end in sorted(_span(part, count) for part in ranges.split(",")):
            if start < end and merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            elif start < end:
                merged.append((start, end))
        return cls(tuple(merged))

    @property
    def number(self) -> int:
        """Number of layers."""
        return sum(end - start for start, end in self.spans)

    def first(self, count: int) -> int:
        """Return the first layer. `count`: returned if there is none."""
        return self.spans[0][0] if self.spans else count

    @property
    def first_other(self) -> int:
        """The first layer that is not one of these."""
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0


def _span(part: str, count: int) -> tuple[int, int]:
    first, _, last = part.partition("-")
    return int(first), min(int(last or first), count - 1) + 1


NO_LAYERS = LayerSpans(())


# ---- bytes --------------------------------------------------------------------------------------


def base_bytes(facts: ModelFacts, adapter: Adapter | None, precision: int) -> int:
    """Return the bytes of a model that is loaded to be trained, without its adapter.

    `precision`: bytes of the forward pass's type, which a frozen base is loaded in.
    """
    if adapter is None:
        return TRAINED_BYTES * facts.parameters
    if adapter.qlora is None:
        return precision * facts.parameters
    quantized = facts.layers * facts.linear_parameters
    return precision * (facts.parameters - quantized) + nf4_bytes(quantized, adapter.qlora)


def nf4_bytes(count: int, qlora: Qlora) -> int:
    """Return the bytes of `count` weights in 4-bit NormalFloat with their scales."""
    scales = -(-count // NF4_BLOCK)
    if not qlora.double_quantization:
        return count // 2 + 4 * scales
    return count // 2 + scales + 4 * -(-scales // NF4_SCALES_BLOCK)


def classifier(facts: ModelFacts) -> ModelFacts:
    """Return the facts of the sequence classifier over a model's layers: it has a head of one
    output instead of the head of the vocabulary. The output's own weights are left out."""
    return facts.model_copy(update={"tied_embeddings": True})
