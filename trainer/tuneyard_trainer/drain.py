"""Ends this pod's part of a job in good order: `python -m tuneyard_trainer.drain`, a preStop hook.

A folder that the pod's processes share is all there is to it: whoever must not be cut off leaves
its process id there, and looks once a second whether `asked` has appeared. The hook writes `asked`
and waits until nobody is left, which in a pod without work is at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tuneyard.api.pods import DRAIN_SECONDS

FOLDER = Path(tempfile.gettempdir(), "tuneyard-drain")
"""A pod's /tmp is its own."""
LOOK_SECONDS = 1.0


@contextmanager
def present(folder: Path, on_asked: Callable[[], None]) -> Iterator[None]:
    """The hook waits for this process while the context lasts. `on_asked` is called once, in a
    thread of its own, when the hook asks it to come to an end."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / str(os.getpid())
    mark.touch()
    left = threading.Event()

    def look() -> None:
        while not left.wait(LOOK_SECONDS):
            if (folder / "asked").exists():
                on_asked()
                return

    threading.Thread(target=look, daemon=True, name="drain").start()
    try:
        yield
    finally:
        left.set()
        mark.unlink(missing_ok=True)


def drain(folder: Path, seconds: float) -> bool:
    """Asks everybody present to end; whether they did within so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "asked").touch()
    deadline = time.monotonic() + seconds
    while _anybody(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _anybody(folder: Path) -> bool:
    return any(mark.name.isdigit() and _alive(int(mark.name)) for mark in folder.iterdir())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    sys.exit(0 if drain(FOLDER, DRAIN_SECONDS) else 1)
