"""What a path's files are and what they hold: a content's name, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from tuneyard.api.plan import digest
from tuneyard.errors import StageError

WILDCARDS = frozenset("*?[")
_REMEMBERED_BYTES = 16 << 20  # hashing less than 16 MiB costs about 10 ms: not worth remembering


def files_under(path: Path) -> list[tuple[str, Path]]:
    """The files of a file, a folder (recursively) or a glob, with their names relative to it (to a
    glob's fixed part), sorted by name. Hidden files and folders are left out; [] if there are none.
    """
    if path.is_file():
        return [(path.name, path)]
    base, pattern = (path, "**/*") if path.is_dir() else split_glob(path)
    if not pattern:
        return []
    found = ((file.relative_to(base), file) for file in base.glob(pattern) if file.is_file())
    return sorted((name.as_posix(), file) for name, file in found if not hidden(name))


def digest_of(paths: Path | Sequence[Path], *, cache_dir: Path | None = None) -> str:
    """`sha256:` and a hash of content: equal for copies anywhere, whatever their times.

    A file counts with its content and its last suffix (the suffix decides how it is read), a folder
    or glob with its files' relative names and contents. With `cache_dir`, hashes of files above
    16 MiB are remembered there by path, size, mtime and inode. Raises StageError SourceNotFound.
    """
    hashes = _Hashes(cache_dir)
    if isinstance(paths, Path):
        result = _digest(paths, hashes)
    else:
        result = digest([_digest(path, hashes) for path in paths])
    hashes.save()
    return result


def _digest(path: Path, hashes: _Hashes) -> str:
    if path.is_file():
        return digest([[path.suffix, hashes.of(path)]])
    files = files_under(path)
    if not files and not path.is_dir():
        raise StageError("SourceNotFound", f"{path} does not exist or matches no file.")
    return digest([[name, hashes.of(file)] for name, file in files])


class _Hashes:
    """SHA-256 of files, those of large files remembered in `<cache_dir>/hashes.json`."""

    def __init__(self, cache_dir: Path | None) -> None:
        self.file = cache_dir / "hashes.json" if cache_dir else None
        self.known: dict[str, str] = {}
        self.changed = False
        with suppress(OSError, ValueError):  # no memory yet, or a torn one: hash anew
            known = json.loads(self.file.read_text()) if self.file else {}
            self.known = {key: str(value) for key, value in dict(known or {}).items()}

    def of(self, path: Path) -> str:
        status = path.stat()
        if status.st_size < _REMEMBERED_BYTES:
            return _sha256(path)
        key = str(path.absolute())
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ino} "
        if not self.known.get(key, "").startswith(stamp):
            self.known[key] = stamp + _sha256(path)
            self.changed = True
        return self.known[key].removeprefix(stamp)

    def save(self) -> None:
        if not (self.file and self.changed):
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".hashes.{os.getpid()}.json")
        partial.write_text(json.dumps(self.known))
        partial.replace(self.file)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hidden(name: PurePosixPath | Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def split_glob(path: Path) -> tuple[Path, str]:
    """A glob's fixed folder and its pattern ("" if it has no wildcard)."""
    for index, part in enumerate(path.parts):
        if WILDCARDS & set(part):
            return Path(*path.parts[:index]), str(Path(*path.parts[index:]))
    return path, ""
