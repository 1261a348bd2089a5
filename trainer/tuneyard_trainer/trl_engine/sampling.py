"""The common needs of trainers that sample by themselves: TRL tokenizes the prompts, and must get
our tokens; it generates, and must end completions as Tuneyard does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import transcript
from tuneyard_trainer.data.prompts import TokenizedPrompt
from tuneyard_trainer.models.layers import head_of
from tuneyard_trainer.models.probes import base_of, ignores_left_padding

WRITTEN_BY_TRL = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
"""The fields of the model's config that TRL or transformers' Trainer sets."""


def for_trl(prompt: TokenizedPrompt, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a prompt as TRL takes it: a conversation for the chat template, or a text."""
    messages = prompt.prompt.messages
    return [dict(turn) for turn in messages] if tokenizer.chat_template else transcript(messages)


def require_same_tokens(
    prompts: Sequence[TokenizedPrompt], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise StageError TokensDiffer if the tokens that TRL makes of a prompt are not ours. The
    calls of the tokenizer are TRL's."""
    given = [for_trl(prompt, tokenizer) for prompt in prompts]
    if tokenizer.chat_template:
        encoded: Any = tokenizer.apply_chat_template(
            conversation=given, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    else:
        encoded = tokenizer(text=given)
    pairs = zip(prompts, encoded["input_ids"], strict=True)
    differing = [prompt.prompt.where for prompt, ids in pairs if list(prompt.ids) != list(ids)]
    if differing:
        raise StageError(
            "TokensDiffer",
            f"TRL makes other tokens than Tuneyard of {len(differing)} of {len(prompts)} prompts: "
            f"{', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}.",
            advice="Leave these prompts out, or change the chat template.",
        )


def own_share(count: int, world_size: int) -> int:
    """Return how many of `count` rows of a step one worker has. Raises StageError UnevenBatch."""
    if count % world_size:
        raise StageError(
            "UnevenBatch",
            f"a step has {count} completions, which {world_size} workers cannot share equally, as "
            "TRL needs it.",
            advice=f"Set training.batchSize to a multiple of {world_size}, or compute.workers to a "
            f"divisor of {count}.",
        )
    return count // world_size


def require_trainable(models: Sequence[nn.Module], advice: str) -> None:
    """Raise StageError EngineUnsupported if TRL would compute other log-probabilities than those of
    one of the models."""
    for model in models:
        problem = None
        if isinstance(head_of(model), BaseTunerLayer):
            problem = "it computes logits without the adapter of the head"
        elif not ignores_left_padding(model):
            problem = "it pads prompts on the left, which this model's positions count"
        if problem:
            raise StageError(
                "EngineUnsupported",
                f"TRL cannot use {type(base_of(model)).__name__} here: {problem}.",
                advice=advice,
            )


@contextmanager
def ends_at(model: nn.Module, stop: Sequence[int]) -> Iterator[None]:
    """While active, completions end at these tokens, and no other generation setting of the model
    applies. TRL writes into the model's configs, which are the result's too: they are restored."""
    base: Any = base_of(model)
    own, config = base.generation_config, base.config.get_text_config()
    before = {name: getattr(config, name, None) for name in WRITTEN_BY_TRL}
    base.generation_config = GenerationConfig(eos_token_id=list(stop))
    try:
        yield
    finally:
        base.generation_config = own
        for name, value in before.items():
            setattr(config, name, value)
