"""Held-out rows without the context that `retrieval` put before their questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuneyard_trainer.data.encoding.chat import TrainOn
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.reading.example import Example, Message
from tuneyard_trainer.data.texts import WITHOUT_CONTEXT


def texts_without_context(texts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows without their contexts; []: they have none."""
    return [text[WITHOUT_CONTEXT] for text in texts if WITHOUT_CONTEXT in text]


def tokenized(
    texts: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn,
    max_length: int,
) -> Rows:
    """Return the rows as tokens, cut off after `max_length` of them, with `train_on` as targets.

    `texts`: at least one. Rows without a target are left out.
    """
    encoder = Encoder(tokenizer, train_on)
    rows = []
    for found in encoder.encode([_example(text) for text in texts]):
        if isinstance(found, Encoded) and found.mask[:max_length].any():
            rows.append(Encoded(found.ids[:max_length], found.mask[:max_length]))
    return Rows.of([row.ids for row in rows], [row.mask for row in rows])


def _example(text: Mapping[str, Any]) -> Example:
    if "messages" not in text:
        prompt, completion = text["prompt"], text["completion"]
        return Example(0, "completion", prompt=prompt, completion=completion)
    turns = tuple(
        Message(turn["role"], turn["content"], reasoning=turn.get("reasoning_content", ""))
        for turn in text["messages"]
    )
    return Example(0, "chat", turns, tools=tuple(text.get("tools", ())))
