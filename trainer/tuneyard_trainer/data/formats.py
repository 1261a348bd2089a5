"""The formats of rows: their fields, and the detection of a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.errors import StageError
from tuneyard_trainer.data.example import RowError
from tuneyard_trainer.data.rows import BrokenRow, Row

FIELDS: dict[DataFormat, dict[str, str]] = {
    "messages": {"messages": "messages"},
    "alpaca": {
        "prompt": "instruction",
        "input": "input",
        "completion": "output",
        "system": "system",
    },
    "flan": {"prompt": "inputs", "completion": "targets"},
    "sharegpt": {"messages": "conversations", "system": "system"},
    "openassistant": {},
    "ultrachat": {"messages": "data"},
    "prompt-completion": {
        "prompt": "prompt",
        "input": "",
        "completion": "completion",
        "system": "system",
    },
    "text": {"text": "text"},
}
"""The fields that a `FieldMap` may rename in each format, and their names in the format. "": the
format has no such field unless the map names one."""

_UNMAPPED: dict[DataFormat, tuple[str, ...]] = {
    "alpaca": ("instances",),
    "ultrachat": ("messages",),
}
"""Further columns that a format reads."""

_SHAPES = {
    "messages": "messages: [{role, content}]",
    "alpaca": "instruction, input (optional), output",
    "flan": "inputs, targets",
    "sharegpt": "conversations: [{from, value}]",
    "openassistant": "message_id, parent_id, role, text; or a tree with replies",
    "ultrachat": "data: [question, answer, ...]",
    "prompt-completion": "prompt, completion",
    "text": "text",
}


class Names:
    """The field names of a data set: from the field map, or else from the format."""

    def __init__(self, chosen: DataFormat, fields: FieldMap) -> None:
        given = {name: value for name, value in fields if value is not None}
        unused = sorted(given.keys() - FIELDS[chosen].keys())
        if unused:
            raise StageError(
                "UnknownFormat",
                f"fields.{unused[0]} is {given[unused[0]]!r}, and format {chosen} has no such "
                f"field. It has: {', '.join(FIELDS[chosen]) or 'none that can be renamed'}.",
                advice=f"Remove fields.{unused[0]}, or set format.",
            )
        self._chosen, self._names = chosen, FIELDS[chosen] | given

    def __getitem__(self, field: str) -> str:
        return self._names[field]

    @property
    def columns(self) -> frozenset[str] | None:
        """The columns that are read. None: those of OpenAssistant's trees, most of which describe a
        message and are not meant to be read."""
        if self._chosen == "openassistant":
            return None
        return frozenset((*self._names.values(), *_UNMAPPED.get(self._chosen, ()), "expected"))


def with_input(prompt: str, given: str) -> str:
    """Return the prompt followed by a row's input, as Alpaca renders them; "": there is none."""
    return f"{prompt}\n\n{given}" if given.strip() else prompt


def row_input(value: Mapping[str, Any], prompt: str, fields: FieldMap) -> str:
    """Return the input of a row without a format; "": there is none. `prompt`: the prompt's field,
    beside which `input` is Alpaca's if it is `instruction`.

    Raises RowError if the input cannot follow the prompt.
    """
    name = fields.input or ("input" if prompt == "instruction" else "")
    given = input_text(value, name)
    if given and isinstance(value.get(prompt), list):
        raise RowError(f"{name} cannot follow a prompt that is a list of turns")
    return given


def input_text(value: Mapping[str, Any], field: str) -> str:
    """Return the text of an input field; "": the field is absent, null or empty, or there is none
    (`field` is ""). Raises RowError for another type."""
    given = (value.get(field) if field else None) or ""
    if not isinstance(given, str):
        raise RowError(f"{field} must be a string, not {type(given).__name__}")
    return given


def detect(rows: Sequence[Row], fields: FieldMap) -> DataFormat:
    """Return the format of the rows; broken rows do not count.

    A format matches by its fields, under the names in `fields`, and by the types of their values.
    `text` counts only if no other format matches: Alpaca's own file repeats each row as text. A map
    of both prompt and completion means prompt-completion, and a map of text means text.
    Raises StageError UnknownFormat unless exactly one format matches.
    """
    values = [row.value for row in rows if not isinstance(row.value, BrokenRow)]
    found: list[DataFormat] = [
        name for name in FIELDS if any(_matches(name, value, fields) for value in values)
    ]
    if len(found) > 1 and "text" in found:
        found.remove("text")
    if len(found) == 1:
        return found[0]
    present = sorted({key for value in values for key in value})
    raise StageError(
        "UnknownFormat",
        f"The rows' fields are {', '.join(present) or '(none)'}, which fit "
        f"{'no known format' if not found else 'several formats: ' + ', '.join(found)}. Formats: "
        + "; ".join(f"{name} ({shape})" for name, shape in _SHAPES.items())
        + ".",
        advice="Set format, or name the fields: fields: {prompt: question, completion: answer}.",
    )


def _matches(chosen: DataFormat, row: Mapping[str, Any], fields: FieldMap) -> bool:
    given = {name for name, value in fields if value is not None}
    if given - FIELDS[chosen].keys():
        return False
    if chosen in ("alpaca", "flan") and given >= {"prompt", "completion"}:
        return False
    names = Names(chosen, fields)
    if chosen == "openassistant":
        return _is_tree(row) or is_flat_message(row)
    if chosen in ("messages", "sharegpt", "ultrachat"):
        turns = row.get(names["messages"])
        return isinstance(turns, list) and bool(turns) and _IS_TURN[chosen](turns[0])
    if chosen == "text":
        return isinstance(row.get(names["text"]), str)
    answer = row.get(names["completion"])
    if chosen == "alpaca" and answer is None:
        answer = row.get("instances")
    return row.get(names["prompt"]) is not None and answer is not None


_IS_TURN: dict[str, Callable[[Any], bool]] = {
    "messages": lambda turn: isinstance(turn, dict) and "role" in turn,
    "sharegpt": lambda turn: isinstance(turn, dict) and "from" in turn,
    "ultrachat": lambda turn: isinstance(turn, str),
}


def _is_tree(row: Mapping[str, Any]) -> bool:
    root = row.get("prompt", row)
    return isinstance(root, dict) and isinstance(root.get("replies"), list) and "text" in root


def is_flat_message(row: Mapping[str, Any]) -> bool:
    """Return whether the row is one message of an OpenAssistant tree."""
    return {"message_id", "parent_id", "role", "text"} <= row.keys() and "replies" not in row
