"""Columns that nothing reads: a text that was meant to be read may be among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic.alias_generators import to_camel

from tuneyard.api.sources import FieldMap
from tuneyard_trainer.data.reading.example import printable
from tuneyard_trainer.data.reading.readers import INNER, Names
from tuneyard_trainer.data.reading.trees import MAX_DEPTH
from tuneyard_trainer.data.reading.turns import TURN_KEYS, TurnKeys, is_turn, kind_of

MAX_UNREAD = 20
"""The most columns that are listed as unread: rows of free form may have any number."""
MAX_NAME = 60
"""Characters of a column's name that are listed."""
INNER_LEVELS = 4
"""Levels of lists and objects in a row that a key is looked for: those of `input.messages[0]`."""
TREE_LEVELS = 2 * MAX_DEPTH
"""Levels of a tree, in which each message is an object in a list of replies."""
_PUBLISHED = Names({}, FieldMap())


@dataclass
class Unread:
    """The columns of a data set's rows that have a value and that nothing reads."""

    found: dict[str, None] = field(default_factory=dict)
    """In the order in which they were found."""
    mapped: Mapping[str, str] = field(default_factory=dict)
    """The columns that the manifest names, by field."""
    seen: set[str] = field(default_factory=set)
    """The fields whose columns any row has."""

    def note(
        self, row: Mapping[str, Any], columns: Iterable[str] | None, names: Names = _PUBLISHED
    ) -> None:
        """Note the columns of a row, and as `COLUMN[].KEY` the keys of its turns. `columns`: those
        that are read. None: the row is a tree or a message of one, whose columns are not noted.
        `names`: those of the row's layout."""
        self.mapped = names.given
        absent = [name for name in names.given if name not in self.seen]
        self.seen.update(name for name in absent if _has(row, name, names, in_tree=columns is None))
        if columns is None:
            return
        for name, value in row.items():
            if name not in columns:
                self._note(name, value)
            elif isinstance(value, list):
                for turn in value:
                    self._note_turn(name, turn, names.keys)

    def _note_turn(self, column: str, turn: Any, keys: TurnKeys) -> None:
        if not isinstance(turn, dict) or turn.keys() <= TURN_KEYS or not is_turn(turn, keys):
            return
        for key, value in turn.items():
            if key not in TURN_KEYS and key not in (keys.role, keys.content):
                self._note(f"{column}[].{key}", value)

    def _note(self, name: str, value: Any) -> None:
        if len(self.found) < MAX_UNREAD and kind_of(value) not in ("missing", "empty"):
            self.found[printable(name[:MAX_NAME])] = None

    def add(self, later: Unread) -> None:
        """Note the columns of rows that follow."""
        self.mapped = self.mapped or later.mapped
        self.seen |= later.seen
        for name in later.found:
            if len(self.found) == MAX_UNREAD:
                return
            self.found[name] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, sorted; MAX_UNREAD at most."""
        return tuple(sorted(self.found))

    @property
    def absent(self) -> tuple[str, ...]:
        """The fields whose columns the manifest names and no row has, with these columns."""
        return tuple(
            f"fields.{to_camel(name)}: {printable(column, MAX_NAME)}"
            for name, column in self.mapped.items()
            if name not in self.seen
        )


def _has(row: Mapping[str, Any], name: str, names: Names, *, in_tree: bool) -> bool:
    """Return whether a row has the column of a field that the manifest names, where it is read."""
    column = names.given[name]
    if column in row:
        return True
    if in_tree or name in INNER:
        return _holds(row, column, TREE_LEVELS if in_tree else INNER_LEVELS)
    within = names.value("input", row), names.value("instances", row)
    parts = [part for each in within for part in (each if isinstance(each, list) else [each])]
    return any(isinstance(part, Mapping) and column in part for part in parts)


def _holds(row: Mapping[str, Any], name: str, levels: int) -> bool:
    """Return whether an object within a row has a key."""
    waiting: list[Any] = [row]
    for _ in range(levels + 1):
        if any(name in each for each in waiting if isinstance(each, Mapping)):
            return True
        parts = (each.values() if isinstance(each, Mapping) else each for each in waiting)
        waiting = [part for each in parts for part in each if isinstance(part, Mapping | list)]
    return False


def unread_message(name: str, unread: Sequence[str]) -> str:
    """Return what to report of these columns. `name`: the data set's field in the manifest."""
    columns = "column" if len(unread) == 1 else "columns"
    return f"{name}: nothing reads the {columns} {', '.join(unread)}"


def absent_message(name: str, absent: Sequence[str]) -> str:
    """Return what to report of fields whose columns no row has. `name`: as in `unread_message`."""
    return f"{name}: no row has the columns of {', '.join(absent)}"
