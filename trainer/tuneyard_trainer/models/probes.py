"""Probes: properties of a model that are measured by running it on a few random tokens.

The names and flags of architectures are not reliable for this, and new architectures appear every
month. Shapes of token ids and logits: (rows, tokens) and (rows, tokens, vocabulary).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8
"""Length of a random document."""


def base_of(model: Any) -> Any:
    """Return the model inside PEFT's wrapper, which has the adapter's layers; else `model`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def isolates_documents(model: nn.Module) -> bool:
    """Return whether the model keeps documents in one row apart if only their positions, which
    restart at 0, separate them. Training packs documents only if this holds.

    The probe runs two rows of two random documents. The second documents' logits must not change
    with the first documents (a leak), and must equal those of the second documents alone (positions
    are respected). There are two rows because flash attention reads such positions only in a batch
    of 1. State space models leak; virtual tokens precede only the first document of a row.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    base = base_of(model)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    first, second, other = _random_documents(model, 3)
    positions = torch.arange(TOKENS, device=first.device).repeat(2, 2)
    with probing(model):
        packed = _last_logits(model, torch.cat((first, second), 1), positions)
        beside_another = _last_logits(model, torch.cat((other, second), 1), positions)
        alone = _last_logits(model, second, positions[:, :TOKENS])
    # Equal shapes give equal results, except for the order of experts; other shapes round
    # differently.
    leak, shift = (1e-5, 1e-4) if packed.dtype is torch.float32 else (1e-2, 5e-2)
    scale = alone.float().abs().max()
    return _within(packed, beside_another, leak * scale) and _within(packed, alone, shift * scale)


def is_causal(model: nn.Module) -> bool:
    """Return whether no token attends to later tokens."""
    start, end, other = _random_documents(model, 3)
    with probing(model):
        logits = model(input_ids=torch.cat((start, end), 1), use_cache=False).logits[:, :TOKENS]
        changed = model(input_ids=torch.cat((start, other), 1), use_cache=False).logits[:, :TOKENS]
    return _within(logits, changed, 1e-5 * logits.float().abs().max())


def ignores_left_padding(model: nn.Module) -> bool:
    """Return whether padding before a document leaves its logits as they are, without positions
    that say where the document starts. Learned absolute positions count the padding, and virtual
    tokens are moved away from the document."""
    padding, document, _ = _random_documents(model, 3)
    mask = torch.ones_like(document)
    with probing(model):
        padded = model(
            input_ids=torch.cat((padding, document), 1),
            attention_mask=torch.cat((torch.zeros_like(mask), mask), 1),
            use_cache=False,
        ).logits[:, -TOKENS:]
        alone = model(input_ids=document, attention_mask=mask, use_cache=False).logits
    alone = alone[:, -TOKENS:]  # some adapters return the virtual tokens' logits too
    tolerance = 1e-4 if alone.dtype is torch.float32 else 5e-2
    return _within(padded, alone, tolerance * alone.float().abs().max())


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """While active, the model is in evaluation mode without gradients. Then every module's mode and
    the random state are restored."""
    modes = [(module, module.training) for module in model.modules()]
    device = _device(model)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _random_documents(model: nn.Module, count: int) -> list[Tensor]:
    """Return `count` tensors of (2, TOKENS) token ids, the same in every call."""
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (count, 2, TOKENS), generator=generator)
    return list(ids.to(_device(model)))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _last_logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, -TOKENS:]


def _within(a: Tensor, b: Tensor, tolerance: Tensor) -> bool:
    return bool((a.float() - b.float()).abs().max() <= tolerance)
