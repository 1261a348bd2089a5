"""A file of preferences as a stream of rows, with counts of rows read and rows that are invalid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.errors import StageError
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.example import RowError
from tuneyard_trainer.data.reading.rows import Row, read_data
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN, RowFault
from tuneyard_trainer.data.reading.unread import Unread
from tuneyard_trainer.preference.rows import (
    Preference,
    columns_read,
    parse_preferences,
    rates_one,
    recognized,
)


class RatedRows:
    """An iterator over a file's preferences that also counts its rows."""

    def __init__(self, file: Path, layout: DataFormat, fields: FieldMap) -> None:
        self._file, self._layout, self._fields = file, layout, fields
        self._names: dict[str, None] = {}
        self._unread = Unread()
        self.rows = self.invalid = 0
        self.faults: list[RowFault] = []
        """The first invalid rows, FAULTS_SHOWN at most."""

    def __iter__(self) -> Iterator[Preference]:
        """Yield the preferences. Raises StageError InvalidPreferences at the end if there are
        none."""
        some = False
        rows = map(self._noted, read_data(self._file))
        for row in layouts.joined(rows, self._layout, self._fields):
            self.rows += 1
            try:
                labeled = rates_one(row, self._fields)
                found = parse_preferences(row, self._fields, labeled=labeled, chosen=self._layout)
            except RowError as error:
                self.invalid += 1
                if len(self.faults) < FAULTS_SHOWN:
                    self.faults.append(RowFault(row.file, row.number, str(error)))
                continue
            some = some or bool(found)
            yield from found
        if not some:
            raise StageError(
                "InvalidPreferences",
                f"{self._file}: {self.invalid} of {self.rows} rows are invalid, and none states a "
                f"preference. {'; '.join(map(str, self.faults))}",
                advice="Repair the rows, or name their columns with --fields.",
            )

    @property
    def format(self) -> str:
        """The layouts of the rows so far."""
        return ", ".join(self._names)

    @property
    def unread(self) -> tuple[str, ...]:
        """The columns that nothing reads."""
        return self._unread.names

    @property
    def absent(self) -> tuple[str, ...]:
        """The fields whose columns no row has."""
        return self._unread.absent

    def _noted(self, row: Row) -> Row:
        """Note the columns of a row of the file, before rows are joined."""
        with suppress(RowError):  # reported where the row is parsed
            value, layout = recognized(row, self._fields, self._layout)
            self._names[layout.name] = None
            columns = columns_read(value, layout, self._fields)
            self._unread.note(value, columns, layout.names(self._fields))
        return row
