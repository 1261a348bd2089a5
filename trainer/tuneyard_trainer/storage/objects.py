"""Files of an object store: writes that replace only what was read, and copies of local files.

S3 evaluates the condition of each write itself (`If-Match`, or `If-None-Match` for a new object),
except that a file from 100 MiB up which replaces another is uploaded in parts, unconditionally.
For other stores, fsspec has no public interface for such conditions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tuneyard.errors import StageError
from tuneyard_trainer.storage.digests import sha256_of

_MD5 = re.compile(r'"[0-9a-fA-F]{32}(-[0-9]+)?"')
TRIES = 5
"""Writes of one object if other writers keep changing it."""
_NOT_IMPLEMENTED = 501
_CONFLICTS = (409, 412)  # another conditional write is going on; the object has another version


class Objects:
    """The objects of a store, and which of them equal local files."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._conditional = "s3" in protocols(fs)
        self._copies: dict[str, tuple[str, str]] = {}
        """By object: its version and the digest of the local file, when both were equal."""

    def replace(self, path: str, content: Callable[[], bytes | Path]) -> None:
        """Write what `content` returns: bytes, or a local file.

        `content` is called after the object's version is read. It checks whether the write is
        allowed; if the object changes after that, the store refuses the write, and `content` is
        called again.
        """
        for tries_left in reversed(range(TRIES)):
            condition = self._condition(path)
            value = content()
            try:
                if isinstance(value, bytes):
                    self._fs.pipe_file(path, value, **condition)
                else:
                    self._fs.put_file(str(value), path, **condition)
                return
            except OSError as error:
                if condition and _status(error) == _NOT_IMPLEMENTED:
                    raise _unconditional(path) from error
                if not (tries_left and condition and _is_conflict(error)):
                    raise

    def upload(self, file: Path, path: str, allow: Callable[[], None]) -> None:
        """Copy a file into the store unless the object has the same content.

        `allow` raises if the object may not be written.
        """
        content = sha256_of(file)
        if self._is_copy(path, content):
            return

        def allowed() -> Path:
            allow()
            return file

        self.replace(path, allowed)
        self._remember(path, self._version(path), content)

    def download(self, path: str, file: Path) -> None:
        """Copy an object to a local file unless the file has the same content."""
        if file.exists() and self._is_copy(path, sha256_of(file)):
            return
        version = self._version(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(path, str(file))
        self._remember(path, version, sha256_of(file))

    def _is_copy(self, path: str, content: str) -> bool:
        known = self._copies.get(path)
        return known is not None and known == (self._version(path), content)

    def _remember(self, path: str, version: str | None, content: str) -> None:
        if version is not None:
            self._copies[path] = (version, content)

    def _condition(self, path: str) -> dict[str, str]:
        if not self._conditional:
            return {}
        version = self._version(path)
        return {"mode": "create"} if version is None else {"IfMatch": version}

    def _version(self, path: str) -> str | None:
        """Return the object's version; None: there is no object, or the store has no versions."""
        try:
            return version_of(self._fs.info(path))
        except FileNotFoundError:
            return None


def version_of(info: Mapping[str, Any]) -> str | None:
    """Return a value that changes when the remote file changes; None if the store reports none."""
    for field in ("ETag", "etag", "blob_id", "generation", "Content-MD5", "md5Hash", "Digest"):
        if info.get(field):
            return f"{info[field]}"
    for field in ("mtime", "LastModified", "Last-Modified", "last_modified", "created"):
        if info.get(field):
            return f"{info[field]} {info.get('size')}"
    return None


def content_version_of(fs: Any, info: Mapping[str, Any]) -> str | None:
    """Return the store's hash of a remote file's content, with its size. None: the store reports no
    such hash; a web server's ETag may be a time.

    S3's ETag is the MD5 of the content, or of the MD5s of its parts: equal ones mean equal content.
    An encrypted object may have a random ETag instead, which equals no other.
    """
    etag = f"{info.get('ETag')}" if "s3" in protocols(fs) else ""
    found = info.get("blob_id") or info.get("md5Hash") or (_MD5.fullmatch(etag) and etag)
    return f"{found} {info['size']}" if found else None


def protocols(fs: Any) -> tuple[str, ...]:
    """Return the URL schemes of a file system."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _is_conflict(error: OSError) -> bool:
    """Return whether S3 refused a write because the object has changed, or is gone (404)."""
    missing = isinstance(error, FileExistsError | FileNotFoundError)
    return missing or _status(error) in _CONFLICTS


def _status(error: OSError) -> int | None:
    """Return the HTTP status of S3's answer; None if there is none."""
    response = getattr(error.__cause__, "response", None) or {}
    status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _unconditional(path: str) -> StageError:
    return StageError(
        "WriteFailed",
        f"the store does not support conditional writes (If-Match, If-None-Match) of {path}, "
        "without which a superseded attempt could replace the files of a newer one.",
        advice="Set output.uri to a store that supports them, or upgrade the store.",
    )
