"""Worked examples before a question: what prompting alone gets from the base model, and its price.

The examples are training rows, the same ones before all questions. Shapes: N answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import rendered
from tuneyard_trainer.data.reading.conversations import Message
from tuneyard_trainer.data.texts import EXAMPLES
from tuneyard_trainer.evaluation.questions import Question

BETWEEN = "\n\n"
"""The text between plain examples."""


@dataclass(frozen=True)
class FewShot:
    """The questions with worked examples before each."""

    questions: Sequence[Question]
    examples: int
    """Examples before each question."""
    tokens: float
    """Tokens that the examples add to a question, on average."""

    @property
    def metrics(self) -> dict[str, float]:
        """The number of examples and their price."""
        return {"fewShotExamples": float(self.examples), "fewShotTokens": self.tokens}

    def answers(self, continued: Sequence[str]) -> tuple[str, ...]:
        """Return the answers in the model's continuations. After an answer in plain text, the model
        goes on with another example."""
        return tuple(
            text if question.templated else text.partition(BETWEEN)[0]
            for question, text in zip(self.questions, continued, strict=True)
        )


def few_shot(
    folder: Path, questions: Sequence[Question], tokenizer: Any, count: int, room: int | None
) -> FewShot:
    """Return the questions with `count` examples from a prepare stage's output, or fewer if a
    question then has more than `room` tokens. None: there is no limit.

    Raises StageError NoExamples if there is no example, or no room for one.
    """
    path = folder / EXAMPLES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    plain = [len(ids) for ids in _ids(tokenizer, questions)]
    for number in range(min(count, len(rows)), 0, -1):
        shown = [_with_examples(question, rows[:number], tokenizer) for question in questions]
        lengths = [len(ids) for ids in _ids(tokenizer, shown)]
        if room is None or max(lengths, default=0) <= room:
            added = np.mean(np.array(lengths) - np.array(plain)) if questions else 0.0
            return FewShot(shown, number, float(added))
    raise StageError(
        "NoExamples",
        f"evaluate.fewShot is {count}, and no training row can stand before the held-out "
        f"questions: {len(rows)} of them have a prompt that is not held out, and a question with "
        f"an example may have {room or 'any number of'} tokens.",
        advice="Remove evaluate.fewShot, or shorten the rows or evaluate.maxNewTokens.",
    )


def _ids(tokenizer: Any, questions: Sequence[Question]) -> list[list[int]]:
    if not questions:
        return []
    special = not any(question.templated for question in questions)
    found: list[list[int]] = tokenizer(
        [question.text for question in questions], add_special_tokens=special
    )["input_ids"]
    return found


def _with_examples(
    question: Question, rows: Sequence[Mapping[str, Any]], tokenizer: Any
) -> Question:
    """Return a question after worked examples: as earlier turns of its conversation, or as text."""
    if not question.templated:
        texts = [_plain(row) for row in rows]
        return replace(question, text=BETWEEN.join([*texts, question.text]))
    prompt = question.prompt
    is_system = prompt.messages[0]["role"] == "system"
    system, turns = prompt.messages[:is_system], prompt.messages[is_system:]
    shown = chain.from_iterable(_turns(row) for row in rows)
    return replace(
        question, text=rendered(tokenizer, [*system, *shown, *turns], tools=prompt.tools)
    )


def _turns(row: Mapping[str, Any]) -> list[Message]:
    """Return the turns of an example. The system turn is that of the question."""
    if "messages" in row:
        return [turn for turn in row["messages"] if turn["role"] != "system"]
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def _plain(row: Mapping[str, Any]) -> str:
    if "messages" in row:
        return BETWEEN.join(str(turn["content"]) for turn in _turns(row))
    return f"{row['prompt']}{row['completion']}"
