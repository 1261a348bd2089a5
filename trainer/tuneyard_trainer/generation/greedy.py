"""Greedy completions of prompts in batches. They do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tuneyard_trainer.generation.batches import (
    generate,
    length_batches,
    own_stop_tokens,
    prompt_tuned,
)
from tuneyard_trainer.generation.prefixes import Prefix

BATCH = 32
"""Prompts in a batch: with a 1k-token prompt the cache of a 1B model then takes about 2 GiB."""


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    add_special_tokens: bool,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[str, ...]:
    """Return the model's greedy continuation of each prompt, in the order of the prompts.

    `add_special_tokens`: tokenize each prompt with the tokenizer's special tokens. Prompts that a
    chat template rendered already hold them. `before_batch`: called before each batch; what it
    raises ends the call.
    """
    if not prompts:
        return ()
    completions: dict[int, str] = {}
    encoded = tokenizer(list(prompts), add_special_tokens=add_special_tokens)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    prefix = Prefix.of(model, encoded)
    for chosen in length_batches(lengths, BATCH, padded=not prompt_tuned(model)):
        before_batch()
        tokens = generate(
            model,
            [encoded[i] for i in chosen],
            pad=tokenizer.pad_token_id,
            stop=own_stop_tokens(model),
            max_new_tokens=max_new_tokens,
            prefix=prefix,
        )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        completions.update((i, text.strip()) for i, text in zip(chosen, texts, strict=True))
    return tuple(completions[i] for i in range(len(prompts)))
