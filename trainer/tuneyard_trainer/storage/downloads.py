"""Folders of the cache that appear whole or not at all, also if several nodes share the cache.

A folder is filled under a hidden name that no other process uses, and renamed once it is complete.
Nothing here relies on locks: some network file systems have none, and others have locks that other
nodes do not see. The lock of the cache (`storage.files`) only saves the second download.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ABANDONED_SECONDS = 3600.0
"""A partial folder in which nothing has changed for this long is taken for that of a killed
process. The longest pause of a live one hashes the files that it has downloaded."""
_PARTIAL = ".partial-"
_LEFTOVERS = (f"{_PARTIAL}*", "*/.partial")
"""The partial folders of killed processes; the second pattern is that of 0.2."""


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Yield a new hidden folder in `parent`, and remove it at the end unless `keep` renamed it.
    Remove the partial folders of killed processes first: they take space."""
    parent.mkdir(parents=True, exist_ok=True)
    partial = _new(parent)
    partial.mkdir()
    try:
        # The clock of the file system's server, which stamps the files of all nodes.
        _remove_abandoned(parent, partial.stat().st_mtime)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep(partial: Path, final: Path) -> None:
    """Rename a complete folder. If another process was faster, its folder, of the same content,
    stays."""
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _new(parent: Path) -> Path:
    return parent / f"{_PARTIAL}{secrets.token_hex(8)}"


def _remove_abandoned(parent: Path, now: float) -> None:
    for folder in [found for pattern in _LEFTOVERS for found in parent.glob(pattern)]:
        with suppress(OSError):  # another process removes it
            if _changed_at(folder) < now - ABANDONED_SECONDS:
                # Renamed first: were its process alive, it would fail, and never keep a part.
                doomed = folder.rename(_new(parent))
                shutil.rmtree(doomed)


def _changed_at(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
