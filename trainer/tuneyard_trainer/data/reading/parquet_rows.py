"""Rows of Parquet files, in bounded memory whatever a file claims.

A file of a few kilobytes can hold one row of a billion values, or a million rows that repeat one
text of many megabytes. Its metadata tells how much it unpacks to, and the first page of each column
how large the repeated texts are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
from pyarrow import parquet

from tuneyard_trainer.data.reading import rows
from tuneyard_trainer.data.reading.rows import BrokenRow
from tuneyard_trainer.data.reading.thrift import Compact, Struct

BATCH_ROWS = 64
"""The most rows that are unpacked at a time. More are not faster."""
BATCH_BYTES = 256 << 20
"""What the rows of a batch may unpack to, if each holds the longest of its repeated texts."""
BOMB_VALUES = 1 << 26
"""A file whose lists hold more values, and more than BOMB_RATIO times its size, is refused."""
_HEADER = 64
"""Bytes that hold the header of a dictionary page."""
_DICTIONARY_PAGE = 2
_VALUE_FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, pa.ArrowException)

Value = dict[str, Any] | BrokenRow


def read(file: IO[bytes]) -> Iterator[Value]:
    """Yield the rows. Raises OSError for a file that is damaged, contradicts itself, or unpacks
    like a zip bomb."""
    try:
        opened = parquet.ParquetFile(file, page_checksum_verification=True)
        names = opened.schema_arrow.names
        if len(set(names)) < len(names):
            raise OSError(f"Parquet with two columns of one name: {', '.join(names)}")
        contents = _Contents(file, opened)
        limit = contents.limit
        count = unpacked = 0
        for index in range(opened.num_row_groups):
            for batch in opened.iter_batches(contents.batch_rows(index), row_groups=[index]):
                count, unpacked = count + batch.num_rows, unpacked + batch.nbytes
                if unpacked > limit:
                    raise rows.bomb(contents.file_size)
                yield from _values(batch)
        if count != contents.num_rows:
            raise OSError(
                f"the footer says that the file has {contents.num_rows} rows, and it has {count}"
            )
    except (pa.ArrowException, OverflowError) as error:
        raise OSError(f"not Parquet: {error}") from error


# ---- what a file unpacks to -------------------------------------------------------------------


class _Contents:
    """The sizes that the footer of a file states.

    The numbers of fields are those of parquet-format: FileMetaData, RowGroup, ColumnMetaData and
    PageHeader.
    """

    def __init__(self, file: IO[bytes], opened: parquet.ParquetFile) -> None:
        """Raises OSError for a footer that cannot be read or that describes a zip bomb."""
        self._file = file
        self.file_size = file.seek(0, 2)
        schema = opened.schema
        self._listed = [schema.column(i).max_repetition_level > 0 for i in range(len(schema))]
        """Whether each column is in a list."""
        try:
            footer = _footer(file)
            self.num_rows: int = footer[3]
            self._group_rows: list[int] = [group[3] for group in footer[4]]
            self._groups: list[list[Struct]] = [
                [column[3] for column in group[1]] for group in footer[4]
            ]
            self._check()
        except (LookupError, ValueError, TypeError, RecursionError) as error:
            raise OSError(f"not Parquet: the footer cannot be read: {error!r}") from error

    @property
    def limit(self) -> int:
        """The most bytes that the file may unpack to."""
        return max(rows.BOMB_BYTES, rows.BOMB_RATIO * self.file_size)

    def _check(self) -> None:
        columns = [column for group in self._groups for column in group]
        for group, num_rows in zip(self._groups, self._group_rows, strict=True):
            for column, listed in zip(group, self._listed, strict=True):
                if not listed and column[5] != num_rows:
                    raise OSError(
                        f"the footer says that a group of {num_rows} rows has {column[5]} values "
                        "in a column"
                    )
        if sum(column[6] for column in columns) > self.limit:
            raise rows.bomb(self.file_size)
        counts = [
            column[5]
            for group in self._groups
            for column, listed in zip(group, self._listed, strict=True)
            if listed
        ]
        if max(counts, default=0) > max(BOMB_VALUES, rows.BOMB_RATIO * self.file_size):
            raise OSError(
                f"{self.file_size} bytes hold lists of {max(counts)} values, as those of a zip "
                "bomb do"
            )

    def batch_rows(self, index: int) -> int:
        """Return how many rows of a row group are unpacked at a time. Raises OSError if one row
        alone is as large as a zip bomb."""
        row_bytes = 0.0
        for column, listed in zip(self._groups[index], self._listed, strict=True):
            # A field of another type than the format's is none: pyarrow skips it too.
            starts = (column.get(number) for number in (11, 9))
            start = next((each for each in starts if isinstance(each, int) and each), 0)
            size, entries = _dictionary(self._file, start)
            values = column[5] / max(1, self._group_rows[index])
            row_bytes += size / max(1, entries) * values if listed else size
        if row_bytes > rows.BOMB_BYTES:
            size = int(row_bytes) >> 20
            raise OSError(f"a row unpacks to {size} MiB, as those of a zip bomb do")
        return int(max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes))))


def _footer(file: IO[bytes]) -> Struct:
    file.seek(-8, 2)
    size = int.from_bytes(file.read(4), "little")
    file.seek(-8 - size, 2)
    return Compact(file.read(size)).struct()


def _dictionary(file: IO[bytes], offset: int) -> tuple[int, int]:
    """Return the bytes and the entries of the dictionary page at an offset; (0, 1): there is
    another page, or none."""
    if offset < 0:
        return 0, 1
    file.seek(offset)
    try:
        page = Compact(file.read(_HEADER)).struct()
        size, entries = (page[2], page[7][1]) if page[1] == _DICTIONARY_PAGE else (0, 1)
        return int(size), int(entries)
    except (LookupError, ValueError, TypeError, RecursionError):
        return 0, 1


# ---- values -----------------------------------------------------------------------------------


def _values(batch: pa.RecordBatch) -> Iterator[Value]:
    """Yield the rows of a batch, one by one if they are large or if one cannot be read."""
    if batch.nbytes <= rows.MAX_ROW:
        try:
            found = batch.to_pylist()
        except _VALUE_FAULTS:
            pass
        else:
            yield from map(_without_null_fields, found)
            return
    for index in range(batch.num_rows):
        yield _value(batch.slice(index, 1))


def _value(row: pa.RecordBatch) -> Value:
    value: dict[str, Any] = {}
    size = 0
    for name, column in zip(row.schema.names, row.columns, strict=True):
        plain = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        size += plain.nbytes
        if size > rows.MAX_ROW:
            return rows.too_long()
        try:
            (value[name],) = plain.to_pylist()
        except UnicodeDecodeError as error:
            return BrokenRow(f"column {name} of strings holds bytes that are not UTF-8: {error}")
        except _VALUE_FAULTS as error:
            return BrokenRow(
                f"column {name} holds a value of the type {column.type} that cannot be read: "
                f"{error}; remove the column, or write it as text"
            )
    return _without_null_fields(value)


def _without_null_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the null fields of its structures. Arrow gives each structure of a
    column the fields of all of them, such as the arguments of every tool."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(each) for each in value]
    return value
