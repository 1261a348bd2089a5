"""Completions sampled from a policy: each depends only on the weights, its prompt and its key.

A key seeds one uniform number for each token of a completion, and inverse transform sampling turns
the number into the token. A completion therefore depends neither on its batch nor on its worker,
except by rounding, and no random state is saved. Two models that sample with the same keys can be
compared with less noise than two that sample with different keys.

Shapes: N completions, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TopPLogitsWarper

from tuneyard.api.alignment import Sampling
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import ChatFormat
from tuneyard_trainer.generation.batches import (
    generate,
    length_batches,
    own_stop_tokens,
    prompt_tuned,
)
from tuneyard_trainer.models.base import autocast
from tuneyard_trainer.models.sharding import in_step

GPU_BATCH, CPU_BATCH = 256, 64
"""The most completions in a batch: up to this size, the cost of a step hardly grows."""
CACHE_SHARE, CPU_CACHE_BYTES = 0.25, 2 << 30
"""The most memory of a batch's key-value cache: a share of a GPU's memory, and bytes on CPU."""
MAX_SAMPLER_LOGPROB_GAP = 0.25
"""The most by which an engine's log-probabilities may differ from the model's, in nats, mean over
tokens. bfloat16's 8 bits round a logit of 10 by hundredths; an engine that kept the initial weights
of its head had a gap of about one."""


class Sampled(NamedTuple):
    """One completion, as an engine sampled it."""

    tokens: tuple[int, ...]
    """The completion's tokens, with the stop token if there is one."""
    logprobs: tuple[float, ...] | None = None
    """The engine's log-probability of each token, in nats. None: the policy's own code sampled the
    tokens, so the log-probabilities differ from the policy's by rounding only."""


class Sampler(Protocol):
    """The interface of a sampling engine."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        before_batch: Callable[[], None] = lambda: None,
    ) -> list[Sampled]:
        """Sample one completion of each prompt from the policy's present weights.

        `keys`: one 63-bit number for each completion. `before_batch`: called before each batch of
        the engine; what it raises ends the call.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory. The sampler cannot be used afterwards."""


@dataclass(frozen=True)
class TransformersSampler:
    """A sampler on Hugging Face `generate`, in batches of prompts of similar length."""

    model: Any
    """A plain model, or one with an adapter. Its weights may change between calls. Workers that
    share it call the sampler together, each with its own prompts, or with none."""
    pad: int
    stop: tuple[int, ...]
    """The tokens that end a completion."""
    settings: Sampling
    precision: torch.dtype = torch.float32

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        before_batch: Callable[[], None] = lambda: None,
    ) -> list[Sampled]:
        completions: dict[int, Sampled] = {}
        device = next(self.model.parameters()).device
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths, default=0) + self.settings.max_new_tokens
        size = batch_size(self.model, longest, device)
        own = [*length_batches(lengths, size, padded=not prompt_tuned(self.model))]
        for chosen, is_own in in_step(self.model, own, []):
            before_batch()
            if not is_own:  # transformers generates until all workers are done
                self._batch([[self.pad]], [0], device)
                continue
            sampled = self._batch([prompts[i] for i in chosen], [keys[i] for i in chosen], device)
            completions.update(zip(chosen, sampled, strict=True))
        return [completions[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Do nothing: the caller owns the model."""

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


def batch_size(model: Any, length: int, device: torch.device) -> int:
    """Return how many completions fit the cache if each has `length` tokens with its prompt; at
    least one."""
    largest = GPU_BATCH if device.type == "cuda" else CPU_BATCH
    per_token = cache_bytes_per_token(model, device)
    if per_token is None:
        return largest
    return max(1, min(largest, cache_bytes(device) // (per_token * max(1, length))))


def cache_bytes(device: torch.device) -> int:
    """Return the most bytes that a batch's key-value cache may take."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    return int(CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory)


def cache_bytes_per_token(model: Any, device: torch.device) -> int | None:
    """Return the bytes of one token's keys and values. None: the architecture has no attention
    heads, so the size is unknown."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not getattr(config, "hidden_size", None):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = (getattr(config, "num_key_value_heads", None) or heads) * width
    return int(2 * config.num_hidden_layers * kept * (2 if device.type == "cuda" else 4))


class InverseCdfSampler(LogitsProcessor):
    """Leaves one possible token in each row: the one that the row's uniform number picks."""

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
        chosen_N1 = pick_tokens(scores_NV, uniform_N1)
        return torch.full_like(scores_NV, -torch.inf).scatter_(1, chosen_N1, 0.0)


def pick_tokens(logits_NV: Tensor, uniform_N1: Tensor) -> Tensor:
    """Return (N, 1) the first token at which the cumulative distribution exceeds the uniform
    number. The sum is in float64: float32 loses the tail of a large vocabulary."""
    cumulative_NV = logits_NV.softmax(-1).double().cumsum(-1)
    target_N1 = uniform_N1 * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, target_N1, right=True)


def uniforms(keys: Sequence[int], count: int) -> Tensor:
    """Return (N, count) float64 numbers in [0, 1). Each row depends on its key alone."""
    rows = [np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]
    # Rounding may leave the cumulative sum below 1: the factor keeps the target below that sum.
    return torch.from_numpy(np.stack(rows)) * (1 - 1e-12)


def stop_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> tuple[int, ...]:
    """Return the tokens that end a completion: the tokenizer's, the model's own and the chat
    template's.

    `template`: used instead of the tokenizer's. Raises StageError NoStopToken.
    """
    found = {*own_stop_tokens(model), tokenizer.eos_token_id}
    if template or tokenizer.chat_template:
        found.add(_template_stop(tokenizer, template))
    found.discard(None)
    if not found:
        raise StageError(
            "NoStopToken",
            "neither the tokenizer nor the model names a stop token.",
            advice="Choose another model.uri.",
        )
    return tuple(sorted(found))


def _template_stop(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int:
    templated = copy.copy(tokenizer)
    templated.chat_template = template or tokenizer.chat_template
    token: Any = tokenizer.convert_tokens_to_ids(ChatFormat.of(templated).stop_token)
    return int(token)
