"""A data set as a stream of examples, with counts of rows read and rows skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from tuneyard.api.sources import DataFormat
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data import augmentation
from tuneyard_trainer.data.reading import feedback, layouts
from tuneyard_trainer.data.reading.example import Example, RowError, check
from tuneyard_trainer.data.reading.layouts import Layout
from tuneyard_trainer.data.reading.readers import Names, Parsed, document, expected
from tuneyard_trainer.data.reading.rows import BrokenRow, Line, Row, parsed, read_unparsed
from tuneyard_trainer.data.reading.unread import Unread

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
    absent: tuple[str, ...] = ()
    """The fields whose columns the manifest names and no row has."""


@dataclass
class RowCounts:
    """The outcome of rows that were read, such as those of a batch."""

    examples: int = 0
    skipped: int = 0
    filtered: int = 0
    faults: list[RowFault] = field(default_factory=list)
    """The first invalid rows, FAULTS_SHOWN at most."""
    unread: Unread = field(default_factory=Unread)

    def refuse(self, row: Row, reason: str) -> None:
        """Count an invalid row."""
        self.skipped += 1
        if len(self.faults) < FAULTS_SHOWN:
            self.faults.append(RowFault(row.file, row.number, reason))

    def update(self, later: RowCounts) -> None:
        """Add the counts of rows that follow."""
        self.examples += later.examples
        self.skipped += later.skipped
        self.filtered += later.filtered
        self.faults += later.faults[: FAULTS_SHOWN - len(self.faults)]
        self.unread.add(later.unread)


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of a data set as examples, in any process."""

    format: DataFormat
    settings: DatasetSettings
    stops_at_invalid: bool
    """Whether no example is returned after an invalid row: the rows that follow are counted."""
    whole_logs: bool
    augmented: bool = False
    """Whether the rows are those of an augment stage."""

    def read(self, row: Row | Line, counts: RowCounts) -> list[Example]:
        """Return the examples of a row, numbered from those in `counts`, and count what became of
        it."""
        row = parsed(row)
        whole_trees = self.settings.paths == "all"
        try:
            found = read_examples(row, self.layout, self._names, whole_trees=whole_trees)
            origin = None
            if self.augmented and not isinstance(row.value, BrokenRow):
                origin = augmentation.origin_of(row.value)
        except RowError as error:
            counts.refuse(row, f"{error}{self._other_layout(row, error)}")
            return []
        counts.filtered += not found
        if self.format not in layouts.JOINED:  # those of the files' rows are noted before
            self.note_unread(row, counts)
        if self.stops_at_invalid and counts.skipped:
            return []
        first = counts.examples
        counts.examples += len(found)
        return [
            replace(example, number=number, origin=origin)
            for number, example in enumerate(found, start=first)
        ]

    def note_unread(self, row: Row, counts: RowCounts) -> None:
        """Note the columns of a row that nothing reads."""
        if not isinstance(row.value, BrokenRow):
            counts.unread.note(row.value, self._columns, self._names)

    @cached_property
    def layout(self) -> Layout:
        """The layout. Raises StageError UnknownFormat as `layout_of` does."""
        layout = layouts.layout_of(self.format, "training", self.settings.fields)
        if self.whole_logs and self.format == "feedback":
            return replace(layout, read=feedback.texts)
        return layout

    @cached_property
    def _names(self) -> Names:
        return self.layout.names(self.settings.fields)

    @cached_property
    def _columns(self) -> frozenset[str] | None:
        columns = layouts.columns_of(self.layout, self.settings.fields)
        return columns | {augmentation.MARK} if columns is not None and self.augmented else columns

    def _other_layout(self, row: Row, error: RowError) -> str:
        """Return what to say of a row whose layout is not that of the set; "" of any other row."""
        if error.fault != "UnknownShape" or isinstance(row.value, BrokenRow):
            return ""
        other = layouts.match(row.value, "training", self.settings.fields)
        if other is None or other.name == self.format:
            return ""
        return (
            f" (the set has the layout {self.format}, and this row {other.name}: put it into a "
            "data set of its own)"
        )

    def __reduce__(self) -> tuple[object, ...]:  # a layout holds functions that do not pickle
        fields = (self.format, self.settings, self.stops_at_invalid, self.whole_logs)
        return (RowReader, (*fields, self.augmented))


class Examples:
    """An iterator over a data set's examples that also counts its rows.

    For batches in several processes, `rows` yields the rows, `reader` reads them, and `counts` and
    `finish` take what the processes found.
    """

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
        self._rows = 0
        self.counts = RowCounts()
        """The outcome of the rows so far."""
        source = islice(read_unparsed(path), settings.limit)
        chosen, self._source = self._detected(source)
        self.reader = RowReader(chosen, settings, on_invalid == "error", whole_logs, augmented)
        self.reader.layout  # noqa: B018 - raises for a layout that does not fit
        self._stream = self._read()

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        return next(self._stream)

    @property
    def summary(self) -> Summary:
        """The counts so far. They are final when the iterator is exhausted."""
        counts = self.counts
        numbers = (self._rows, counts.examples, counts.skipped, counts.filtered)
        unread = counts.unread
        faults = tuple(counts.faults)
        return Summary(self.reader.format, *numbers, faults, unread.names, unread.absent)

    @property
    def fails(self) -> bool:
        """Whether the stream will end with InvalidData: the rows that are left are counted."""
        return self._on_invalid == "error" and self.counts.skipped > 0

    def rows(self) -> Iterator[Row | Line]:
        """Yield the rows, with the messages of trees and the events of logs joined. To be iterated
        once."""
        rows = self._counted(self._source)
        if self.reader.format not in layouts.JOINED:
            return rows
        whole: Iterator[Row] = map(parsed, rows)
        whole = self._noted(whole)  # the rows that the join makes have other columns
        return layouts.joined(whole, self.reader.format, self._settings.fields)

    def finish(self) -> None:
        """Check the counts of all rows. Raises StageError as `examples` says."""
        counts = self.counts
        if counts.skipped and (self._on_invalid == "error" or not counts.examples):
            raise self._invalid()
        if not self._rows:
            raise self._empty()
        if not counts.examples and self.reader.format == "feedback":
            raise StageError(
                "EmptyData",
                f"{self._name} is a log of {counts.filtered} answers, none of which is edited or "
                "has a thumb up.",
                advice=f"Remove {self._name}, or add later events.",
            )
        if not counts.examples:
            raise StageError(
                "EmptyData",
                f"{self._name} holds {counts.filtered} conversation trees, none with a reviewed "
                "answer.",
                advice=f"Remove {self._name}, or export its trees with their reviews.",
            )

    def _read(self) -> Iterator[Example]:
        for row in self.rows():
            yield from self.reader.read(row, self.counts)
        self.finish()

    def _detected(self, rows: Iterator[Row | Line]) -> tuple[DataFormat, Iterator[Row | Line]]:
        """Return the format, and an iterator over all rows."""
        if self._settings.format != "auto":
            return self._settings.format, rows
        head: list[Row] = []
        readable = 0
        for row in map(parsed, rows):
            head.append(row)
            readable += not isinstance(row.value, BrokenRow)
            if readable == DETECTED_FROM:
                break
        if not readable:  # no format to detect: report the broken rows
            for row in head:
                self._rows += 1
                self.counts.refuse(row, getattr(row.value, "reason", ""))
            raise self._invalid() if head else self._empty()
        return layouts.detect(head, self._settings.fields), chain(head, rows)

    def _noted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self.reader.note_unread(row, self.counts)
            yield row

    def _counted(self, rows: Iterator[Row | Line]) -> Iterator[Row | Line]:
        for row in rows:
            self._rows += 1
            yield row

    def _empty(self) -> StageError:
        return StageError(
            "EmptyData",
            f"{self._name} holds no rows.",
            advice=f"Put rows into the file, or remove {self._name}.",
        )

    def _invalid(self) -> StageError:
        skipped, faults = self.counts.skipped, self.counts.faults
        shown = "; ".join(str(fault) for fault in faults)
        first = "" if skipped <= FAULTS_SHOWN else f"The first {FAULTS_SHOWN}: "
        if self._on_invalid == "error":
            advice = "Repair these rows, or set data.onInvalidRow: skip."
        else:
            advice = f"Repair the rows, or set the right format or fields of {self._name}."
        share = f"{skipped} of {self._rows} rows are invalid"
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
    examples = [_example(row, each, wanted, source) for each in parsed]
    for example in examples:
        check(example)
    return examples


def _example(row: Row, parsed: Parsed, wanted: tuple[str, ...], source: str) -> Example:
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
        source,
    )
