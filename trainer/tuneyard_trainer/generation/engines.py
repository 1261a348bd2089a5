"""The engines of an evaluation: the libraries with which a measured model completes prompts.

`transformers` is here, and vLLM in `generation.vllm`, which is an extra.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tuneyard.api.alignment import Sampling
from tuneyard_trainer.generation.batches import (
    generate,
    length_batches,
    own_stop_tokens,
    prompt_tuned,
)
from tuneyard_trainer.generation.prefixes import Prefix
from tuneyard_trainer.generation.sampling import TransformersSampler

BATCH = 32
"""Prompts in a batch: with a 1k-token prompt the cache of a 1B model then takes about 2 GiB."""


class Engine(Protocol):
    """An engine for one model, whose weights may change between calls."""

    def prepare(self, longest: int) -> None:
        """Get ready for prompts that have up to `longest` tokens with their completions. All
        workers call it, and then `complete` or `sample` with prompts of their own, or with none."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        before_batch: Callable[[], None],
    ) -> list[tuple[int, ...]]:
        """Return the most likely completion of each prompt, up to and with its first stop token,
        which the model's own generation settings name.

        `before_batch`: called before each batch; what it raises ends the call.
        """
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        *,
        stop: tuple[int, ...],
        settings: Sampling,
        before_batch: Callable[[], None],
    ) -> list[tuple[int, ...]]:
        """Return one sampled completion of each prompt, with its stop token if it has one. `keys`:
        as `Sampler` takes them. `stop`: the tokens that end a completion."""
        ...

    def close(self) -> None:
        """Free the engine's own memory."""


@dataclass(frozen=True)
class TransformersEngine:
    """Hugging Face `generate`, in batches of prompts of similar length. The tokens that all prompts
    begin with are computed once."""

    model: Any
    pad: int
    """The token that fills batches."""

    def prepare(self, longest: int) -> None:
        """Do nothing: a batch takes what its prompts need."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        before_batch: Callable[[], None],
    ) -> list[tuple[int, ...]]:
        """Return the most likely completion of each prompt. It does not depend on the batch."""
        found: dict[int, tuple[int, ...]] = {}
        prefix = Prefix.of(self.model, prompts)
        lengths = [len(prompt) for prompt in prompts]
        for chosen in length_batches(lengths, BATCH, padded=not prompt_tuned(self.model)):
            before_batch()
            tokens = generate(
                self.model,
                [prompts[i] for i in chosen],
                pad=self.pad,
                stop=own_stop_tokens(self.model),
                max_new_tokens=max_new_tokens,
                prefix=prefix,
            )
            found.update(zip(chosen, tokens, strict=True))
        return [found[i] for i in range(len(prompts))]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        *,
        stop: tuple[int, ...],
        settings: Sampling,
        before_batch: Callable[[], None],
    ) -> list[tuple[int, ...]]:
        """Return one sampled completion of each prompt."""
        sampler = TransformersSampler(self.model, self.pad, stop, settings)
        return [sampled.tokens for sampled in sampler(prompts, keys, before_batch)]

    def close(self) -> None:
        """Do nothing: the caller owns the model."""
