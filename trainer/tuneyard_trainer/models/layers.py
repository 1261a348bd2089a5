"""The layers of a causal language model: its decoder blocks, its head, and its trained parameters.

Shapes: N positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuneyard.api.training import Freeze
from tuneyard.errors import StageError
from tuneyard_trainer.models.probes import base_of
from tuneyard_trainer.models.sharding import reshard


@contextmanager
def head_at(
    model: nn.Module, bins_N: Tensor, columns_N: Tensor, width: int
) -> Iterator[list[Tensor]]:
    """While active, the model's head receives only the hidden states of N positions, as (1, N, H).

    Position n is row `bins_N[n]`, column `columns_N[n]` of an input that is `width` tokens wide.
    Yields a list to which each forward pass appends the (N, H) states that the head received.

    The hook is on the head, so the logits are still processed as the architecture does (scaling,
    soft-capping). Adapters that put virtual tokens before the input shift the columns by the
    difference between the hidden states' width and `width`.
    """

    received: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BLH = args[0]
        shift = hidden_BLH.shape[1] - width
        received.append(hidden_BLH[bins_N, columns_N + shift])
        return (received[-1].unsqueeze(0), *args[1:])

    hook = head_of(model).register_forward_pre_hook(select)
    try:
        yield received
    finally:
        hook.remove()


def head_of(model: Any) -> nn.Linear:
    """Return the linear layer that computes logits, of a plain model or one with an adapter."""
    head: nn.Linear = base_of(model).get_output_embeddings()
    return head


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the dotted name of the list of decoder layers in the model, and the list."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise StageError(
        "LayersNotFound",
        f"{type(model).__name__} has no list of {count} decoder layers.",
        advice="Remove the layer ranges, or set model.uri to another architecture.",
    )


def layer_ranges(ranges: str) -> list[tuple[int, int]]:
    """Return the first and the last layer of each part of ranges such as "0-3,8"."""
    parts = [part.partition("-") for part in ranges.split(",")]
    return [(int(first), int(last or first)) for first, _, last in parts]


def layer_indices(ranges: str | None, count: int, field: str) -> list[int]:
    """Return the indices of layers such as "0-3,8", ascending; None: all `count` layers.

    `field`: the manifest field, for messages. Raises StageError LayerOutOfRange.
    """
    if ranges is None:
        return list(range(count))
    chosen: set[int] = set()
    for part, (low, high) in zip(ranges.split(","), layer_ranges(ranges), strict=True):
        if low > high or high >= count:
            wrong = "is descending" if low > high else f"names layer {high}"
            raise StageError(
                "LayerOutOfRange",
                f'{field} is "{ranges}": {part} {wrong}, and the model has {count} layers.',
                advice=f"Set {field} to ranges within 0-{count - 1}.",
            )
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def freeze(model: PreTrainedModel, settings: Freeze) -> None:
    """Freeze the parts of the model that the settings name. Raises StageError if a part cannot be
    frozen alone, or if no parameter would be trained."""
    if settings.layers:
        _, layers = decoder_layers(model)
        for index in layer_indices(settings.layers, len(layers), "training.freeze.layers"):
            layers[index].requires_grad_(False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if settings.embeddings:
        embeddings.requires_grad_(False)
    if settings.head:
        if head.weight is embeddings.weight and not settings.embeddings:
            raise StageError(
                "TiedHead",
                "training.freeze.head is set, and this model's head is tied to its embeddings.",
                advice="Set training.freeze.embeddings too, or remove training.freeze.head.",
            )
        head.requires_grad_(False)
    if not trainable(model):
        raise StageError(
            "NothingToTrain",
            "training.freeze leaves no parameter to train.",
            advice="Set training.freeze.layers to fewer layers.",
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, tied ones once. Of a shared model, the shards."""
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, adapters included. Tied ones count once, 4-bit ones by the
    number of weights that they encode."""
    return sum(_size(parameter) for parameter in model.parameters())


def require_names(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless both hold tensors of the same names."""
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())
        raise ValueError(f"{len(odd)} tensors are missing or unknown: {', '.join(odd[:5])}")


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights to a byte
    return parameter.numel() if state is None else torch.Size(state.shape).numel()
