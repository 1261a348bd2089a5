"""Rows as text on disk: one JSON object a line, which can be read in any order."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.data.scratch import ScratchArray

EXAMPLES = "examples.jsonl"
"""The file of a prepare stage with training rows for worked examples."""
WITHOUT_CONTEXT = "withoutContext"
"""The field with the text of a row before `retrieval` put a context before its question."""


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process."""
    content = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(content.digest(), "little")


def text_line(text: Mapping[str, Any]) -> bytes:
    """Return a row as its line in the file."""
    return (json.dumps(text, ensure_ascii=False) + "\n").encode()


class Texts:
    """The texts of rows: `messages`, `prompt` and `completion`, or `text`, of each.

    A context that is entered once to append; afterwards rows are read. A scratch file has 8 bytes a
    row.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._offsets, self._end = ScratchArray(path.parent, np.int64), 0
        self._starts: NDArray[np.int64] | None = None
        """(R,) the place of each line in the file. None: the file is still written."""
        self._file: IO[bytes] = path.open("wb", buffering=1 << 20)

    def append(self, text: Mapping[str, Any]) -> None:
        """Add a row."""
        self.extend([text_line(text)])

    def extend(self, lines: Iterable[bytes]) -> None:
        """Add rows as `text_line` returns them."""
        starts = array("q")
        for line in lines:
            starts.append(self._end)
            self._end += self._file.write(line)
        self._offsets.extend(np.asarray(starts))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row by its number, from 0."""
        found: dict[str, Any] = json.loads(self.line(row))
        return found

    def line(self, row: int) -> bytes:
        """Return a row as its line in the file."""
        if self._starts is None:
            raise ValueError(f"{self.path.name} is still written")
        self._file.seek(int(self._starts[row]))
        return self._file.readline()

    def lines(self) -> Iterator[bytes]:
        """Yield the rows as JSON, in order."""
        with self.path.open("rb") as lines:
            yield from lines

    def close(self) -> None:
        """End reading."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._starts = self._offsets.close()
        self._file = self.path.open("rb", buffering=1 << 16)
