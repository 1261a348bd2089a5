"""Reading of data files as rows, each with its number in the file for messages.

Files are streamed: memory holds one row, except for JSON (one file) and text (one document).
`parquet_rows` reads Parquet.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

from tuneyard.errors import StageError
from tuneyard_trainer.data.reading.example import Fault, printable
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
MAX_ROW = 64 << 20
"""Bytes of the longest line that is read as a row, and characters of a table's longest row."""
MAX_LEVELS = 450
"""The deepest nesting of a row: the longest conversation of a tree has two levels a message. Deeper
values exceed the stack of what reads them."""
_ONE_VALUE = "rename a file that is one list of rows to .json"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
"""A file that unpacks to more than both, bytes and times its size, is refused. Text unpacks to 3 to
20 times its size."""
_UNREADABLE = (EOFError, OSError, zlib.error, lzma.LZMAError)  # broken compression raises these


@dataclass(frozen=True)
class BrokenRow:
    """The value of a row that cannot be read."""

    reason: str
    fault: Fault = "UnreadableRow"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", printable(self.reason))


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
        if kind != "parquet" and file.peek(2)[:2] in _UTF_16:
            raise _invalid(path, "is UTF-16: convert it with iconv -f UTF-16 -t UTF-8")
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


def _opened(path: Path) -> io.BufferedReader:
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
            raise bomb(self._packed)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def bomb(packed: int) -> OSError:
    """Return the error for a file of `packed` bytes that unpacks to far more."""
    return OSError(
        f"{packed} bytes unpack to more than {BOMB_RATIO} times as many, as those of a zip bomb do"
    )


def too_long() -> BrokenRow:
    """Return the value of a row that is longer than MAX_ROW."""
    return BrokenRow(f"longer than {MAX_ROW >> 20} MiB: split the row")


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
    message = printable(f"{path.name} {reason}".rstrip("."))
    return StageError("InvalidData", f"{message}.", advice="Repair or replace the file.")


def _jsonl(file: IO[bytes]) -> Iterator[Row | Line]:
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW)
            yield Row(number, too_long())
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield Line(number, line.rstrip(b"\r\n"))


def _value(line: bytes) -> dict[str, Any] | BrokenRow:
    try:
        value = _DECODER.decode(line.decode())
        if isinstance(value, list):
            return BrokenRow(f"a row must be an object with fields, not list; {_ONE_VALUE}")
        return _row_value(value)
    except UnicodeDecodeError as error:
        return BrokenRow(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        hint = f"; {_ONE_VALUE}" if line.strip() in (b"[", b"{") else ""
        return BrokenRow(f"not JSON: {error.msg} at column {error.colno}{hint}")
    except (ValueError, RecursionError) as error:
        return BrokenRow(_refused(error))


class _RepeatedKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError for two values of one key, of which Python would
    keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"the key {twice!r:.60} appears twice in one object: rename one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _refused(error: ValueError | RecursionError) -> str:
    """Return what is wrong with JSON that Python can parse, in principle."""
    if isinstance(error, _RepeatedKeyError):
        return str(error)
    if isinstance(error, RecursionError):
        return f"nested deeper than {MAX_LEVELS} levels: flatten the row"
    return f"a number has more than {sys.get_int_max_str_digits()} digits: write it as text"


def _row_value(value: Any) -> dict[str, Any] | BrokenRow:
    if not isinstance(value, dict):
        return BrokenRow(f"a row must be an object with fields, not {type(value).__name__}")
    if _is_deep(value):
        return BrokenRow(f"nested deeper than {MAX_LEVELS} levels: flatten the row")
    return value


def _is_deep(value: Any) -> bool:
    """Return whether a value has more than MAX_LEVELS levels, level by level."""
    level = [value]
    for _ in range(MAX_LEVELS):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for each in parts for part in each if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _json(file: IO[bytes], path: Path) -> Iterator[Row]:
    try:
        value = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _invalid(path, f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        hint = (
            "; rename a file with one object a line to .jsonl" if "Extra data" in error.msg else ""
        )
        where = f"line {error.lineno}, column {error.colno}"
        raise _invalid(path, f"is not JSON: {error.msg} at {where}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"cannot be read: {_refused(error)}") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise _invalid(path, 'is JSON but neither a list of rows nor {"data": [rows]}')
    for number, row in enumerate(value, start=1):
        yield Row(number, _row_value(row))


def _table(file: IO[bytes], path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW)
    # Undecodable bytes become lone surrogates, so that reading continues after a broken row.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    lines = _Lines(text)
    header = next(_cells(lines, delimiter), None)
    if header is None:
        return
    if isinstance(header, BrokenRow):
        raise _invalid(path, f"has a header that is {header.reason}")
    if not all(map(_is_utf8, header)):
        raise _invalid(path, "has a header that is not UTF-8")
    if len(set(header)) < len(header) or "" in header:
        raise _invalid(
            path, f"needs a header with a different name for each column; the header is {header}"
        )
    other = next((mark for mark in (";", "\t", ",") if mark in header[0]), None)
    if len(header) == 1 and other is not None:
        raise _invalid(
            path,
            f"has one column, {header[0]!r:.60}: separate the cells with {delimiter!r}, not with "
            f"{other!r}",
        )
    for number, cells in enumerate(_cells(lines, delimiter), start=1):
        yield Row(number, _table_row(header, cells))


class _Lines:
    """The lines of a table. Raises csv.Error at a row of more than MAX_ROW characters, and skips
    the rest of its line."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.number = 0
        """The number of the last line."""
        self.row_length = 0
        """The characters of the row so far. The reader of a row sets it to 0."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.row_length += len(line)
        if self.row_length <= MAX_ROW:
            return line
        while line and not line.endswith(("\n", "\r")):
            line = self._text.readline(MAX_ROW)
        raise csv.Error(too_long().reason)


def _cells(lines: _Lines, delimiter: str) -> Iterator[list[str] | BrokenRow]:
    """Yield rows of cells without blank rows."""
    found = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first, lines.row_length = lines.number + 1, 0
        try:
            cells = next(found)
        except StopIteration:
            return
        except csv.Error as error:
            yield BrokenRow(f"not CSV: {_explained(error, first, lines.number)}")
            continue
        if cells:
            yield cells


def _explained(error: csv.Error, first: int, last: int) -> str:
    """Return what is wrong with the row in these lines."""
    where = f"in line {first}" if first == last else f"in lines {first} to {last}"
    if str(error) == "unexpected end of data":
        return f"a cell {where} begins with a quote that is never closed"
    return f"{error} {where}" + ("; is a quote not closed?" if last > first else "")


def _table_row(header: list[str], cells: list[str] | BrokenRow) -> dict[str, Any] | BrokenRow:
    if isinstance(cells, BrokenRow):
        return cells
    if len(cells) != len(header):
        return BrokenRow(
            f"the row has {len(cells)} cells, and the header names {len(header)} columns"
        )
    for name, cell in zip(header, cells, strict=True):
        if not _is_utf8(cell):
            return BrokenRow(f"column {name} is not UTF-8")
    return dict(zip(header, cells, strict=True))


def _is_utf8(cell: str) -> bool:
    return cell.isascii() or not any("\udc80" <= char <= "\udcff" for char in cell)


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """Return a seekable file for Parquet, which is read from its end. A compressed file is unpacked
    to disk."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        return file
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - the reader needs it open
    shutil.copyfileobj(file, unpacked)
    return unpacked


def _parquet(file: IO[bytes]) -> Iterator[Row]:
    from tuneyard_trainer.data.reading import parquet_rows  # pyarrow is needed for Parquet alone

    for number, value in enumerate(parquet_rows.read(file), start=1):
        yield Row(number, value)


def _text(file: IO[bytes]) -> Row:
    content = file.read()
    try:
        return Row(1, {"text": content.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Row(1, BrokenRow(f"not UTF-8: byte 0x{content[error.start]:02x} in line {line}"))
