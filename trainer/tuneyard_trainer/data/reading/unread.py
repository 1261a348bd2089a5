"""Columns that nothing reads: a text that was meant to be read may be among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneyard_trainer.data.reading.example import printable
from tuneyard_trainer.data.reading.turns import (
    PUBLISHED,
    TURN_KEYS,
    TurnKeys,
    is_turn,
    kind_of,
)

MAX_UNREAD = 20
"""The most columns that are listed as unread: rows of free form may have any number."""
MAX_NAME = 60
"""Characters of a column's name that are listed."""


@dataclass
class Unread:
    """The columns of a data set's rows that have a value and that nothing reads."""

    found: dict[str, None] = field(default_factory=dict)
    """In the order in which they were found."""

    def note(
        self,
        row: Mapping[str, Any],
        columns: Iterable[str] | None,
        keys: TurnKeys = PUBLISHED,
    ) -> None:
        """Note the columns of a row, and as `COLUMN[].KEY` the keys of its turns. `columns`: those
        that are read. None: no row is noted. `keys`: the keys of a turn that the manifest names."""
        if columns is None:
            return
        for name, value in row.items():
            if name not in columns:
                self._note(name, value)
            elif isinstance(value, list):
                for turn in value:
                    self._note_turn(name, turn, keys)

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
        for name in later.found:
            if len(self.found) == MAX_UNREAD:
                return
            self.found[name] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, sorted; MAX_UNREAD at most."""
        return tuple(sorted(self.found))


def unread_message(name: str, unread: Sequence[str]) -> str:
    """Return what to report of these columns. `name`: the data set's field in the manifest."""
    columns = "column" if len(unread) == 1 else "columns"
    return f"{name}: nothing reads the {columns} {', '.join(unread)}"
