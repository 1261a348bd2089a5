"""Stop this pod's work in order before the pod ends: `python -m tuneyard_trainer.drain`, a preStop
hook.

The pod's processes and the hook communicate through a shared folder. A process that needs an
orderly end creates a file named by its process id and checks once a second whether the file
`requested` exists. The hook creates `requested` and waits until no such process is running; in a
pod without work it returns at once.
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

import psutil

from tuneyard.api.pods import DRAIN_SECONDS

FOLDER = Path(tempfile.gettempdir(), "tuneyard-drain")
"""Not shared between pods: each pod has its own /tmp."""
REQUEST = "requested"
POLL_SECONDS = 1.0


@contextmanager
def registered(folder: Path, on_request: Callable[[], None]) -> Iterator[None]:
    """While active, the hook waits for this process. `on_request` is called once, in a separate
    thread, when the hook requests an end."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / str(os.getpid())
    marker.touch()
    finished = threading.Event()

    def poll() -> None:
        while not finished.wait(POLL_SECONDS):
            if (folder / REQUEST).exists():
                on_request()
                return

    threading.Thread(target=poll, daemon=True, name="drain").start()
    try:
        yield
    finally:
        finished.set()
        marker.unlink(missing_ok=True)


def drain(folder: Path, seconds: float) -> bool:
    """Request an end of all registered processes and wait for it. Return whether all of them ended
    within `seconds`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST).touch()
    deadline = time.monotonic() + seconds
    while _any_running(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _any_running(folder: Path) -> bool:
    return any(
        marker.name.isdigit() and _is_running(int(marker.name)) for marker in folder.iterdir()
    )


def _is_running(pid: int) -> bool:
    try:
        # `ray start` is the first process of a pod and does not wait for the processes that it
        # inherits, so each of them stays as a zombie when Ray ends a job.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(0 if drain(FOLDER, DRAIN_SECONDS) else 1)
