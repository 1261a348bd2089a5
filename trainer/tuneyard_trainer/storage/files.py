"""What a failed write means. Needs no torch: records are read before it is imported."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from safetensors import SafetensorError

from tuneyard.errors import StageError


def disk_error(error: OSError | SafetensorError, folder: Path) -> StageError:
    """The StageError for a failed write."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
        return StageError(
            "DiskFull",
            f"no space left while writing to {folder}.",
            advice="Free space there, or point output.uri elsewhere; then run the same manifest "
            "again: it goes on from the last complete checkpoint.",
        )
    forbidden = code in (errno.EACCES, errno.EPERM, errno.EROFS)
    return StageError(
        "WriteFailed",
        f"cannot write to {folder}: {error}.",
        advice="Make it writable for the user that the job runs as, or point output.uri elsewhere."
        if forbidden
        else "",
        retryable=not forbidden,
    )


def write_atomically(path: Path, data: bytes) -> None:
    """The file holds all of `data` or what it held before, also after a power cut.

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
