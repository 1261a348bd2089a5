"""Prompts that a model answers, and the texts that each answer is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneyard_trainer.data.prompts import Prompt, prompt_turns
from tuneyard_trainer.data.reading.example import RowError
from tuneyard_trainer.evaluation.suites.rows import unfit

EXPECTED = "prompt (a text, or messages) and target: a text, a number, or a list of them"
"""The columns of an item."""
TARGETS = ("target", "targets", "expected", "answer", "answers", "reference", "references")
"""The columns that may hold the target. The first one with a value counts."""


@dataclass(frozen=True)
class Asked:
    """An item: a prompt, and the texts that its answer is compared with."""

    prompt: Prompt
    targets: tuple[str, ...]
    """At least one; "" alone if no metric needs a target and the row has none."""


def parse(row: Mapping[str, Any], *, needs_target: bool) -> Asked:
    """Return a row's item. Raises RowError."""
    column = next((name for name in TARGETS if row.get(name) is not None), None)
    if column is None and needs_target:
        raise unfit(row, EXPECTED)
    turns, tools = prompt_turns(row)
    targets = ("",) if column is None else _targets(row[column], column)
    return Asked(Prompt(turns, "", row, tools), targets)


def asked(item: Asked) -> str:
    """Return the text that an item asks."""
    return item.prompt.question


def _targets(given: Any, column: str) -> tuple[str, ...]:
    values = given if isinstance(given, list) else [given]
    if not values:
        raise RowError(f"{column} is an empty list: name a text", "InvalidLabel")
    return tuple(_text(value, column) for value in values)


def _text(value: Any, column: str) -> str:
    """Return a target as text, a number as JSON writes it."""
    if isinstance(value, str) and value.strip():
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value):
        return str(value)
    raise RowError(
        f"{column} is a text, a number, or a list of them, and it holds {value!r}", "InvalidLabel"
    )
