"""The files of a path and the digest of their content, which does not depend on the path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from tuneyard.api.plan import digest
from tuneyard.errors import StageError
from tuneyard_trainer.storage.files import write_atomically

WILDCARDS = frozenset("*?[")
_CACHED_BYTES = 16 << 20  # hashing less than 16 MiB takes about 10 ms, which needs no cache


def files_under(path: Path) -> list[tuple[str, Path]]:
    """Return the files of a file, a folder (recursively) or a glob, sorted by name.

    Names are relative to the path; for a glob, to the part before its first wildcard. Hidden files
    and folders are left out.
    """
    if path.is_file():
        return [(path.name, path)]
    base, pattern = (path, "**/*") if path.is_dir() else split_glob(path)
    if not pattern:
        return []
    found = ((file.relative_to(base), file) for file in base.glob(pattern) if file.is_file())
    return sorted((name.as_posix(), file) for name, file in found if not hidden(name))


def digest_of(
    paths: Path | Sequence[Path],
    *,
    cache_dir: Path | None = None,
    counts: Callable[[PurePosixPath], bool] = lambda _: True,
) -> str:
    """Return `sha256:` and a hash of content. Copies have equal digests; file times do not count.

    The digest of a file covers its content and its last suffix (the suffix decides how the file is
    read); that of a folder or glob covers its files' relative names and contents. `counts`: whether
    a file of a folder enters the digest, by its relative name. With `cache_dir`, hashes of files
    from 16 MiB up are cached there by path, size, mtime and inode. Raises StageError
    SourceNotFound.
    """
    hashes = _Hashes(cache_dir)
    if isinstance(paths, Path):
        result = _digest(paths, hashes, counts)
    else:
        result = digest([_digest(path, hashes, counts) for path in paths])
    hashes.save()
    return result


def _digest(path: Path, hashes: _Hashes, counts: Callable[[PurePosixPath], bool]) -> str:
    if path.is_file():
        return digest([[path.suffix, hashes.of(path)]])
    files = files_under(path)
    if path.is_dir():
        files = [(name, file) for name, file in files if counts(PurePosixPath(name))]
    elif not files:
        raise StageError("SourceNotFound", f"{path} does not exist or matches no file.")
    return digest([[name, hashes.of(file)] for name, file in files])


class _Hashes:
    """SHA-256 of files. Hashes of large files are cached in `<cache_dir>/hashes.json`."""

    def __init__(self, cache_dir: Path | None) -> None:
        self.file = cache_dir / "hashes.json" if cache_dir else None
        self.known: dict[str, str] = {}
        self.changed = False
        with suppress(OSError, ValueError):  # no cache yet, or a damaged one
            known = json.loads(self.file.read_text()) if self.file else {}
            self.known = {key: str(value) for key, value in dict(known or {}).items()}

    def of(self, path: Path) -> str:
        status = path.stat()
        if status.st_size < _CACHED_BYTES:
            return sha256_of(path)
        key = str(path.absolute())
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ino} "
        if not self.known.get(key, "").startswith(stamp):
            self.known[key] = stamp + sha256_of(path)
            self.changed = True
        return self.known[key].removeprefix(stamp)

    def save(self) -> None:
        if self.file and self.changed:
            with suppress(StageError, OSError):  # the next run hashes the files again
                write_atomically(self.file, json.dumps(self.known).encode())


def sha256_of(path: Path) -> str:
    """Return the hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_documentation(name: PurePosixPath) -> bool:
    """Return whether a file of a folder describes the folder: its README, LICENSE or NOTICE."""
    is_named_so = name.name.lower().startswith(("readme", "license", "licence", "notice"))
    return is_named_so and name.suffix.lower() in ("", ".md", ".txt")


def hidden(name: PurePosixPath | Path) -> bool:
    """Return whether a relative path names a hidden file or lies in a hidden folder."""
    return any(part.startswith(".") for part in name.parts)


def split_glob(path: Path) -> tuple[Path, str]:
    """Return a glob's folder without wildcards, and its pattern ("" if it has no wildcard)."""
    for index, part in enumerate(path.parts):
        if WILDCARDS & set(part):
            return Path(*path.parts[:index]), str(Path(*path.parts[index:]))
    return path, ""
