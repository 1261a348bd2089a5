"""A pod's log: one event a line, `time=... event=... key=value`, for people and log collectors."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from tuneyard_trainer.pod.progress import rfc3339


class Log:
    """Writes events. Any thread may call it, but no signal handler."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def __call__(self, event: str, /, **fields: object) -> None:
        """Write an event. Fields that are None or "" are left out."""
        pairs = {"time": rfc3339(time.time()), "event": event, **fields}
        text = " ".join(
            f"{key}={_formatted(value)}" for key, value in pairs.items() if value not in (None, "")
        )
        with self._lock:
            # A message may quote half of a character from a file, which the stream would refuse.
            self._stream.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
            self._stream.flush()


class _Copied(io.TextIOBase):
    """A text stream whose text is also written to a file."""

    def __init__(self, stream: TextIO, copy: TextIO) -> None:
        self._streams = (stream, copy)

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()


@contextmanager
def copied_output(path: Path) -> Iterator[None]:
    """While active, what this process writes to standard output and standard error is also in the
    file. In a pod they are pipes, from which no log can be kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as copy:
        out, err = _Copied(sys.stdout, copy), _Copied(sys.stderr, copy)
        with redirect_stdout(out), redirect_stderr(err):
            yield


def _formatted(value: object) -> str:
    """Return a value as text, quoted as JSON if it holds spaces, quotes or control characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(str(part) for part in value)
    text = str(value)
    plain = text.isprintable() and not set(text) & set(' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)
