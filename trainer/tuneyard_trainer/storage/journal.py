"""An append-only file of JSON lines, so that a killed stage pays for nothing twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from tuneyard_trainer.storage.files import disk_error

PERSIST_SECONDS = 60.0
"""How much work a lost machine may cost, where the work folder is not itself the durable place."""


class Journal:
    """What earlier attempts of the same stage wrote, and a place for more. One writer."""

    def __init__(self, folder: Path, identity: str, persist: Callable[[Path], None]) -> None:
        """`identity`: a journal of another is begun anew. A line cut off by a kill is dropped.

        Raises StageError DiskFull or WriteFailed.
        """
        self.entries: list[dict[str, Any]] = []
        """Of earlier attempts, in order."""
        self._folder, self._persist = folder, persist
        self._path = folder / "journal.jsonl"
        self._persisted = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._opened(identity)
        except OSError as error:
            raise disk_error(error, folder) from error

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """On disk when it returns. Raises StageError DiskFull or WriteFailed."""
        try:
            self._file.write(lines(entries))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self._folder) from error
        if time.monotonic() - self._persisted > PERSIST_SECONDS:
            self._persist(self._folder)
            self._persisted = time.monotonic()

    def close(self) -> None:
        """Makes what was appended outlive this machine."""
        self._file.close()
        self._persist(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self, identity: str) -> BinaryIO:
        good = self._read(identity)
        file = self._path.open("r+b" if good else "wb")
        file.truncate(good)
        file.seek(good)
        if not good:
            file.write(lines([{"identity": identity}]))
            file.flush()
        return file

    def _read(self, identity: str) -> int:
        """Fills `entries`; the number of bytes that hold good."""
        if not self._path.exists():
            return 0
        good = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file):
                entry = _entry(line)
                if entry is None or (number == 0 and entry.get("identity") != identity):
                    break
                good += len(line)
                if number:
                    self.entries.append(entry)
        return good


def lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON Lines; half a surrogate pair, which a broken answer may hold, becomes "?"."""
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    return text.encode("utf-8", "replace")


def _entry(line: bytes) -> dict[str, Any] | None:
    """None for a line that is cut off or torn."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
