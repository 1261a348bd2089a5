"""Greedy continuations in batches: the same for the same weights, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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
    answers: dict[int, str] = {}
    shortest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), BATCH):
        chosen = shortest_first[start : start + BATCH]
        encoded = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=add_special_tokens,
        ).to(next(model.parameters()).device)
        texts = _generate(model, tokenizer, encoded, max_new_tokens)
        answers.update(zip(chosen, texts, strict=True))
    return tuple(answers[i] for i in range(len(prompts)))


def _generate(model: Any, tokenizer: Any, encoded: Any, max_new_tokens: int) -> list[str]:
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    fresh = output[:, encoded["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(fresh, skip_special_tokens=True)]
