"""A data set as a stream of examples, with counts of rows read and rows skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from tuneyard.api.sources import DataFormat
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data import augmentation, feedback, layouts
from tuneyard_trainer.data.example import Example, RowError, check
from tuneyard_trainer.data.layouts import Layout
from tuneyard_trainer.data.reading import Names, Parsed, document, expected
from tuneyard_trainer.data.rows import BrokenRow, Row, read_data
from tuneyard_trainer.data.unread import Unread

DETECTED_FROM = 20
"""The number of readable rows from which a format is detected."""
FAULTS_SHOWN = 3
"""The number of invalid rows that a message quotes."""


@dataclass(frozen=True)
class RowFault:
    """The reason why a row cannot become an example."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.reason}"


@dataclass(frozen=True)
class Summary:
    """Counts of a data set up to the last row read."""

    format: DataFormat
    """The format: the setting, or the detected one."""
    rows: int
    """Rows read."""
    examples: int
    """Examples yielded."""
    skipped: int
    """Invalid rows."""
    filtered: int
    """Conversation trees without a reviewed answer, and answers of a log that are neither edited
    nor rated up."""
    faults: tuple[RowFault, ...]
    """The first invalid rows, FAULTS_SHOWN at most."""
    unread: tuple[str, ...] = ()
    """The columns with a value in any row that nothing reads, sorted; MAX_UNREAD at most."""


class Examples:
    """An iterator over a data set's examples that also counts its rows."""

    def __init__(
        self,
        path: Path,
        settings: DatasetSettings,
        *,
        on_invalid: Literal["error", "skip"],
        name: str,
        whole_logs: bool,
        augmented: bool,
    ) -> None:
        self._settings, self._on_invalid, self._name = settings, on_invalid, name
        self._augmented = augmented
        self._rows = self._examples = self._skipped = self._filtered = 0
        self._faults: list[RowFault] = []
        self._unread = Unread()
        source = islice(read_data(path), settings.limit)
        self._format, self._source = self._detected(source)
        self._layout = layouts.layout_of(self._format, "training", settings.fields)
        if whole_logs and self._format == "feedback":
            self._layout = replace(self._layout, read=feedback.texts)
        self._names = self._layout.names(settings.fields)
        self._columns = layouts.columns_of(self._layout, settings.fields)
        if self._columns is not None and augmented:
            self._columns |= {augmentation.MARK}
        self._stream = self._read()

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        return next(self._stream)

    @property
    def summary(self) -> Summary:
        """The counts so far. They are final when the iterator is exhausted."""
        counts = (self._rows, self._examples, self._skipped, self._filtered)
        return Summary(self._format, *counts, tuple(self._faults), self._unread.names)

    def _detected(self, rows: Iterator[Row]) -> tuple[DataFormat, Iterator[Row]]:
        """Return the format, and an iterator over all rows."""
        if self._settings.format != "auto":
            return self._settings.format, rows
        head: list[Row] = []
        readable = 0
        for row in rows:
            head.append(row)
            readable += not isinstance(row.value, BrokenRow)
            if readable == DETECTED_FROM:
                break
        if not readable:  # no format to detect: report the broken rows
            for row in self._counted(iter(head)):
                self._refuse(row, getattr(row.value, "reason", ""))
            self._check_end()
        return layouts.detect(head, self._settings.fields), chain(head, rows)

    def _read(self) -> Iterator[Example]:
        rows = self._counted(self._source)
        if self._format == "feedback":
            rows = self._noted(rows)  # the rows that the join makes have one column
        for row in layouts.joined(rows, self._format, self._settings.fields):
            try:
                found = self._examples_of(row)
            except RowError as error:
                self._refuse(row, f"{error}{self._other_layout(row, error)}")
                continue
            self._filtered += not found
            self._note_unread(row)
            if self._on_invalid == "error" and self._skipped:
                continue  # count the remaining rows only
            for example in found:
                yield replace(example, number=self._examples)
                self._examples += 1
        self._check_end()

    def _examples_of(self, row: Row) -> list[Example]:
        whole_trees = self._settings.paths == "all"
        found = read_examples(row, self._layout, self._names, whole_trees=whole_trees)
        if not self._augmented or isinstance(row.value, BrokenRow):
            return found
        origin = augmentation.origin_of(row.value)
        return [replace(example, origin=origin) for example in found]

    def _other_layout(self, row: Row, error: RowError) -> str:
        """Return what to say of a row whose layout is not that of the set; "" of any other row."""
        if error.fault != "UnknownShape" or isinstance(row.value, BrokenRow):
            return ""
        other = layouts.match(row.value, "training", self._settings.fields)
        if other is None or other.name == self._format:
            return ""
        return (
            f" (the set has the layout {self._format}, and this row {other.name}: put it into a "
            "data set of its own)"
        )

    def _noted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._note_unread(row)
            yield row

    def _note_unread(self, row: Row) -> None:
        if not isinstance(row.value, BrokenRow):
            self._unread.note(row.value, self._columns)

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._rows += 1
            yield row

    def _refuse(self, row: Row, reason: str) -> None:
        self._skipped += 1
        if len(self._faults) < FAULTS_SHOWN:
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
        if not self._examples and self._format == "feedback":
            raise StageError(
                "EmptyData",
                f"{self._name} is a log of {self._filtered} answers, none of which is edited or "
                "has a thumb up.",
                advice=f"Remove {self._name}, or add later events.",
            )
        if not self._examples:
            raise StageError(
                "EmptyData",
                f"{self._name} holds {self._filtered} conversation trees, none with a reviewed "
                "answer.",
                advice=f"Remove {self._name}, or export its trees with their reviews.",
            )

    def _invalid(self) -> StageError:
        shown = "; ".join(str(fault) for fault in self._faults)
        first = "" if self._skipped <= FAULTS_SHOWN else f"The first {FAULTS_SHOWN}: "
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
    whole_logs: bool = False,
    augmented: bool = False,
) -> Examples:
    """Return the examples of a data set: a file, folder or glob as `sources.fetch` returns it.

    `name`: the data set's field in the manifest, for messages. `whole_logs`: every answer and edit
    of a feedback log, not only those to train on. `augmented`: the rows are those of an augment
    stage, and have its marks. Raises StageError UnknownFileType,
    UnknownFormat or EmptyData at the call. The end of the stream raises InvalidData: with
    `on_invalid=error` if any row is invalid, with `skip` if no row is valid.
    """
    return Examples(
        path,
        settings,
        on_invalid=on_invalid,
        name=name,
        whole_logs=whole_logs,
        augmented=augmented,
    )


def read_examples(
    row: Row, layout: Layout, names: Names, *, whole_trees: bool = False
) -> list[Example]:
    """Return the examples of a row: one, several for an instruction with `instances` or with
    `whole_trees`, or none for a tree without a reviewed answer, or an answer of a log that is not
    rated up. Raises RowError."""
    if isinstance(row.value, BrokenRow):
        raise RowError(row.value.reason, row.value.fault)
    parsed = layouts.read(row.value, layout, names, whole_trees=whole_trees)
    wanted, source = expected(row.value, names), document(row.value, names)
    examples = [replace(_example(row, each, wanted), document=source) for each in parsed]
    for example in examples:
        check(example)
    return examples


def _example(row: Row, parsed: Parsed, wanted: tuple[str, ...]) -> Example:
    prompt, completion = parsed.plain or ("", "")
    kind: Literal["chat", "completion", "text"] = "completion" if parsed.plain else "chat"
    return Example(
        row.number,
        kind if parsed.turns else "text",
        parsed.turns,
        prompt,
        completion,
        parsed.text,
        wanted,
        row.file,
        parsed.tools,
    )
