"""A pod's log: one event a line, `time=... event=... key=value`, for people and for collectors."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from tuneyard_trainer.pod.progress import rfc3339


class Log:
    """Writes events; may be called from any thread, but from no signal handler."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def __call__(self, event: str, /, **fields: object) -> None:
        """Fields that are None or "" are left out."""
        pairs = {"time": rfc3339(time.time()), "event": event, **fields}
        text = " ".join(
            f"{key}={_shown(value)}" for key, value in pairs.items() if value not in (None, "")
        )
        with self._lock:
            self._stream.write(text + "\n")
            self._stream.flush()


def _shown(value: object) -> str:
    """Quoted as JSON where it is more than a word, so that a line stays a line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ",".join(str(part) for part in value)
    text = str(value)
    plain = text.isprintable() and not set(text) & set(' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)
