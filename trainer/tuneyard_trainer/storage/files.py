"""Listing of files, atomic writes, the locks of the cache, and the StageErrors for a failed
write."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tuneyard.errors import StageError

LOCK_POLL_SECONDS = 0.2
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""The errors of a file system without locks."""


def all_files(path: Path) -> list[Path]:
    """Return a file itself, or all files in a folder."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def disk_error(error: OSError | SafetensorError, folder: Path) -> StageError:
    """Return the StageError for a failed write: DiskFull or WriteFailed."""
    if is_disk_full(error):
        return StageError(
            "DiskFull",
            f"no space left while writing to {folder}.",
            advice="Free space there, or set output.uri to another location; then run the same "
            "manifest again. It resumes from the last complete checkpoint.",
        )
    forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    return StageError(
        "WriteFailed",
        f"cannot write to {folder}: {error}.",
        advice="Give the user that the job runs as write access, or set output.uri to another "
        "location."
        if forbidden
        else "",
        retryable=not forbidden,
    )


def is_disk_full(error: OSError | SafetensorError) -> bool:
    """Return whether a write failed since the disk or the user's share of it is full."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or f"os error {errno.ENOSPC}" in str(error)  # of safetensors, without an errno


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file's content by `data`, entirely or not at all, even after a power failure.

    Raises StageError DiskFull or WriteFailed.
    """
    # Pods that share a volume may have equal process ids.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, path) from error


@contextmanager
def cache_lock(path: Path, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a place in the cache, the hidden file `.NAME.lock` beside it, against other
    processes, also on other nodes. The kernel releases a killed process's lock.

    The lock saves work and is no guarantee: a file system may have no locks, or locks that other
    nodes do not see. Files of the place must appear whole without it too (`storage.downloads`).
    `wait`: called again and again while another process holds the lock; it may raise. Raises
    StageError CacheUnusable if the folder cannot be written to.
    """
    file = path.with_name(f".{path.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(file.parent, error) from error
    try:
        while not _try_lock(lock, file):
            wait()
            time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(lock)


def _try_lock(lock: int, file: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise _unusable(file.parent, error) from error
    return True


def _unusable(folder: Path, error: OSError) -> StageError:
    return StageError(
        "CacheUnusable",
        f"the cache {folder} cannot be used: {error}.",
        advice="Give the user that the job runs as write access to the folder, or name another "
        "cache: on a cluster in compute.cacheClaim, on one machine in TUNEYARD_CACHE.",
    )
