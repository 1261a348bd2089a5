"""Greedy continuations in batches: the same for the same weights, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuneyard_trainer.generation.batches import (
    generate,
    length_batches,
    own_stop_tokens,
    prompt_tuned,
)

BATCH = 32
"""Prompts at a time; with a 1k-token prompt the cache of a 1B model then takes about 2 GiB."""


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    add_special_tokens: bool,
) -> tuple[str, ...]:
    """What the model continues each prompt with, greedily, in the prompts' order.

    `add_special_tokens`: put the tokenizer's own before each prompt; prompts that a chat template
    rendered hold theirs already.
    """
    if not prompts:
        return ()
    completions: dict[int, str] = {}
    encoded = tokenizer(list(prompts), add_special_tokens=add_special_tokens)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    for chosen in length_batches(lengths, BATCH, padded=not prompt_tuned(model)):
        tokens = generate(
            model,
            [encoded[i] for i in chosen],
            pad=tokenizer.pad_token_id,
            stop=own_stop_tokens(model),
            max_new_tokens=max_new_tokens,
        )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        completions.update((i, text.strip()) for i, text in zip(chosen, texts, strict=True))
    return tuple(completions[i] for i in range(len(prompts)))
