"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751), which PEFT does not have.

After the attention and after the MLP of each chosen layer, inside the residual branch, stands a
two-layer network with a residual of its own:  h + up(activation(down(dropout(h)))).  `up` starts at
zero, so the adapted model starts as the base to the bit. Unlike the paper's, the norms stay frozen:
the adapter alone is trained.

An adapter is a submodule of the block it follows (`model.layers.3.mlp.bottleneck`) and acts by a
forward hook, which is its own bound method: copies, device moves, checkpointing and `generate` work
as on the base, because the model is still the base's class.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuneyard.api.adapters import Bottleneck
from tuneyard.errors import StageError
from tuneyard_trainer.models.layers import decoder_layers, layer_indices

NAME = "bottleneck"
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class BottleneckAdapter(nn.Module):
    """2 * width * size + size + width parameters, in float32 whatever the base's precision."""

    def __init__(self, width: int, size: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.activation_name, self.enabled = activation, True
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(width, size)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) to the same shape and dtype."""
        inner = self.activation(self.down(self.dropout(hidden.to(self.down.weight.dtype))))
        return hidden + self.up(inner).to(hidden.dtype)

    def after(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """The hook on the block before: attention returns a tuple with the hidden states first."""
        if not self.enabled:
            return output
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


def attach(model: PreTrainedModel, settings: Bottleneck) -> PreTrainedModel:
    """Freezes `model` and adds adapters with weights drawn from the global random state."""
    if attached(model):
        raise ValueError("the model has bottleneck adapters already")
    _, layers = decoder_layers(model)
    chosen = list(range(len(layers)))
    if settings.layers:
        chosen = layer_indices(settings.layers, len(layers), "adapter.bottleneck.layers")
    blocks = [
        block
        for index in chosen
        for _, block in (attention_of(layers[index]), _mlp_of(layers[index]))
    ]
    for block in blocks:
        _require_outside_residual(model, block)
    model.requires_grad_(False)
    width = model.config.get_text_config().hidden_size
    for block in blocks:
        adapter = BottleneckAdapter(width, settings.size, settings.activation, settings.dropout)
        block.add_module(NAME, adapter.to(next(block.parameters()).device))
        block.register_forward_hook(adapter.after)
    return model


def attention_of(layer: nn.Module) -> tuple[str, nn.Module]:
    """A decoder layer's attention block and its name there. Raises StageError."""
    return _block(layer, ATTENTION, "attention")


def _mlp_of(layer: nn.Module) -> tuple[str, nn.Module]:
    return _block(layer, MLP, "MLP")


def _block(layer: nn.Module, names: tuple[str, ...], what: str) -> tuple[str, nn.Module]:
    for name in names:
        if isinstance(block := getattr(layer, name, None), nn.Module):
            return name, block
    found = ", ".join(name for name, _ in layer.named_children())
    raise StageError(
        "UnknownLayout",
        f"no {what} block was found in {type(layer).__name__}: it holds {found}, and known are "
        f"{', '.join(names)}.",
        advice="Use adapter.lora with targets: all-linear, which needs no block names.",
    )


def _require_outside_residual(model: PreTrainedModel, block: nn.Module) -> None:
    if "residual" in inspect.signature(block.forward).parameters:
        raise StageError(
            "UnknownLayout",
            f"{type(model).__name__} adds the residual inside {type(block).__name__}, where no "
            "adapter can come before it.",
            advice="Use adapter.lora instead.",
        )


def adapters_of(model: nn.Module) -> dict[str, BottleneckAdapter]:
    """The model's bottleneck adapters by their dotted names; empty where it has none."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BottleneckAdapter)}


def attached(model: nn.Module) -> bool:
    """Whether the model has bottleneck adapters."""
    return bool(adapters_of(model))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """While active, the model is its base."""
    before = {adapter: adapter.enabled for adapter in adapters_of(model).values()}
    for adapter in before:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """What `settings_of` needs to attach the same adapters to another copy of the base."""
    name, _ = decoder_layers(model)
    adapters = adapters_of(model)
    layers = sorted({int(key.removeprefix(f"{name}.").split(".")[0]) for key in adapters})
    one = next(iter(adapters.values()))
    return {
        "size": one.down.out_features,
        "activation": one.activation_name,
        "dropout": one.dropout.p,
        "layers": layers,
    }


def settings_of(config: Mapping[str, Any]) -> Bottleneck:
    """The inverse of `config_of`. Raises pydantic's ValidationError, KeyError or TypeError."""
    return Bottleneck(
        size=config["size"],
        activation=config["activation"],
        dropout=config["dropout"],
        layers=",".join(str(index) for index in config["layers"]),
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by their names in the model."""
    return {
        f"{name}.{key}": tensor
        for name, adapter in adapters_of(model).items()
        for key, tensor in adapter.state_dict().items()
    }


def assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Sets the adapters' tensors. Raises ValueError unless names and shapes are the same."""
    own = weights_of(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"{len(odd)} tensors are missing or not known: {', '.join(odd[:5])}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
                raise ValueError(f"{name} has shape {shapes}")
            tensor.copy_(weights[name])
