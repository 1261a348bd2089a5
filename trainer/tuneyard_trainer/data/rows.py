"""Reading of data files as rows, each with its number in the file for messages.

Files are streamed: memory holds one row, except for JSON (one file) and text (one document).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

from tuneyard.errors import StageError
from tuneyard_trainer.data.example import Fault
from tuneyard_trainer.storage.digests import files_under, is_documentation

FileKind = Literal["jsonl", "json", "csv", "tsv", "parquet", "text"]
KINDS: dict[str, FileKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
"""File kinds by suffix. The suffix of a compression may follow."""
_CELL_LIMIT = 64 << 20  # characters; the csv module's default of 128 Ki is too short for documents
MAX_ROW = 64 << 20
"""Bytes of the longest line that is read as a row."""
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
"""A file that unpacks to more than both, bytes and times its size, is refused. Text unpacks to 3 to
20 times its size."""
_UNREADABLE = (EOFError, OSError, zlib.error, lzma.LZMAError)  # broken compression raises these


@dataclass(frozen=True)
class BrokenRow:
    """The value of a row that cannot be read."""

    reason: str
    fault: Fault = "UnreadableRow"


@dataclass(frozen=True)
class Row:
    """One row of a file. `number` counts from 1: lines in JSONL, else rows without the header and
    blank rows."""

    number: int
    value: dict[str, Any] | BrokenRow
    file: str = ""
    """The file's name relative to the data set's folder."""


class Line(NamedTuple):
    """A row of a JSONL file that is not parsed yet: `parsed` does it, in any process."""

    number: int
    text: bytes
    file: str = ""


def data_files(path: Path) -> list[tuple[str, Path]]:
    """Return the files of a data set (a file, folder or glob), sorted, each with its relative name.

    A folder's README, LICENSE and NOTICE are left out. Raises StageError UnknownFileType for an
    unknown suffix or a mixture of kinds, EmptyData for a folder without files.
    """
    files = files_under(path)
    if path.is_dir():
        files = [each for each in files if not is_documentation(PurePosixPath(each[0]))]
    if not files:
        raise StageError("EmptyData", f"{path} holds no files.", advice="Correct the data's uri.")
    kinds = {_kind(file): name for name, file in reversed(files)}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise StageError(
            "UnknownFileType",
            f"{path} holds files of several kinds: {found}.",
            advice="Choose one kind with a glob in the data's uri: .../*.jsonl.",
        )
    return files


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file. A text file is one row: {"text": its content}.

    A row that cannot be read is a BrokenRow. Raises StageError UnknownFileType for an unknown
    suffix, SourceForbidden for a file that cannot be opened, and InvalidData for a file that cannot
    be read as a whole (broken compression, JSON that does not parse, no header).
    """
    return map(parsed, _unparsed_rows(path))


def _unparsed_rows(path: Path) -> Iterator[Row | Line]:
    kind = _kind(path)
    with _whole_file_faults(path), _opened(path) as file:
        if kind == "jsonl":
            yield from _jsonl(file)
        elif kind == "json":
            yield from _json(file, path)
        elif kind in ("csv", "tsv"):
            yield from _table(file, path, "," if kind == "csv" else "\t")
        elif kind == "parquet":
            yield from _parquet(_seekable(file))
        else:
            yield _text(file)


def read_data(path: Path) -> Iterator[Row]:
    """Yield the rows of a data set, file by file, each with its file's name. Raises StageError as
    `data_files` and `read_rows` do."""
    return map(parsed, read_unparsed(path))


def read_unparsed(path: Path) -> Iterator[Row | Line]:
    """Yield the rows of a data set as `read_data` does, with the lines of JSONL as they are."""
    for name, file in data_files(path):
        for row in _unparsed_rows(file):
            if isinstance(row, Line):
                yield Line(row.number, row.text, name)
            else:
                yield Row(row.number, row.value, name)


def parsed(row: Row | Line) -> Row:
    """Return the row of a line, which is a BrokenRow if it is not an object of JSON."""
    if isinstance(row, Row):
        return row
    return Row(row.number, _value(row.text), row.file)


def is_text(name: str) -> bool:
    """Return whether a file of this name is one document. Raises StageError UnknownFileType."""
    return _kind(Path(name)) == "text"


def _kind(path: Path) -> FileKind:
    compressed = path.suffix.lower() in _OPENERS
    suffix = Path(path.stem).suffix if compressed else path.suffix
    kind = KINDS.get(suffix.lower())
    if kind is None:
        raise StageError(
            "UnknownFileType",
            f"{path.name}: the suffix {suffix or '(none)'!r} is not known. Known suffixes are "
            f"{', '.join(KINDS)}, each also with {', '.join(_OPENERS)}.",
            advice="Give the file the suffix of its format, or correct the data's uri.",
        )
    return kind


def _opened(path: Path) -> IO[bytes]:
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        return path.open("rb")
    return io.BufferedReader(_Unpacked(opener(path), path.stat().st_size), 1 << 20)


class _Unpacked(io.RawIOBase):
    """A compressed file's content. Raises OSError where it grows like a zip bomb's."""

    def __init__(self, file: IO[bytes], packed: int) -> None:
        self._file, self._packed, self._size = file, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        self._size += len(content)
        if self._size > max(BOMB_BYTES, BOMB_RATIO * self._packed):
            raise OSError(
                f"{self._packed} bytes unpack to more than {BOMB_RATIO} times as many, as those "
                "of a zip bomb do"
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow as pa  # the standard library has zstd from Python 3.14 on

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


@contextmanager
def _whole_file_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except (PermissionError, FileNotFoundError) as error:
        raise StageError("SourceForbidden", f"{path} cannot be opened: {error}.") from error
    except _UNREADABLE as error:
        raise _invalid(path, f"cannot be decompressed or read: {error}") from error


def _invalid(path: Path, reason: str) -> StageError:
    return StageError("InvalidData", f"{path.name} {reason}.", advice="Repair or replace the file.")


def _jsonl(file: IO[bytes]) -> Iterator[Row | Line]:
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW)
            yield Row(number, BrokenRow(f"longer than {MAX_ROW >> 20} MiB: split the row"))
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield Line(number, line.rstrip(b"\r\n"))


def _value(line: bytes) -> dict[str, Any] | BrokenRow:
    try:
        return _row_value(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return BrokenRow(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return BrokenRow(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number too long, nesting too deep
        return BrokenRow(f"not JSON: {error}")


def _row_value(value: Any) -> dict[str, Any] | BrokenRow:
    if isinstance(value, dict):
        return value
    return BrokenRow(f"a row must be an object with fields, not {type(value).__name__}")


def _json(file: IO[bytes], path: Path) -> Iterator[Row]:
    try:
        value = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _invalid(path, f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        hint = (
            "; rename a file with one object a line to .jsonl" if "Extra data" in error.msg else ""
        )
        where = f"line {error.lineno}, column {error.colno}"
        raise _invalid(path, f"is not JSON: {error.msg} at {where}{hint}") from error
    except (ValueError, RecursionError) as error:  # a number too long, nesting too deep
        raise _invalid(path, f"is not JSON: {error}") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise _invalid(path, 'is JSON but neither a list of rows nor {"data": [rows]}')
    for number, row in enumerate(value, start=1):
        yield Row(number, _row_value(row))


def _table(file: IO[bytes], path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_CELL_LIMIT)
    # Undecodable bytes become lone surrogates, so that reading continues after a broken row.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    header = next(_cells(lines), None)
    if header is None:
        return
    if isinstance(header, BrokenRow):
        raise _invalid(path, f"has a header that is {header.reason}")
    if len(set(header)) < len(header) or "" in header:
        raise _invalid(
            path, f"needs a header with a different name for each column; the header is {header}"
        )
    for number, cells in enumerate(_cells(lines), start=1):
        yield Row(number, _table_row(header, cells))


def _cells(lines: Iterator[list[str]]) -> Iterator[list[str] | BrokenRow]:
    """Yield rows of cells without blank rows."""
    while True:
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield BrokenRow(f"not CSV: {error}")
            continue
        if cells:
            yield cells


def _table_row(header: list[str], cells: list[str] | BrokenRow) -> dict[str, Any] | BrokenRow:
    if isinstance(cells, BrokenRow):
        return cells
    if len(cells) != len(header):
        return BrokenRow(
            f"the row has {len(cells)} cells, and the header names {len(header)} columns"
        )
    for name, cell in zip(header, cells, strict=True):
        if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
            return BrokenRow(f"column {name} is not UTF-8")
    return dict(zip(header, cells, strict=True))


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """Return a seekable file for Parquet, which is read from its end. A compressed file is unpacked
    to disk."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        return file
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - the reader needs it open
    shutil.copyfileobj(file, unpacked)
    return unpacked


def _parquet(file: IO[bytes]) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        if len(set(names)) < len(names):
            raise OSError(f"Parquet with two columns of one name: {', '.join(names)}")
        for batch in opened.iter_batches(batch_size=1024):
            for value in _batch_rows(batch):
                number += 1
                yield Row(number, value)
    except pa.ArrowException as error:
        raise OSError(f"not Parquet: {error}") from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | BrokenRow]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:  # a column of strings holds other bytes: find its rows
        for index in range(batch.num_rows):
            try:
                yield from map(_row_without_nulls, batch.slice(index, 1).to_pylist())
            except UnicodeDecodeError as error:
                yield BrokenRow(f"a column of strings holds bytes that are not UTF-8: {error}")
        return
    yield from map(_row_without_nulls, values)


def _row_without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the null fields of its structures. Arrow gives each structure of a
    column the fields of all of them, such as the arguments of every tool."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(each) for each in value]
    return value


def _text(file: IO[bytes]) -> Row:
    content = file.read()
    try:
        return Row(1, {"text": content.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Row(1, BrokenRow(f"not UTF-8: byte 0x{content[error.start]:02x} in line {line}"))
