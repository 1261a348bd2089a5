"""Preferences: a prompt with a pair, a ranking, or a single completion with a label.

`data.layouts` lists the layouts, which are recognized row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard_trainer.data import layouts
from tuneyard_trainer.data.example import Example, Message, RowError, check
from tuneyard_trainer.data.rows import BrokenRow, Row


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
    if isinstance(row.value, BrokenRow):
        raise RowError(row.value.reason, row.value.fault)
    named = [layout for layout in layouts.layouts("preferences") if layout.name == chosen]
    layout = named[0] if named else layouts.match(row.value, "preferences", fields)
    if layout is None:
        said, _ = layouts.explain(row.value, "preferences", fields)
        present = f"the row has {', '.join(row.value) or 'no fields'}"
        raise RowError(f"{present}. {said}".rstrip(" ."), "UnknownShape")
    found = [
        Preference(row.number, each.turns, each.answers, each.label, row.file, each.tools)
        for each in layouts.read(row.value, layout, layout.names(fields), singles=labeled)
    ]
    if labeled:
        found = [single for preference in found for single in _as_singles(preference)]
    elif any(len(preference.completions) == 1 for preference in found):
        raise RowError("the row rates a single completion, which only kto accepts", "UnknownShape")
    for preference in found:
        for example in preference.examples:
            check(example)
    return found


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
