"""Greedy answers to texts. They do not depend on the batch, except by rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tuneyard_trainer.generation.engines import Engine


def continuations(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    add_special_tokens: bool,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[str, ...]:
    """Return the engine's greedy continuation of each prompt, in the order of the prompts and
    without special tokens. The engine is prepared for them.

    `add_special_tokens`: as `token_ids` takes it. `before_batch`: called before each batch; what it
    raises ends the call.
    """
    if not prompts:
        return ()
    tokens = engine.complete(
        token_ids(tokenizer, prompts, add_special_tokens=add_special_tokens),
        max_new_tokens=max_new_tokens,
        before_batch=before_batch,
    )
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return tuple(str(text).strip() for text in texts)


def token_ids(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Return the tokens of each text.

    `add_special_tokens`: tokenize each text with the tokenizer's special tokens. Texts that a chat
    template rendered already hold them.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens)
    found: list[list[int]] = encoded["input_ids"]
    return found
