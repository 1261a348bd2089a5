"""The tokens that several prompts begin with, computed once: worked examples, a system prompt.

Shapes: N prompts, P tokens of the prefix.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tuneyard_trainer.models.probes import base_of, probing

SHORTEST = 32
"""Tokens of a prefix that is worth a forward pass of its own. The header of a chat template has
fewer."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that prompts begin with, and a model's keys and values of them."""

    ids: tuple[int, ...]
    _cache: DynamicCache
    """Of one row."""

    @classmethod
    def of(cls, model: Any, prompts: Sequence[Sequence[int]]) -> Self | None:
        """Return the longest prefix of all prompts, which leaves at least a token of each.

        None: it is shorter than SHORTEST, there is one prompt, or the model's cache is not of keys
        and values of all tokens: a state space has no such cache, and a sliding window counts the
        padding that follows the prefix. The cache is of the model's present weights.
        """
        ids = common_prefix(prompts)
        if len(prompts) < 2 or len(ids) < SHORTEST or not _attends_to_all(model):
            return None
        device = next(model.parameters()).device
        # The logits of all tokens would take 0.6 GB for 1,000 tokens of a vocabulary of 150,000.
        known = inspect.signature(base_of(model).forward).parameters
        fewer = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        with probing(model):
            found = model(
                input_ids=torch.tensor([ids], device=device),
                past_key_values=DynamicCache(),
                use_cache=True,
                **fewer,
            ).past_key_values
        if not isinstance(found, DynamicCache):
            return None
        if any(type(layer) is not DynamicLayer for layer in found.layers):
            return None
        return cls(tuple(ids), found)

    def cache(self, rows: int) -> DynamicCache:
        """Return a copy of the cache for as many rows, which `generate` extends."""
        repeated = copy.deepcopy(self._cache)
        repeated.batch_repeat_interleave(rows)
        return repeated


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest sequence that all prompts begin with, and that leaves a token of each."""
    if not prompts:
        return []
    # All prompts lie between the first and the last one in lexical order.
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    most = min(map(len, prompts)) - 1
    count = next((i for i in range(max(0, most)) if low[i] != high[i]), max(0, most))
    return list(low[:count])


def _attends_to_all(model: Any) -> bool:
    """Return whether each layer attends to all earlier tokens, and no virtual tokens come first."""
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        return False
    config = base_of(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return not getattr(config, "sliding_window", None)
