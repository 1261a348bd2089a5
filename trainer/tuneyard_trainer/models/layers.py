"""The layers of a causal language model: its decoder blocks, its head, and what of it is trained.

Shapes: N positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuneyard.api.training import Freeze
from tuneyard.errors import StageError
from tuneyard_trainer.models.probes import base_of


@contextmanager
def head_at(
    model: nn.Module, bins_N: Tensor, columns_N: Tensor, width: int
) -> Iterator[list[Tensor]]:
    """While active, the model's head sees (1, N, H) hidden states: those of the named positions.
    Gives a list to which each forward pass adds the (N, H) states that its head saw.

    A hook on the head rather than a call of the decoder alone, so that whatever an architecture
    does to its logits afterwards (scaling, soft-capping) still happens. Adapters that put virtual
    tokens before the input shift the columns; the hidden states' own width tells by how much.
    """

    seen: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BLH = args[0]
        shift = hidden_BLH.shape[1] - width
        seen.append(hidden_BLH[bins_N, columns_N + shift])
        return (seen[-1].unsqueeze(0), *args[1:])

    hook = head_of(model).register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        hook.remove()


def head_of(model: Any) -> nn.Linear:
    """The linear layer that makes logits of hidden states, of a plain model or under an adapter."""
    head: nn.Linear = base_of(model).get_output_embeddings()
    return head


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's layers, in order, and the dotted name of their list in the model."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise StageError(
        "LayersNotFound",
        f"{type(model).__name__} has no list of {count} decoder layers.",
        advice="Remove the layer ranges, or set model.uri to another architecture.",
    )


def layer_indices(ranges: str, count: int, field: str) -> list[int]:
    """The layers named by "0-3,8", ascending. `field`: the manifest field, for messages."""
    chosen: set[int] = set()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high or high >= count:
            wrong = "runs backwards" if low > high else f"asks for layer {high}"
            raise StageError(
                "LayerOutOfRange",
                f'{field} is "{ranges}": {part} {wrong}, and the model has {count} layers.',
                advice=f"Set {field} to ranges within 0-{count - 1}.",
            )
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def freeze(model: PreTrainedModel, settings: Freeze) -> None:
    """Takes the named parts out of training. Raises StageError where that cannot be done as asked,
    or where nothing would be left to train."""
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
                "training.freeze.head is set, and this model's head is its embeddings.",
                advice="Set training.freeze.embeddings too, or remove training.freeze.head.",
            )
        head.requires_grad_(False)
    if not trainable(model):
        raise StageError(
            "NothingToTrain",
            "training.freeze leaves no parameter to train.",
            advice="Freeze less: narrow training.freeze.layers.",
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> int:
    """All parameters, adapters included, tied ones once, 4-bit ones by what they stand for."""
    return sum(_size(parameter) for parameter in model.parameters())


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights to a byte
    return parameter.numel() if state is None else torch.Size(state.shape).numel()
