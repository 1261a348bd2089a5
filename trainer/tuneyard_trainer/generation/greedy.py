"""Greedy continuations in batches: the same for the same weights, whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftType

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
    answers: dict[int, str] = {}
    encoded = tokenizer(list(prompts), add_special_tokens=add_special_tokens)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    for chosen in length_batches(lengths, BATCH, padded=not prompt_tuned(model)):
        padded = tokenizer.pad(
            {"input_ids": [encoded[i] for i in chosen]}, padding_side="left", return_tensors="pt"
        ).to(next(model.parameters()).device)
        texts = _generate(model, tokenizer, padded, max_new_tokens)
        answers.update(zip(chosen, texts, strict=True))
    return tuple(answers[i] for i in range(len(prompts)))


def length_batches(lengths: Sequence[int], size: int, *, padded: bool) -> Iterator[list[int]]:
    """Prompt indices, shortest first, at most `size` together; of one length unless `padded`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        differs = bool(batch) and lengths[index] != lengths[batch[0]]
        if len(batch) == size or (differs and not padded):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def prompt_tuned(model: Any) -> bool:
    """Whether PEFT puts virtual tokens into the input. It puts them before the padding and drops
    the positions (peft 0.21), so rows of unlike length must not be padded together."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.peft_type == PeftType.PROMPT_TUNING


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
