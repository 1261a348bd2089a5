"""The held-out rows of fine-tuning data, and the questions that models answer from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import rendered
from tuneyard_trainer.data.prepared import Prepared, Rows
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.data.reading.conversations import turn_text
from tuneyard_trainer.evaluation.without_context import texts_without_context, tokenized

MAX_QUESTIONS = 256
"""Held-out rows with `expected` that the models answer, from the start of the file."""
PROMPT_SHARE = 0.5
"""The share of a plain text that is the prompt; the model continues it."""

GIVEN = ""
"""The suffix of the metrics of the rows as they are."""
WITHOUT_CONTEXT = "WithoutContext"
"""The suffix of the metrics of rows without their retrieved contexts."""
OF_GAPS = "OfGaps"
"""The suffix of the metrics of held-out documents with a gap, which is their only target."""


@dataclass(frozen=True)
class Question:
    """A held-out row that the models answer."""

    prompt: Prompt
    text: str
    """What the model continues."""
    reference: str
    expected: tuple[str, ...]
    """Any of these texts in an answer makes it right, by the rule of `reporting.answers`; empty:
    the answer is not checked."""
    templated: bool = False
    """Whether a chat template rendered the text, special tokens included."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The texts that metrics of answers compare an answer with."""
        return self.expected or (self.reference,)


@dataclass(frozen=True)
class HeldOutRows:
    """Held-out rows, and those of them that the models answer."""

    rows: Rows
    questions: Sequence[Question]


def held_out_rows(
    folder: Path, data: Prepared, tokenizer: Any, count: int
) -> dict[str, HeldOutRows]:
    """Return the held-out rows of a prepare stage's output by the suffix of their metrics.

    `count`: the fewest questions, if there are so many rows. Raises StageError NoHeldOutRows.
    """
    if data.validation is None:
        raise StageError(
            "NoHeldOutRows",
            "there are no held-out rows to evaluate on.",
            advice="Set data.validation.",
        )
    with (folder / "validation.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    found = {GIVEN: HeldOutRows(data.validation, questions_of(texts, tokenizer, count))}
    if bare := texts_without_context(texts):
        rows = tokenized(bare, tokenizer, data.summary["trainOn"], data.max_length)
        found[WITHOUT_CONTEXT] = HeldOutRows(rows, questions_of(bare, tokenizer, 0))
    if data.gaps is not None:
        found[OF_GAPS] = HeldOutRows(data.gaps, ())
    return found


def questions_of(texts: Sequence[Mapping[str, Any]], tokenizer: Any, count: int) -> list[Question]:
    """Return the rows to answer: those with `expected`, then others up to `count` in total."""
    questions = [_question(f"row {n}", text, tokenizer) for n, text in enumerate(texts, start=1)]
    checked = [q for q in questions if q.expected][:MAX_QUESTIONS]
    others = [q for q in questions if not q.expected]
    return checked + others[: max(0, count - len(checked))]


def _question(where: str, row: Mapping[str, Any], tokenizer: Any) -> Question:
    expected = tuple(row.get("expected", ()))
    if "messages" in row:
        *turns, answer = row["messages"]
        tools = tuple(row.get("tools", ()))
        text = rendered(tokenizer, turns, tools=tools)
        prompt = Prompt(tuple(turns), where, row, tools)
        return Question(prompt, text, turn_text(answer), expected, templated=True)
    if "prompt" in row:
        return Question(
            _plain(row["prompt"], where, row), row["prompt"], row["completion"], expected
        )
    words = row["text"].split(" ")
    start = " ".join(words[: max(1, min(32, int(len(words) * PROMPT_SHARE)))])
    reference = row["text"][len(start) :].strip()[:500]
    return Question(_plain(start, where, row), start, reference, expected)


def _plain(text: str, where: str, row: Mapping[str, Any]) -> Prompt:
    return Prompt(({"role": "user", "content": text},), where, row)
