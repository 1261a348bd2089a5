"""The layouts of rows: one table of their columns and readers, and the detection of a layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.alias_generators import to_camel

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.errors import StageError
from tuneyard_trainer.data.reading import feedback, readers
from tuneyard_trainer.data.reading.example import RowError, printable
from tuneyard_trainer.data.reading.readers import Fields, Names, Parsed
from tuneyard_trainer.data.reading.rows import BrokenRow, Row
from tuneyard_trainer.data.reading.trees import (
    COLUMNS,
    by_published_names,
    is_flat_message,
    is_tree,
    link_messages,
    published,
)

Purpose = Literal["training", "preferences", "prompts"]
"""What rows are read for: conversations and texts, rated answers, or questions alone."""


@dataclass(frozen=True)
class Layout:
    """The shape of a row."""

    name: DataFormat
    shape: str
    """The columns, as messages show them."""
    fields: Fields
    """The published columns of each field of a `FieldMap`; the first one with a value is read. ():
    the layout has the field only if the map names its column."""
    needs: tuple[str, ...]
    """The fields that every row has."""
    read: Callable[[Mapping[str, Any], Names], Iterator[Parsed]]
    purpose: Purpose = "training"
    looks_so: Callable[[Mapping[str, Any], Names], bool] = lambda _row, _names: True
    """Whether a row with the needed fields has this layout."""
    unmapped: frozenset[str] = frozenset()
    """Fields that make a row another layout's, if the manifest names their columns."""
    read_singles: Callable[[Mapping[str, Any], Names], Iterator[Parsed]] | None = None
    """The reader of preferences as single completions. None: `read`, and a pair is two of them."""

    def names(self, fields: FieldMap) -> Names:
        """Return the names of the columns."""
        return Names(self.fields, fields)

    def matches(self, row: Mapping[str, Any], fields: FieldMap) -> bool:
        """Return whether a row has this layout, under the names in `fields`."""
        given = given_fields(fields)
        if given - self.fields.keys() or (self.unmapped and given >= self.unmapped):
            return False
        names = self.names(fields)
        has_fields = all(names.value(field, row) is not None for field in self.needs)
        return has_fields and self.looks_so(row, names)


def given_fields(fields: FieldMap) -> set[str]:
    """Return the fields whose columns the manifest names."""
    return {name for name, value in fields if value is not None}


# ---- what rows look like ----------------------------------------------------------------------


def _first_role(row: Mapping[str, Any], names: Names) -> str:
    """Return the key of the first turn's role; "": the row has no turns."""
    found = row.get(names.of("messages", row))
    first = found[0] if isinstance(found, list) and found else None
    key = names.keys.of(first)[0] if isinstance(first, dict) else ""
    return key if isinstance(first, dict) and key in first else ""


def _has_messages(row: Mapping[str, Any], names: Names) -> bool:
    role = _first_role(row, names)
    return bool(role) and (role != "from" or not names.maps("messages"))


def _has_conversations(row: Mapping[str, Any], names: Names) -> bool:
    role = _first_role(row, names)
    return bool(role) and (role == "from" or not names.maps("messages"))


def _has_texts(row: Mapping[str, Any], names: Names) -> bool:
    found = names.value("messages", row) if names.maps("messages") else row.get("data")
    return isinstance(found, list) and bool(found) and isinstance(found[0], str)


def _has_answer(row: Mapping[str, Any], names: Names) -> bool:
    return any(names.value(field, row) is not None for field in ("completion", "instances"))


def _is_message_tree(row: Mapping[str, Any], names: Names) -> bool:
    message = published(row, names)
    return is_tree(message) or is_flat_message(message)


def _is_string(row: Mapping[str, Any], names: Names) -> bool:
    return isinstance(names.value("text", row), str)


def _is_pair(row: Mapping[str, Any], names: Names) -> bool:
    return any(names.of(side, row) in row for side in ("chosen", "rejected"))


# ---- the table --------------------------------------------------------------------------------

_COMMON: Fields = {"expected": ("expected",), "document": ()}
_TURNS: Fields = {"tools": ("tools", "functions"), "role": (), "content": (), **_COMMON}
_BOTH = frozenset({"prompt", "completion"})
_EVENTS = "events: event, id or of, and what it says; joined by id"

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "messages",
        "messages: [{role, content}]",
        {"messages": ("messages",), "system": (), **_TURNS},
        ("messages",),
        readers.turns,
        looks_so=_has_messages,
    ),
    Layout(
        "alpaca",
        "instruction, input (optional), output",
        {
            "prompt": ("instruction",),
            "input": ("input",),
            "completion": ("output",),
            "instances": ("instances",),
            "system": ("system",),
            "history": ("history",),
            "reasoning": (),
            **_TURNS,
        },
        ("prompt",),
        readers.instruction,
        looks_so=_has_answer,
        unmapped=_BOTH,
    ),
    Layout(
        "dolly",
        "instruction, context (optional), response",
        {
            "prompt": ("instruction",),
            "input": ("context", "input"),
            "completion": ("response",),
            "system": ("system",),
            "reasoning": (),
            **_COMMON,
        },
        ("prompt", "completion"),
        readers.instruction,
        looks_so=lambda _row, names: not names.maps("completion"),
        unmapped=frozenset({"prompt"}),
    ),
    Layout(
        "flan",
        "inputs, targets",
        {"prompt": ("inputs",), "completion": ("targets",), "reasoning": (), **_COMMON},
        ("prompt", "completion"),
        readers.prompt_completion,
        unmapped=_BOTH,
    ),
    Layout(
        "question-answer",
        "question, answer or response",
        {
            "prompt": ("question",),
            "input": (),
            "completion": ("answer", "response"),
            "system": ("system", "system_prompt"),
            "reasoning": (),
            **_COMMON,
        },
        ("prompt", "completion"),
        readers.prompt_completion,
        looks_so=lambda _row, names: not (names.maps("prompt") or names.maps("completion")),
    ),
    Layout(
        "sharegpt",
        "conversations: [{from, value}]",
        {"messages": ("conversations",), "system": ("system",), **_TURNS},
        ("messages",),
        readers.turns,
        looks_so=_has_conversations,
    ),
    Layout(
        "openassistant",
        "message_id, parent_id, role, text; or a tree with replies",
        {**COLUMNS, "document": ()},
        (),
        readers.openassistant,
        looks_so=_is_message_tree,
    ),
    Layout(
        "ultrachat",
        "data: [question, answer, ...]",
        {"messages": ("data", "messages"), **_TURNS},
        ("messages",),
        readers.ultrachat,
        looks_so=_has_texts,
    ),
    Layout(
        "prompt-completion",
        "prompt, completion",
        {
            "prompt": ("prompt",),
            "input": (),
            "completion": ("completion",),
            "system": ("system",),
            "reasoning": (),
            **_TURNS,
        },
        ("prompt", "completion"),
        readers.prompt_completion,
    ),
    Layout(
        "text",
        "text",
        {"text": ("text",), **_COMMON},
        ("text",),
        readers.text,
        looks_so=_is_string,
    ),
    Layout(
        "feedback",
        _EVENTS,
        {**feedback.COLUMNS, "document": ()},
        ("event",),
        feedback.conversations,
        looks_so=feedback.is_event,
    ),
    Layout(
        "feedback",
        _EVENTS,
        feedback.COLUMNS,
        ("event",),
        feedback.pairs,
        "preferences",
        looks_so=feedback.is_event,
        read_singles=feedback.labels,
    ),
    Layout(
        "preference",
        "prompt or turns, chosen, rejected",
        {
            **readers.ASKED,
            "chosen": ("chosen", "chosen_response", "preferred_output"),
            "rejected": ("rejected", "rejected_response", "non_preferred_output"),
            **readers.PAIR_RATINGS,
        },
        (),
        readers.pair,
        "preferences",
        looks_so=_is_pair,
    ),
    Layout(
        "ranking",
        "prompt, answers: [best first] or with ranks or scores",
        {
            **readers.ASKED,
            "answers": ("answers", "responses", "completions"),
            "ranks": ("ranks",),
            "scores": ("scores",),
            **readers.RATED,
        },
        ("answers",),
        readers.ranking,
        "preferences",
    ),
    Layout(
        "labeled",
        "prompt and completion, or turns; label: true or false",
        {
            **readers.ASKED,
            "completion": ("completion", "answer", "response", "output"),
            "label": ("label", "thumbs", "thumb", "kto_tag"),
        },
        ("label",),
        readers.labeled,
        "preferences",
    ),
    Layout(
        "openassistant",
        "message_id, parent_id, role, text, rank; or a tree with replies",
        COLUMNS,
        (),
        readers.openassistant_ranks,
        "preferences",
        looks_so=_is_message_tree,
    ),
)

PROMPTS: Fields = {
    "messages": ("messages", "conversations", "data"),
    "prompt": ("prompt", "instruction", "inputs", "question"),
    "input": ("input",),
    "system": ("system",),
    "history": ("history",),
    "text": ("text",),
    "tools": ("tools", "functions"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    **readers.PAIR_RATINGS,
}
"""The columns of prompts: those of every layout, and of the answers those that may begin with a
prompt."""

_REFUSED: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "steps with a label each (prompt, completions, labels), which train a process reward model; "
    "Tuneyard trains outcome reward models, on preferences": lambda row: (
        isinstance(row.get("labels"), list) and isinstance(row.get("completions"), list)
    ),
    "segments without a chat template (segments: [{label, text}]); Tuneyard masks by turns: write "
    "messages: [{role, content, train}]": lambda row: isinstance(row.get("segments"), list),
}
"""Published shapes that are known and not read, by what is said about them."""


def layouts(purpose: Purpose) -> list[Layout]:
    """Return the layouts of a purpose, in the order in which a row is compared with them."""
    return [layout for layout in LAYOUTS if layout.purpose == purpose]


def layout_of(chosen: DataFormat, purpose: Purpose, fields: FieldMap) -> Layout:
    """Return the layout that a manifest names. Raises StageError UnknownFormat if rows of it are
    not read for this purpose, or if it does not have the fields that are named."""
    found = next((layout for layout in layouts(purpose) if layout.name == chosen), None)
    if found is None:
        known = ", ".join(layout.name for layout in layouts(purpose))
        raise StageError(
            "UnknownFormat",
            f"format is {chosen}, which is not read for {purpose}; the layouts of {purpose} are "
            f"{known}.",
            advice="Set format: auto, or one of these.",
        )
    unused = sorted(given_fields(fields) - found.fields.keys())
    if unused:
        name, column = to_camel(unused[0]), getattr(fields, unused[0])
        raise StageError(
            "UnknownFormat",
            f"fields.{name} is {column!r}, and format {chosen} has no such field. It has: "
            f"{', '.join(map(to_camel, found.fields))}.",
            advice=f"Remove fields.{name}, or set format.",
        )
    return found


def columns_of(layout: Layout, fields: FieldMap) -> frozenset[str] | None:
    """Return the columns that are read. None: those of OpenAssistant's trees, most of which
    describe a message and are not meant to be read."""
    if layout.name == "openassistant":
        return None
    return layout.names(fields).columns


# ---- detection --------------------------------------------------------------------------------


def detect(rows: Sequence[Row], fields: FieldMap) -> DataFormat:
    """Return the layout of training rows; broken rows do not count.

    `text` counts only if no other layout matches: Alpaca's own file repeats each row as text.
    Events of a log hold the columns of other layouts too, so `feedback` has precedence. A map of
    both prompt and completion means prompt-completion, and a map of text means text.
    Raises StageError UnknownFormat unless exactly one layout matches.
    """
    found: dict[DataFormat, Row] = {}
    values = [row for row in rows if not isinstance(row.value, BrokenRow)]
    for layout in layouts("training"):
        first = next((row for row in values if layout.matches(_fields_of(row), fields)), None)
        if first is not None:
            found[layout.name] = first
    if "feedback" in found:
        return "feedback"
    if len(found) > 1:
        found.pop("text", None)
    if len(found) == 1:
        return next(iter(found))
    raise _undetected(values, found, fields)


def _fields_of(row: Row) -> Mapping[str, Any]:
    return {} if isinstance(row.value, BrokenRow) else row.value


def _undetected(
    rows: Sequence[Row], found: Mapping[DataFormat, Row], fields: FieldMap
) -> StageError:
    present = sorted({key for row in rows for key in _fields_of(row)})
    shapes = "; ".join(f"{each.name} ({each.shape})" for each in layouts("training"))
    firsts = {(row.file, row.number) for row in found.values()}
    if len(found) > 1 and len(firsts) == len(found):  # no row fits two of them
        where = ", ".join(f"{name} ({_place(row)})" for name, row in found.items())
        return StageError(
            "UnknownFormat",
            f"The rows have several layouts: {where}. A data set has one.",
            advice="Put the rows of each layout into a data set of its own.",
        )
    if found:
        fit, advice = f"several formats: {', '.join(found)}", _ADVICE
    else:
        said, advice = explain(_fields_of(rows[0]) if rows else {}, "training", fields)
        fit = f"no known format. {said}".strip()
    names = printable(", ".join(present)) or "(none)"
    return StageError(
        "UnknownFormat",
        f"The rows' fields are {names}, which fit {fit.rstrip('.')}. Formats: {shapes}.",
        advice=advice,
    )


def _place(row: Row) -> str:
    return f"{row.file} row {row.number}".strip()


_ADVICE = "Set format, or name the fields: fields: {prompt: question, completion: answer}."


def match(row: Mapping[str, Any], purpose: Purpose, fields: FieldMap) -> Layout | None:
    """Return the first layout of a purpose that a row has. None: it has none of them."""
    if any(is_refused(row) for is_refused in _REFUSED.values()):
        return None
    return next((each for each in layouts(purpose) if each.matches(row, fields)), None)


def explain(row: Mapping[str, Any], purpose: Purpose, fields: FieldMap) -> tuple[str, str]:
    """Return what is known about a row without a layout of this purpose, and the advice."""
    for what, is_refused in _REFUSED.items():
        if is_refused(row):
            return f"These are {what}.", "Convert the rows, or choose another data set."
    others: tuple[Purpose, ...] = ("training", "preferences")
    for other in others:
        layout = match(row, other, FieldMap()) if other != purpose else None
        if layout is not None:
            place = "spec.preferences" if other == "preferences" else "spec.data"
            return (
                f"The row has the layout {layout.name}, which is read for {other} only.",
                f"Name the data set in {place}, or convert the rows.",
            )
    if cased := _other_case(row, purpose):
        layout, names = cased
        named = ", ".join(f"{field}: {name}" for field, name in names.items())
        return (
            f"The nearest is {layout.name} ({layout.shape}), whose columns are in lower case.",
            f"Name the fields: fields: {{{named}}}.",
        )
    if problem := _other_turns(row):
        return problem
    nearest, missing = _nearest(row, purpose, fields)
    if nearest is None:
        return "", _ADVICE
    unread = [name for name in row if name not in nearest.names(fields).columns]
    column = printable(unread[0], 60) if unread else "COLUMN"
    return (
        f"The nearest is {nearest.name} ({nearest.shape}), and the row has no {missing}.",
        f"Set format, or name the fields: fields: {{{missing}: {column}}}.",
    )


def _other_case(row: Mapping[str, Any], purpose: Purpose) -> tuple[Layout, dict[str, str]] | None:
    """Return the layout of a row whose columns are in another case, and the columns by field. None:
    it has none, or a column that no field can name."""
    columns = {name.strip().lower(): name for name in row}
    lowered = {lower: row[name] for lower, name in columns.items()}
    layout = match(lowered, purpose, FieldMap())
    if layout is None:
        return None
    names = layout.names(FieldMap())
    found = {field: names.of(field, lowered) for field in layout.fields}
    named = {
        to_camel(field): _quoted(printable(columns[column], 60))
        for field, column in found.items()
        if column in columns and columns[column] != column
    }
    return (layout, named) if named else None


def _quoted(column: str) -> str:
    """Return a column's name for a field map of YAML, which drops white space around a text."""
    return column if column == column.strip() else f"'{column}'"


def _other_turns(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what is wrong with a row's turns, and the advice. None: it has no turns, or they have
    roles."""
    for column in readers.ASKED["messages"]:
        turns = row.get(column)
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            problem = f"{column} is a text, and turns are a list of objects."
            return problem, f"Write the rows as JSONL, with {column} as a list."
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping) and not first.keys() & {"role", "from"}:
            keys = printable(", ".join(map(str, first)), 100) or "no keys"
            return (
                f"A turn is {{role, content}} or {{from, value}}, and {column}[0] has {keys}.",
                "Convert the turns, or name their keys: fields: {role: ..., content: ...}.",
            )
    return None


def _nearest(
    row: Mapping[str, Any], purpose: Purpose, fields: FieldMap
) -> tuple[Layout | None, str]:
    """Return the layout that shares the most fields with a row, and the first field that the row
    lacks. None: no layout shares one."""
    best: tuple[int, Layout | None, str] = (0, None, "")
    for layout in layouts(purpose):
        if layout.name == "feedback":
            continue  # its columns are those of other layouts, and `event` names it
        names = layout.names(fields)
        needed = layout.needs or tuple(f for f in ("chosen", "rejected") if f in layout.fields)
        needed = (*needed, *(f for f in ("completion",) if f in layout.fields and f not in needed))
        missing = [field for field in needed if names.value(field, row) is None]
        outer = layout.fields.keys() - readers.INNER
        shared = sum(names.value(field, row) is not None for field in outer)
        if missing and shared > best[0]:
            best = (shared, layout, missing[0])
    return best[1], best[2]


JOINED: tuple[DataFormat, ...] = ("openassistant", "feedback")
"""The layouts of which several rows may make one example."""


def joined(rows: Iterable[Row], chosen: DataFormat, fields: FieldMap) -> Iterator[Row]:
    """Yield the rows of a data set, with the messages of trees and the events of logs joined.

    `chosen`: the layout; auto joins what it finds. Rows of other layouts are yielded unchanged.
    """
    if chosen in ("auto", "openassistant"):
        rows = link_messages(by_published_names(rows, Names(COLUMNS, fields)))
    if chosen in ("auto", "feedback"):
        rows = feedback.join_events(rows, Names(feedback.COLUMNS, fields))
    yield from rows


def read(
    row: Mapping[str, Any],
    layout: Layout,
    names: Names,
    *,
    whole_trees: bool = False,
    singles: bool = False,
) -> list[Parsed]:
    """Return what a row states. `whole_trees`: every conversation of a tree, not the best one.
    `singles`: rated answers as single completions, if the layout states them so.

    Raises RowError.
    """
    reader = (singles and layout.read_singles) or layout.read
    if whole_trees and reader is readers.openassistant:
        reader = readers.openassistant_all
    try:
        return list(reader(row, names))
    except RecursionError as error:
        raise RowError("the row is nested too deeply", "UnreadableRow") from error
