"""Preferences: a prompt with a pair, a ranking, or a single completion with a label.

`data.reading.layouts` lists the layouts, which are recognized row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.example import Example, Message, RowError, check
from tuneyard_trainer.data.reading.layouts import Layout
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, read_data
from tuneyard_trainer.data.reading.stream import DETECTED_FROM, read_examples


@dataclass(frozen=True)
class Preference:
    """One prompt with its rated completions."""

    row: int
    """The row's number in its file, from 1."""
    prompt: tuple[Message, ...]
    """The turns before the completion."""
    completions: tuple[Message, ...]
    """The assistant's turns, best first. A single completion is rated by its label."""
    label: float = 1.0
    """Of a pair: the probability that the first completion is the better one. Of a single
    completion: 1.0 for good, 0.0 for bad. Of a ranking: 1.0."""
    file: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools that a completion may call."""
    margin: float | None = None
    """The difference of score between the best and the worst completion. None: there are no
    scores."""
    tied: int = 0
    """Answers of the row that are left out, since another one has the same score."""

    @property
    def examples(self) -> list[Example]:
        """Each completion with its prompt."""
        return [
            Example(
                self.row,
                "chat",
                (*self.prompt, completion),
                completion=completion.content,
                file=self.file,
                tools=self.tools,
            )
            for completion in self.completions
        ]


def parse_preferences(
    row: Row, fields: FieldMap, *, labeled: bool, chosen: DataFormat = "auto"
) -> list[Preference]:
    """Return the preferences that a row states: one, or those of a tree. Raises RowError.

    `labeled`: as single completions with labels; a pair becomes a good one and a bad one.
    `chosen`: the layout that the manifest names. auto, or a layout of conversations: the row's own.
    """
    value, layout = recognized(row, fields, chosen)
    found = [
        Preference(
            row.number,
            each.turns,
            each.answers,
            each.label,
            row.file,
            each.tools,
            each.margin,
            each.tied,
        )
        for each in layouts.read(value, layout, layout.names(fields), singles=labeled)
    ]
    if labeled:
        found = [single for preference in found for single in _as_singles(preference)]
    elif any(len(preference.completions) == 1 for preference in found):
        raise RowError("the row rates a single completion, which only kto accepts", "UnknownShape")
    for preference in found:
        for example in preference.examples:
            check(example)
    return found


def recognized(
    row: Row, fields: FieldMap, chosen: DataFormat = "auto"
) -> tuple[Mapping[str, Any], Layout]:
    """Return a row's columns and its layout. Raises RowError, and StageError
    UnknownFormat for a field that the chosen layout does not have.

    `chosen`: as in `parse_preferences`.
    """
    if isinstance(row.value, BrokenRow):
        raise RowError(row.value.reason, row.value.fault)
    named = any(layout.name == chosen for layout in layouts.layouts("preferences"))
    if named:
        return row.value, layouts.layout_of(chosen, "preferences", fields)
    layout = layouts.match(row.value, "preferences", fields)
    if layout is None:
        said, _ = layouts.explain(row.value, "preferences", fields)
        present = f"the row has {', '.join(row.value) or 'no fields'}"
        raise RowError(f"{present}. {said}".rstrip(" ."), "UnknownShape")
    return row.value, layout


def are_rated(file: Path, chosen: DataFormat, fields: FieldMap) -> bool:
    """Return whether a file's rows rate completions, by `chosen` or else by its first row that can
    be read.

    A prompt, a completion and a label are rated if the label is true or false. A number or a word
    may be a class that somebody wants to train on. A pair beside a conversation is rated if the
    conversation ends without an answer, as in LLaMA-Factory's preferences.
    """
    if chosen != "auto":
        return chosen in ("preference", "ranking", "labeled")
    head = islice(read_data(file), DETECTED_FROM)
    first = next((row for row in head if isinstance(row.value, dict)), None)
    value = first.value if first is not None and isinstance(first.value, dict) else {}
    layout = layouts.match(value, "preferences", fields)
    if layout is None:
        return False
    if layout.name == "labeled" and isinstance(layout.names(fields).value("label", value), bool):
        return True
    plain = layouts.match(value, "training", fields)
    if first is None or plain is None:
        return True
    return layout.name == "preference" and not _is_trainable(first, plain, fields)


def _is_trainable(row: Row, layout: Layout, fields: FieldMap) -> bool:
    """Return whether a row can be read as a conversation to train on."""
    try:
        return bool(read_examples(row, layout, layout.names(fields)))
    except RowError:
        return False


def rates_one(row: Row, fields: FieldMap) -> bool:
    """Return whether a row rates a single completion."""
    value = row.value if isinstance(row.value, dict) else {}
    layout = layouts.match(value, "preferences", fields)
    return layout is not None and layout.name == "labeled"


def columns_read(row: Mapping[str, Any], layout: Layout, fields: FieldMap) -> frozenset[str] | None:
    """Return the columns that are read of a row. None: those of OpenAssistant's trees.

    `input` is read beside an `instruction`, and where the manifest names it; OpenAI's is an object.
    """
    columns, names = layouts.columns_of(layout, fields), layout.names(fields)
    if columns is None or names.maps("input") or names.of("prompt", row) == "instruction":
        return columns
    return columns if isinstance(row.get("input"), dict) else columns - {"input"}


def _as_singles(preference: Preference) -> list[Preference]:
    """Return a single completion as it is, and a pair as a good and a bad completion."""
    if len(preference.completions) == 1:
        return [preference]
    if len(preference.completions) > 2:
        raise RowError("a ranking does not rate single completions", "UnknownShape")
    if preference.label <= 0.5:
        raise RowError("a tie does not rate single completions", "InvalidLabel")
    chosen, rejected = preference.completions
    return [
        replace(preference, completions=(chosen,), label=1.0),
        replace(preference, completions=(rejected,), label=0.0),
    ]
