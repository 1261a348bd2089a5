"""An append-only file of JSON lines, so that a restarted stage does not repeat finished work."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Self

from tuneyard_trainer.storage.files import disk_error

PERSIST_SECONDS = 60.0
"""The time between two copies to durable storage. The loss of a machine costs at most the work of
this time."""


class Journal:
    """The entries that earlier attempts of a stage wrote, and a file for new ones. One writer."""

    def __init__(
        self,
        folder: Path,
        identity: str,
        persist: Callable[[Path], None],
        owned: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`identity`: the stage's; a journal of another identity is discarded. An incomplete last
        line is dropped. `persist` and `owned`: as in `Worker`; no newer attempt may use the file
        while this one writes.

        Raises StageError DiskFull or WriteFailed, and StaleAttempt if there is a newer attempt.
        """
        self.entries: list[dict[str, Any]] = []
        """The entries of earlier attempts, in order."""
        self._folder, self._persist, self._owned = folder, persist, owned
        self._path = folder / "journal.jsonl"
        self._persisted = time.monotonic()
        try:
            with owned():
                folder.mkdir(parents=True, exist_ok=True)
                self._file = self._open(identity)
        except OSError as error:
            raise disk_error(error, folder) from error

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write entries; they are on disk when this returns.

        Raises StageError DiskFull, WriteFailed or StaleAttempt.
        """
        try:
            with self._owned():
                self._file.write(lines(entries))
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self._folder) from error
        if time.monotonic() - self._persisted > PERSIST_SECONDS:
            self._persist(self._folder)
            self._persisted = time.monotonic()

    def close(self) -> None:
        """Close the file and copy it to durable storage."""
        self._file.close()
        self._persist(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, identity: str) -> BinaryIO:
        valid = self._read(identity)
        file = self._path.open("r+b" if valid else "wb")
        file.truncate(valid)
        file.seek(valid)
        if not valid:
            file.write(lines([{"identity": identity}]))
            file.flush()
        return file

    def _read(self, identity: str) -> int:
        """Fill `entries` and return the number of bytes up to the first invalid line."""
        if not self._path.exists():
            return 0
        valid = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file):
                entry = _entry(line)
                if entry is None or (number == 0 and entry.get("identity") != identity):
                    break
                valid += len(line)
                if number:
                    self.entries.append(entry)
        return valid


def lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """Return entries as JSON Lines. Half of a surrogate pair, which generated text may hold,
    becomes "?"."""
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    return text.encode("utf-8", "replace")


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the line's entry; None if the line is incomplete or damaged."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
