"""Prepared data on disk: flat token and mask arrays with row offsets, read by memory mapping.

A folder holds, for each split of `train` and `validation`, `SPLIT.tokens.npy` (int32, flat),
`SPLIT.mask.npy` (uint8, flat), `SPLIT.offsets.npy` (int64, N+1) and `SPLIT.source.npy` (int16, N).
`gaps`, `general` and `guard` have the same files.
A split without rows has no files; `train` always has rows. `data.json` is written last: its
presence means that the other files are complete.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tuneyard.errors import StageError

SPLITS = ("train", "validation")
GAPS = "gaps"
"""The documents of `validation` with a gap each, whose text is the only target. Present where the
job fills in the middle."""
GENERAL, GUARD = "general", "guard"
"""The general data of terms against forgetting, and that of the guard. Present where the job has
them; never trained on."""
ARRAYS = ("tokens", "mask", "offsets", "source")
BLOCK_ROWS = 4096
"""Rows that are counted at a time."""


@dataclass(frozen=True)
class Rows:
    """The rows of one split, read from disk on access."""

    tokens: NDArray[np.int32]
    """Flat token ids of all rows."""
    flat_mask: NDArray[np.uint8]
    """Flat, 1 for a target: a token to predict from the tokens before it in its row. A row's first
    token is never a target."""
    offsets: NDArray[np.int64]
    """(N+1,) row i is tokens[offsets[i]:offsets[i+1]]."""
    source: NDArray[np.int16]
    """(N,) index of each row's data set."""

    @classmethod
    def open(cls, folder: Path, split: str) -> Rows | None:
        """Return the split's rows. None: the split has no rows."""
        if not _file(folder, split, "offsets").exists():
            return None
        tokens, mask, offsets, source = (
            np.asarray(np.load(_file(folder, split, name), mmap_mode="r")) for name in ARRAYS
        )
        return cls(tokens, mask, offsets, source)

    @classmethod
    def blocks(cls, folder: Path, split: str) -> Iterator[Rows]:
        """Yield the split's rows, BLOCK_ROWS at a time. The files are mapped anew for each block:
        pages that were read leave the process with it."""
        start = 0
        while (rows := cls.open(folder, split)) is not None and start < len(rows):
            offsets = rows.offsets[start : start + BLOCK_ROWS + 1]
            tokens = slice(int(offsets[0]), int(offsets[-1]))
            source = rows.source[start : start + BLOCK_ROWS]
            yield cls(rows.tokens[tokens], rows.flat_mask[tokens], offsets - offsets[0], source)
            start += BLOCK_ROWS

    @classmethod
    def of(cls, ids: Sequence[ArrayLike], masks: Sequence[ArrayLike]) -> Rows:
        """Return rows in memory, at least one, of a single data set. `ids` and `masks`: (L,) of
        each row."""
        tokens = [np.asarray(row, dtype=np.int32) for row in ids]
        return cls(
            tokens=np.concatenate(tokens),
            flat_mask=np.concatenate([np.asarray(mask, dtype=np.uint8) for mask in masks]),
            offsets=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
            source=np.zeros(len(tokens), dtype=np.int16),
        )

    def __len__(self) -> int:
        return len(self.source)

    def ids(self, row: int) -> NDArray[np.int32]:
        """Return (L,) the row's token ids."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def mask(self, row: int) -> NDArray[np.uint8]:
        """Return (L,) 1 for each target."""
        return self.flat_mask[self.offsets[row] : self.offsets[row + 1]]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """(N,) targets of each row. Rows are never empty, which `reduceat` relies on."""
        found = np.empty(len(self), dtype=np.int64)
        for start in range(0, len(self), BLOCK_ROWS):  # reduceat copies its input as int64
            bounds = self.offsets[start : start + BLOCK_ROWS + 1]
            mask = self.flat_mask[bounds[0] : bounds[-1]]
            np.add.reduceat(mask, bounds[:-1] - bounds[0], out=found[start : start + BLOCK_ROWS])
        return found


@dataclass(frozen=True)
class Prepared:
    """The output of a prepare stage."""

    train: Rows
    validation: Rows | None
    """None: no rows are held out."""
    summary: dict[str, Any]
    """`data.json`."""
    gaps: Rows | None = None
    """The held-out documents with a gap each. None: the job does not fill in the middle."""
    general: Rows | None = None
    """The general data of terms against forgetting. None: the job has none."""
    guard: Rows | None = None
    """The general data that the guard measures. None: the job has no guard."""

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Return the data of a finished prepare stage. Raises StageError NotPrepared for any other
        folder."""
        try:
            summary = json.loads((folder / "data.json").read_text("utf-8"))
            names = (*SPLITS, GAPS, GENERAL, GUARD)
            train, validation, *others = (Rows.open(folder, name) for name in names)
        except (OSError, ValueError) as error:
            raise StageError("NotPrepared", f"{folder} holds no prepared data: {error}.") from error
        if train is None:
            raise StageError("NotPrepared", f"{folder} holds no training rows.")
        return cls(train, validation, summary, *others)

    @property
    def weights(self) -> list[float]:
        """How often an epoch contains each row, by training data set."""
        return list(self.summary["weights"])

    @property
    def max_length(self) -> int:
        """The length limit of rows, in tokens."""
        return int(self.summary["maxLength"])


class RowWriter:
    """Appends rows to a split's files. Memory holds a buffer for each file alone.

    The files have their final names from the start: `data.json` marks them as complete.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._tokens = _Column(_file(folder, split, "tokens"), np.int32)
        self._mask = _Column(_file(folder, split, "mask"), np.uint8)
        self._offsets = _Column(_file(folder, split, "offsets"), np.int64)
        self._source = _Column(_file(folder, split, "source"), np.int16)
        self._offsets.append(np.zeros(1, np.int64))

    def append(self, ids: NDArray[np.int32], mask: NDArray[np.uint8], source: int) -> None:
        """Add one row of at least one token."""
        self._tokens.append(ids)
        self._mask.append(mask)
        self._offsets.append(np.array([self._tokens.size]))
        self._source.append(np.array([source]))

    def extend(
        self,
        ids: bytes | bytearray,
        masks: bytes | bytearray,
        lengths: array[int],
        sources: NDArray[np.int16],
    ) -> None:
        """Add rows. `ids`, `masks`: flat, int32 and uint8. `lengths`, `sources`: of each row."""
        self._offsets.append(self._tokens.size + np.cumsum(np.asarray(lengths)))
        self._tokens.append(np.frombuffer(ids, np.int32))
        self._mask.append(np.frombuffer(masks, np.uint8))
        self._source.append(sources)

    def __len__(self) -> int:
        return self._source.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for column in (self._tokens, self._mask, self._offsets, self._source):
            column.close()
        if not len(self):
            remove_split(self._folder, self._split)


class _Column:
    """A one-dimensional .npy file that grows. numpy pads the header to one size for any length, so
    `close` can overwrite the first header with the final length."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.size = 0
        self._dtype = np.dtype(dtype)
        self._file: IO[bytes] = path.open("wb", buffering=1 << 20)
        self._write_header()

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self.size += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        header = {
            "descr": npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.size,),
        }
        npy.write_array_header_1_0(self._file, header)


def remove_split(folder: Path, split: str) -> None:
    """Remove a split's files, if there are any."""
    for name in ARRAYS:
        _file(folder, split, name).unlink(missing_ok=True)


def _file(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}.{name}.npy"
