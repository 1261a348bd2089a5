"""Arrays with an element for each row, on disk instead of in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_PREFIX = ".scratch-"


class ScratchArray:
    """An array that grows, in a file without a name, which ends with the array.

    Memory holds a buffer of 64 KiB. The pages of the file are the kernel's, which writes them to
    disk and takes them back where memory is short. It is never changed by its mapping: a full disk
    would then end the process by SIGBUS on file systems that write to another place, such as Btrfs.
    """

    def __init__(self, folder: Path | None, dtype: DTypeLike) -> None:
        """`folder`: a folder of the file system that the file is to be on. None: the system's for
        temporary files."""
        self._dtype = np.dtype(dtype)
        self._size = 0
        self._file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115 - `close` closes it
            dir=folder, prefix=_PREFIX, buffering=1 << 16
        )

    def extend(self, values: NDArray[Any]) -> None:
        """Add elements. Their type is that of the array."""
        self._file.write(values.tobytes())
        self._size += len(values)

    def __len__(self) -> int:
        return self._size

    def close(self) -> NDArray[Any]:
        """End writing, and return (N,) all elements, mapped and read-only."""
        with self._file:
            if not self._size:
                return np.zeros(0, self._dtype)
            self._file.flush()
            return np.asarray(np.memmap(self._file, self._dtype, mode="r", shape=(self._size,)))


def remove_scratch(folder: Path) -> None:
    """Remove the files that a killed process leaves in a folder: some file systems give a file its
    name for a moment."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)
