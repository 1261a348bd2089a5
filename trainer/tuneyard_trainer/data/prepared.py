"""Prepared data on disk: flat token and mask arrays with row offsets, read by memory mapping.

A folder holds, for each split of `train` and `validation`, `SPLIT.tokens.npy` (int32, flat),
`SPLIT.mask.npy` (uint8, flat), `SPLIT.offsets.npy` (int64, N+1) and `SPLIT.source.npy` (int16, N).
A split without rows has no files; `train` always has some. `data.json` is written last, so that
its presence says that the rest is whole.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from tuneyard.errors import StageError

SPLITS = ("train", "validation")
ARRAYS = ("tokens", "mask", "offsets", "source")


@dataclass(frozen=True)
class Rows:
    """The rows of one split; nothing is read before it is asked for."""

    tokens: NDArray[np.int32]
    """Flat token ids of all rows."""
    flat_mask: NDArray[np.uint8]
    """Flat, 1 where the token is a target given the tokens before it in its own row; so a row's
    first token never is."""
    offsets: NDArray[np.int64]
    """(N+1,) row i is tokens[offsets[i]:offsets[i+1]]."""
    source: NDArray[np.int16]
    """(N,) index of the data set each row came from."""

    @classmethod
    def open(cls, folder: Path, split: str) -> Rows | None:
        """None where the split has no rows."""
        if not _file(folder, split, "offsets").exists():
            return None
        tokens, mask, offsets, source = (
            np.asarray(np.load(_file(folder, split, name), mmap_mode="r")) for name in ARRAYS
        )
        return cls(tokens, mask, offsets, source)

    def __len__(self) -> int:
        return len(self.source)

    def ids(self, row: int) -> NDArray[np.int32]:
        """(L,) the row's token ids."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def mask(self, row: int) -> NDArray[np.uint8]:
        """(L,) 1 where the token is a target."""
        return self.flat_mask[self.offsets[row] : self.offsets[row + 1]]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """(N,) targets of each row. Rows are never empty, which `reduceat` relies on."""
        return np.add.reduceat(self.flat_mask, self.offsets[:-1], dtype=np.int64)


@dataclass(frozen=True)
class Prepared:
    """The output of a prepare stage."""

    train: Rows
    validation: Rows | None
    """None: nothing is held out."""
    summary: dict[str, Any]
    """`data.json`."""

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Raises StageError NotPrepared if the folder is not a finished prepare stage's."""
        try:
            summary = json.loads((folder / "data.json").read_text("utf-8"))
            train, validation = (Rows.open(folder, split) for split in SPLITS)
        except (OSError, ValueError) as error:
            raise StageError("NotPrepared", f"{folder} holds no prepared data: {error}.") from error
        if train is None:
            raise StageError("NotPrepared", f"{folder} holds no training rows.")
        return cls(train, validation, summary)

    @property
    def weights(self) -> list[float]:
        """How often an epoch sees each row, by training data set."""
        return list(self.summary["weights"])

    @property
    def max_length(self) -> int:
        """No row is longer, in tokens."""
        return int(self.summary["maxLength"])


class RowWriter:
    """Appends rows to a split's files. Only 10 bytes a row stay in memory, whatever their length.

    The files appear under their final names: `data.json` vouches for them, not their existence.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._tokens = _Column(_file(folder, split, "tokens"), np.int32)
        self._mask = _Column(_file(folder, split, "mask"), np.uint8)
        self._lengths, self._source = array("q"), array("h")
        self.num_targets = 0

    def append(self, ids: NDArray[np.int32], mask: NDArray[np.uint8], source: int) -> None:
        """Adds one row of at least one token."""
        self._tokens.append(ids)
        self._mask.append(mask)
        self._lengths.append(len(ids))
        self._source.append(source)
        self.num_targets += int(np.count_nonzero(mask))

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        return self._tokens.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tokens.close()
        self._mask.close()
        if not self._lengths:
            remove_split(self._folder, self._split)
            return
        offsets = np.concatenate(([0], np.cumsum(np.frombuffer(self._lengths, np.int64))))
        np.save(_file(self._folder, self._split, "offsets"), offsets)
        np.save(_file(self._folder, self._split, "source"), np.frombuffer(self._source, np.int16))


class _Column:
    """A one-dimensional .npy file that grows: numpy pads its header to one size for any length, so
    the header written first can be written again at the end."""

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
    """Removes a split's files, where there are any."""
    for name in ARRAYS:
        _file(folder, split, name).unlink(missing_ok=True)


def _file(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}.{name}.npy"
