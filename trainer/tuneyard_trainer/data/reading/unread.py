"""Columns that nothing reads: a text that was meant to be read may be among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneyard_trainer.data.reading.example import printable
from tuneyard_trainer.data.reading.turns import kind_of

MAX_UNREAD = 20
"""The most columns that are listed as unread: rows of free form may have any number."""
MAX_NAME = 60
"""Characters of a column's name that are listed."""


@dataclass
class Unread:
    """The columns of a data set's rows that have a value and that nothing reads."""

    found: dict[str, None] = field(default_factory=dict)
    """In the order in which they were found."""

    def note(self, row: Mapping[str, Any], columns: Iterable[str] | None) -> None:
        """Note the columns of a row. `columns`: those that are read. None: no row is noted."""
        if columns is None:
            return
        for name, value in row.items():
            if len(self.found) == MAX_UNREAD:
                return
            if name not in columns and kind_of(value) not in ("missing", "empty"):
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
