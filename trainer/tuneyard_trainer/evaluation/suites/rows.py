"""The rows of a suite's file as items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tuneyard.errors import StageError
from tuneyard_trainer.data.reading.example import RowError
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, read_data
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN

T = TypeVar("T")


def read_items(
    path: Path,
    parse: Callable[[Mapping[str, Any]], T],
    limit: int | None,
    field: str,
    expected: str,
) -> dict[str, T]:
    """Return the items of a file's first `limit` rows, by file and row. None: of all rows.

    `parse`: returns a row's item or raises RowError. `field`: the file's field in the manifest.
    `expected`: the columns that a row should have. Raises StageError InvalidData, which names the
    first rows that hold no item, EmptyData, and those of `read_data`.
    """
    items: dict[str, T] = {}
    faults: list[str] = []
    for row in islice(read_data(path), limit):
        where = f"{row.file} row {row.number}".strip()
        try:
            items[where] = parse(_columns(row))
        except RowError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise StageError(
            "InvalidData",
            f"{field}: {len(faults)} of {len(faults) + len(items)} rows are no items of this "
            f"suite. {'; '.join(faults[:FAULTS_SHOWN])}.",
            advice=f"Repair these rows. Each needs {expected}.",
        )
    if not items:
        raise StageError(
            "EmptyData", f"{field} holds no rows.", advice=f"Put rows into it, or correct {field}."
        )
    return items


def text_of(row: Mapping[str, Any], *names: str) -> str | None:
    """Return the first of these columns that holds a text. None: none of them does."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return None


def _columns(row: Row) -> Mapping[str, Any]:
    if isinstance(row.value, BrokenRow):
        raise RowError(row.value.reason, row.value.fault)
    return row.value


def unfit(row: Mapping[str, Any], expected: str) -> RowError:
    """Return the error of a row whose columns fit nothing that is expected."""
    return RowError(f"the row has {', '.join(row) or 'no fields'}; expected: {expected}")
