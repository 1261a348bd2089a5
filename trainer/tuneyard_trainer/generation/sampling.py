"""Answers sampled from a policy, each a function of the weights, its prompt and its own key.

A key names an answer; it seeds one uniform number for each of its tokens, and a token is where that
number falls in the cumulative distribution. So an answer does not depend on the batch or the worker
that it is sampled in (rounding aside), nothing random needs saving, and the same keys on other
weights give a comparison with less noise than fresh samples would.

Shapes: N answers, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TopPLogitsWarper

from tuneyard.api.alignment import Sampling
from tuneyard.errors import StageError
from tuneyard_trainer.data.chat import ChatFormat
from tuneyard_trainer.generation.batches import (
    generate,
    length_batches,
    own_stop_tokens,
    prompt_tuned,
)
from tuneyard_trainer.models.base import autocast

GPU_ANSWERS, CPU_ANSWERS = 256, 64
"""The most answers sampled at once: a step's cost hardly grows with them up to there."""
CACHE_SHARE, CPU_CACHE_BYTES = 0.25, 2 << 30
"""What their keys and values may take: of a GPU's memory, and on CPU."""


class Sampled(NamedTuple):
    """One answer, as an engine drew it."""

    tokens: tuple[int, ...]
    """Its stop token included, where it came to one."""
    logprobs: tuple[float, ...] | None = None
    """What the engine itself says of each token that it drew, in nats; None: it is the policy's own
    code that answered, and nothing can differ but rounding."""


class Sampler(Protocol):
    """Anything that answers: another engine needs this and nothing else."""

    def __call__(self, prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[Sampled]:
        """One answer to each prompt's tokens, by the policy as it is at the call. `keys`: one
        63-bit number for each, which names the answer."""
        ...

    def close(self) -> None:
        """Gives back what it holds; it answers nothing afterwards."""


@dataclass(frozen=True)
class TransformersSampler:
    """Hugging Face `generate` with its key-value cache, in batches of prompts of like length."""

    model: Any
    """A plain model, or one with an adapter; its weights may change between calls."""
    pad: int
    stop: tuple[int, ...]
    """The tokens that end an answer."""
    settings: Sampling
    precision: torch.dtype = torch.float32

    def __call__(self, prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[Sampled]:
        answers: dict[int, Sampled] = {}
        device = next(self.model.parameters()).device
        lengths = [len(prompt) for prompt in prompts]
        size = at_once(self.model, max(lengths, default=0) + self.settings.max_new_tokens, device)
        for chosen in length_batches(lengths, size, padded=not prompt_tuned(self.model)):
            sampled = self._batch([prompts[i] for i in chosen], [keys[i] for i in chosen], device)
            answers.update(zip(chosen, sampled, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def close(self) -> None:
        """The model is not its own: there is nothing to give back."""

    def _batch(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[int], device: torch.device
    ) -> list[Sampled]:
        limit = self.settings.max_new_tokens
        draw = InverseCdfSampler(uniforms(keys, limit).to(device), self.settings)
        with autocast(device, self.precision):
            completions = generate(
                self.model,
                prompts,
                pad=self.pad,
                stop=self.stop,
                max_new_tokens=limit,
                processors=[draw],  # leaves one possible token
            )
        return [Sampled(tokens) for tokens in completions]


def at_once(model: Any, length: int, device: torch.device) -> int:
    """How many answers' caches of `length` tokens there is room for; at least one."""
    most = GPU_ANSWERS if device.type == "cuda" else CPU_ANSWERS
    kept = token_bytes(model, device)
    if kept is None:
        return most
    return max(1, min(most, cache_room(device) // (kept * max(1, length))))


def cache_room(device: torch.device) -> int:
    """What the keys and values of answers may take, in bytes."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    return int(CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory)


def token_bytes(model: Any, device: torch.device) -> int | None:
    """What the keys and values of one token take; None: the architecture has another memory."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not getattr(config, "hidden_size", None):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = (getattr(config, "num_key_value_heads", None) or heads) * width
    return int(2 * config.num_hidden_layers * kept * (2 if device.type == "cuda" else 4))


class InverseCdfSampler(LogitsProcessor):
    """Leaves one token of each row: the one at which its uniform number falls."""

    def __init__(self, uniforms_NT: Tensor, settings: Sampling) -> None:
        self._uniforms_NT, self._temperature = uniforms_NT, settings.temperature
        self._nucleus = TopPLogitsWarper(settings.top_p) if settings.top_p < 1 else None
        self._position = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores_NV = scores.float() / self._temperature
        if self._nucleus:
            scores_NV = self._nucleus(input_ids, scores_NV)
        uniform_N1 = self._uniforms_NT[:, self._position, None]
        self._position += 1
        chosen_N1 = drawn(scores_NV, uniform_N1)
        return torch.full_like(scores_NV, -torch.inf).scatter_(1, chosen_N1, 0.0)


def drawn(logits_NV: Tensor, uniform_N1: Tensor) -> Tensor:
    """(N, 1) the first token at which the cumulative distribution exceeds the uniform number. In
    float64: a cumulative sum in float32 loses the tail of a large vocabulary."""
    cumulative_NV = logits_NV.softmax(-1).double().cumsum(-1)
    target_N1 = uniform_N1 * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, target_N1, right=True)


def uniforms(keys: Sequence[int], count: int) -> Tensor:
    """(N, count) numbers in [0, 1) of float64, each row a function of its key."""
    rows = [np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]
    # Just below 1, so that no product with a sum that rounding left below 1 ever reaches it.
    return torch.from_numpy(np.stack(rows)) * (1 - 1e-12)


def stop_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, the model's own (Llama 3 has three) and the
    chat template's. `template`: in place of the tokenizer's. Raises StageError NoStopToken."""
    found = {*own_stop_tokens(model), tokenizer.eos_token_id}
    if template or tokenizer.chat_template:
        found.add(_template_stop(tokenizer, template))
    found.discard(None)
    if not found:
        raise StageError(
            "NoStopToken",
            "neither the tokenizer nor the model names a token that ends an answer.",
            advice="Choose another model.uri.",
        )
    return tuple(sorted(found))


def _template_stop(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int:
    speaking = copy.copy(tokenizer)
    speaking.chat_template = template or tokenizer.chat_template
    token: Any = tokenizer.convert_tokens_to_ids(ChatFormat.of(speaking).stop_token)
    return int(token)
