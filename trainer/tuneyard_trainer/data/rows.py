"""Files of every kind as rows, with the number that a user needs to find a broken one.

Streaming: one row at a time is in memory, except for JSON (one file) and text (one document).
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tuneyard.errors import StageError
from tuneyard_trainer.storage.digests import files_under

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
"""File kinds by suffix; a compression's suffix may follow."""
_NOT_DATA = ("readme", "license", "licence", "notice")  # what data folders hold beside their data
_CELL_LIMIT = 64 << 20  # characters; the csv module's own 128 Ki is shorter than real documents
_UNREADABLE = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what broken compression raises


@dataclass(frozen=True)
class BrokenRow:
    """What stands where a row could not be read."""

    reason: str


@dataclass(frozen=True)
class Row:
    """One row of a file. `number` counts from 1: the line in JSONL, else the row (without header,
    blank rows not counted)."""

    number: int
    value: dict[str, Any] | BrokenRow
    file: str = ""
    """The file's name relative to the data set's folder."""


def data_files(path: Path) -> list[tuple[str, Path]]:
    """The files of a data set (a file, folder or glob) by relative name, sorted; all of one kind.

    A folder's README, LICENSE and NOTICE are left out. Raises StageError UnknownFileType for a
    suffix that nothing reads and for a mixture of kinds, EmptyData for a folder without files.
    """
    files = files_under(path)
    if path.is_dir():
        files = [(name, file) for name, file in files if not _beside_data(file)]
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
    """The rows of one file. A text file is one row: {"text": its content}.

    Raises StageError UnknownFileType by suffix, InvalidData where the file as a whole is unreadable
    (broken compression, JSON that does not parse, no header); a row's own fault is a BrokenRow.
    """
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


def _beside_data(file: Path) -> bool:
    return file.name.lower().startswith(_NOT_DATA) and file.suffix.lower() in ("", ".md", ".txt")


def _kind(path: Path) -> FileKind:
    compressed = path.suffix.lower() in _OPENERS
    suffix = Path(path.stem).suffix if compressed else path.suffix
    kind = KINDS.get(suffix.lower())
    if kind is None:
        raise StageError(
            "UnknownFileType",
            f"{path.name}: the suffix {suffix or '(none)'!r} is not known. Known are "
            f"{', '.join(KINDS)}, each also with {', '.join(_OPENERS)}.",
            advice="Rename the file by its content, or correct the data's uri.",
        )
    return kind


def _opened(path: Path) -> IO[bytes]:
    return _OPENERS.get(path.suffix.lower(), _plain)(path)


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow as pa  # Python has zstd from 3.14 on

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


def _jsonl(file: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield Row(number, _parsed(line.rstrip(b"\r\n")))


def _parsed(line: bytes) -> dict[str, Any] | BrokenRow:
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
    return BrokenRow(f"a row must be an object with fields, and this is {type(value).__name__}")


def _json(file: IO[bytes], path: Path) -> Iterator[Row]:
    try:
        value = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _invalid(path, f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        hint = "; one object a line is JSONL: name it .jsonl" if "Extra data" in error.msg else ""
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
    # Undecodable bytes become lone surrogates, so that one broken row does not end the reading.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    header = next(_cells(lines), None)
    if header is None:
        return
    if isinstance(header, BrokenRow) or len(set(header)) < len(header) or "" in header:
        raise _invalid(path, f"needs a header that names each column once, and has {header}")
    for number, cells in enumerate(_cells(lines), start=1):
        yield Row(number, _table_row(header, cells))


def _cells(lines: Iterator[list[str]]) -> Iterator[list[str] | BrokenRow]:
    """Rows of cells, blank ones left out."""
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
        return BrokenRow(f"{len(cells)} cells where the header names {len(header)} columns")
    for name, cell in zip(header, cells, strict=True):
        if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
            return BrokenRow(f"column {name} is not UTF-8")
    return dict(zip(header, cells, strict=True))


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """Parquet is read from its end: a compressed file is unpacked to disk first."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        return file
    whole = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as its reader
    shutil.copyfileobj(file, whole)
    return whole


def _parquet(file: IO[bytes]) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(number, value)
    except pa.ArrowException as error:
        raise OSError(f"not Parquet: {error}") from error


def _text(file: IO[bytes]) -> Row:
    content = file.read()
    try:
        return Row(1, {"text": content.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Row(1, BrokenRow(f"not UTF-8: byte 0x{content[error.start]:02x} in line {line}"))
