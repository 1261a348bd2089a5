"""Atomic writes, and the StageError for a failed write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from safetensors import SafetensorError

from tuneyard.errors import StageError


def disk_error(error: OSError | SafetensorError, folder: Path) -> StageError:
    """Return the StageError for a failed write: DiskFull or WriteFailed."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
        return StageError(
            "DiskFull",
            f"no space left while writing to {folder}.",
            advice="Free space there, or set output.uri to another location; then run the same "
            "manifest again. It resumes from the last complete checkpoint.",
        )
    forbidden = code in (errno.EACCES, errno.EPERM, errno.EROFS)
    return StageError(
        "WriteFailed",
        f"cannot write to {folder}: {error}.",
        advice="Give the user that the job runs as write access, or set output.uri to another "
        "location."
        if forbidden
        else "",
        retryable=not forbidden,
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file's content by `data`, entirely or not at all, even after a power failure.

    Raises StageError DiskFull or WriteFailed.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
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
