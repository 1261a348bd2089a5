"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751), which PEFT does not have.

Each chosen layer gets two adapters, one after the attention and one after the MLP, inside the
residual branch. An adapter is a two-layer network with its own residual connection:
h + up(activation(down(dropout(h)))). `up` starts at zero, so the adapted model is at first bit for
bit equal to the base. Unlike in the paper, the layer norms stay frozen: only the adapters are
trained.

An adapter is a submodule of the block it follows (`model.layers.3.mlp.bottleneck`) and is applied
by a forward hook, which is a bound method of the adapter. The model's class does not change, so
copies, device moves, checkpointing and `generate` work as on the base.
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
from tuneyard_trainer.models.layers import decoder_layers, layer_indices, require_names

NAME = "bottleneck"
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class BottleneckAdapter(nn.Module):
    """A network of 2 * width * size + size + width parameters, in float32 over any base."""

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
        """Return the adapted hidden states: (..., width), in the dtype of `hidden`."""
        inner = self.activation(self.down(self.dropout(hidden.to(self.down.weight.dtype))))
        return hidden + self.up(inner).to(hidden.dtype)

    def after(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """The forward hook of the adapted block. Attention blocks return a tuple that starts with
        the hidden states."""
        if not self.enabled:
            return output
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


def attach(model: PreTrainedModel, settings: Bottleneck) -> PreTrainedModel:
    """Freeze `model` and attach adapters, whose weights are drawn from the global random state.

    Raises StageError if the architecture's blocks are not known.
    """
    if attached(model):
        raise ValueError("the model already has bottleneck adapters")
    _, layers = decoder_layers(model)
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
    """Return a decoder layer's attention block and the block's name in it. Raises StageError."""
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
        f"{type(layer).__name__} has no {what} block of a known name ({', '.join(names)}): it "
        f"holds {found}.",
        advice="Use adapter.lora with targets: all-linear, which needs no block names.",
    )


def _require_outside_residual(model: PreTrainedModel, block: nn.Module) -> None:
    if "residual" in inspect.signature(block.forward).parameters:
        raise StageError(
            "UnknownLayout",
            f"{type(model).__name__} adds the residual inside {type(block).__name__}, so an "
            "adapter cannot be inserted before it.",
            advice="Use adapter.lora instead.",
        )


def adapters_of(model: nn.Module) -> dict[str, BottleneckAdapter]:
    """Return the model's bottleneck adapters by their dotted names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BottleneckAdapter)}


def attached(model: nn.Module) -> bool:
    """Return whether the model has bottleneck adapters."""
    return bool(adapters_of(model))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """While active, the model computes what its base computes."""
    before = {adapter: adapter.enabled for adapter in adapters_of(model).values()}
    for adapter in before:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the config from which `settings_of` restores the adapters' settings."""
    name, _ = decoder_layers(model)
    adapters = adapters_of(model)
    layers = sorted({int(key.removeprefix(f"{name}.").split(".")[0]) for key in adapters})
    first = next(iter(adapters.values()))
    return {
        "size": first.down.out_features,
        "activation": first.activation_name,
        "dropout": first.dropout.p,
        "layers": layers,
    }


def settings_of(config: Mapping[str, Any]) -> Bottleneck:
    """Return the settings in a config of `config_of`. Raises pydantic's ValidationError, KeyError
    or TypeError."""
    return Bottleneck(
        size=config["size"],
        activation=config["activation"],
        dropout=config["dropout"],
        layers=",".join(str(index) for index in config["layers"]),
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors by their names in the model."""
    return {
        f"{name}.{key}": tensor
        for name, adapter in adapters_of(model).items()
        for key, tensor in adapter.state_dict().items()
    }


def assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set the adapters' tensors. Raises ValueError unless names and shapes are the same."""
    own = weights_of(model)
    require_names(own, weights)
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
                raise ValueError(f"{name} has shape {shapes}")
            tensor.copy_(weights[name])
