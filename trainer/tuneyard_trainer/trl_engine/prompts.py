"""Prompts for trainers that sample by themselves: TRL tokenizes the prompts, and must get our
tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuneyard.errors import StageError
from tuneyard_trainer.data.chat import transcript
from tuneyard_trainer.data.prompts import TokenizedPrompt


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
