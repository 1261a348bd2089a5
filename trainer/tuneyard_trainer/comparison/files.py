"""The files of a job's output, in a folder or in a store that fsspec reads. Nothing is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from tuneyard_trainer.reporting.formatting import harmless
from tuneyard_trainer.reporting.summary import without_secrets

ACCESS = "give this command access to the store by the environment, as the store's tools expect it"


class OutputError(Exception):
    """An output that cannot be read: the value, the reason and the remedy, in one line. Names in
    the output may be of unknown origin: control characters are replaced."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(harmless(message).split()))


@dataclass(frozen=True)
class OutputFiles:
    """The files of an output, by their paths relative to it."""

    fs: Any
    root: str
    uri: str
    """A folder, or a URL."""

    @classmethod
    def of(cls, uri: str) -> OutputFiles:
        """Return the files of an output. Raises OutputError."""
        place = uri if "://" in uri else str(Path(uri).resolve())
        try:
            fs, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
        except Exception as error:  # each kind of store has errors of its own
            raise OutputError(f"cannot be read: {_reason(error)}: {ACCESS}") from error
        return cls(fs, str(root).rstrip("/"), uri)

    @property
    def place(self) -> str:
        """The whole path of the folder, or the URL without secrets; no "/" at its end."""
        return without_secrets(self.uri).rstrip("/") if "://" in self.uri else self.root

    @property
    def identity(self) -> tuple[str, str]:
        """Equal for two names of one output."""
        return str(type(self.fs).__name__), self.root

    def names(self, pattern: str) -> list[str]:
        """Return the files of a pattern, sorted. Raises OutputError."""
        prefix = f"{self.root}/"
        try:
            found = self.fs.glob(f"{_literal(prefix)}{pattern}")
        except Exception as error:
            raise OutputError(f"cannot be read: {_reason(error)}: {ACCESS}") from error
        return sorted(str(path).removeprefix(prefix) for path in found)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file. None: it does not exist. Raises OutputError."""
        try:
            content: bytes = self.fs.cat_file(f"{self.root}/{name}")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except Exception as error:
            raise OutputError(f"{name} cannot be read: {_reason(error)}") from error
        return content

    def json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object. None: the file does not exist. Raises OutputError."""
        content = self.read(name)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise OutputError(
                f"{name} is damaged and cannot be read ({_reason(error)}): copy it again, or run "
                "the job again"
            ) from error
        if not isinstance(value, dict):
            raise OutputError(f"{name} is not a JSON object: it is no file of a job")
        return value


def _literal(path: str) -> str:
    """Return a path as a pattern that matches only the path itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
