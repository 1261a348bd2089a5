"""A data set as a stream of examples that counts what it read, skipped and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from tuneyard.api.sources import DataFormat
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.example import Example, RowError
from tuneyard_trainer.data.formats import Names, detect
from tuneyard_trainer.data.reading import link_messages, read
from tuneyard_trainer.data.rows import BrokenRow, Row, data_files, read_rows

DETECTED_FROM = 20
"""How many readable rows decide a format."""
_FAULTS_SHOWN = 3


@dataclass(frozen=True)
class RowFault:
    """Why a row is no example."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.reason}"


@dataclass(frozen=True)
class Summary:
    """What was read of a data set so far."""

    format: DataFormat
    """The format named or found."""
    rows: int
    """Rows read."""
    examples: int
    """Examples given."""
    skipped: int
    """Invalid rows."""
    filtered: int
    """Conversation trees of which no reviewed answer was left."""
    faults: tuple[RowFault, ...]
    """The first three invalid rows."""


class Examples:
    """An iterator over a data set's examples, to be read once; `summary` tells the rest."""

    def __init__(
        self,
        path: Path,
        settings: DatasetSettings,
        *,
        on_invalid: Literal["error", "skip"],
        name: str,
    ) -> None:
        self._settings, self._on_invalid, self._name = settings, on_invalid, name
        self._rows = self._examples = self._skipped = self._filtered = 0
        self._faults: list[RowFault] = []
        source = islice(_all_rows(path), settings.limit)
        self._format, self._source = self._recognised(source)
        self._names = Names(self._format, settings.fields)
        self._stream = self._read()

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        return next(self._stream)

    @property
    def summary(self) -> Summary:
        """Counts so far; final once the iterator is exhausted."""
        counts = (self._rows, self._examples, self._skipped, self._filtered)
        return Summary(self._format, *counts, tuple(self._faults))

    def _recognised(self, rows: Iterator[Row]) -> tuple[DataFormat, Iterator[Row]]:
        """The format, and all rows again."""
        if self._settings.format != "auto":
            return self._settings.format, rows
        head: list[Row] = []
        readable = 0
        for row in rows:
            head.append(row)
            readable += not isinstance(row.value, BrokenRow)
            if readable == DETECTED_FROM:
                break
        if not readable:  # nothing to recognise: what is wrong with the rows is the news
            for row in self._counted(iter(head)):
                self._refuse(row, getattr(row.value, "reason", ""))
            self._check_end()
        return detect(head, self._settings.fields), chain(head, rows)

    def _read(self) -> Iterator[Example]:
        rows = self._counted(self._source)
        for row in link_messages(rows) if self._format == "openassistant" else rows:
            try:
                found = read(row, self._format, self._names)
            except RowError as error:
                self._refuse(row, str(error))
                continue
            self._filtered += not found
            if self._on_invalid == "error" and self._skipped:
                continue  # only counting the rest
            self._examples += len(found)
            yield from found
        self._check_end()

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._rows += 1
            yield row

    def _refuse(self, row: Row, reason: str) -> None:
        self._skipped += 1
        if len(self._faults) < _FAULTS_SHOWN:
            self._faults.append(RowFault(row.file, row.number, reason))

    def _check_end(self) -> None:
        if self._skipped and (self._on_invalid == "error" or not self._examples):
            raise self._invalid()
        if not self._rows:
            raise StageError(
                "EmptyData",
                f"{self._name} holds no rows.",
                advice=f"Put rows into the file, or remove {self._name}.",
            )
        if not self._examples:
            raise StageError(
                "EmptyData",
                f"{self._name} holds {self._filtered} conversation trees and no reviewed answer.",
                advice=f"Remove {self._name}, or export its trees with their reviews.",
            )

    def _invalid(self) -> StageError:
        shown = "; ".join(str(fault) for fault in self._faults)
        first = "" if self._skipped <= _FAULTS_SHOWN else f"The first {_FAULTS_SHOWN}: "
        if self._on_invalid == "error":
            advice = "Repair these rows, or set data.onInvalidRow: skip."
        else:
            advice = f"Repair the rows, or set the right format or fields of {self._name}."
        share = f"{self._skipped} of {self._rows} rows are invalid"
        return StageError("InvalidData", f"{self._name}: {share}. {first}{shown}.", advice=advice)


def examples(
    path: Path,
    settings: DatasetSettings,
    *,
    on_invalid: Literal["error", "skip"],
    name: str,
) -> Examples:
    """The examples of a data set: a file, folder or glob as `sources.fetch` gives it.

    `name` is the data set's field path in the manifest, for messages. Raises StageError: here for
    what concerns the whole (UnknownFileType, UnknownFormat, EmptyData), InvalidData at the end of
    the stream: with `error` for any invalid row, all counted; with `skip` when no row is valid.
    """
    return Examples(path, settings, on_invalid=on_invalid, name=name)


def _all_rows(path: Path) -> Iterator[Row]:
    for name, file in data_files(path):
        for row in read_rows(file):
            yield Row(row.number, row.value, name)
