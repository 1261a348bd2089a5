"""End Ray's processes soon after a driver that was killed.

Ray's agents try to report the end of their raylet for a minute before they end. The watchdog is a
process of its own, so that SIGKILL leaves it running: it waits for the end of its standard input,
which the driver holds open, and ends what is left after GRACE_SECONDS.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import psutil

GRACE_SECONDS = 5.0
"""How long Ray's processes have to end on their own."""


def descendants() -> list[psutil.Process]:
    """Return the present descendants of this process."""
    return psutil.Process().children(recursive=True)


@contextmanager
def guarded(*, spare: Collection[psutil.Process]) -> Iterator[None]:
    """While active, the present descendants of this process end soon after it, except `spare`,
    which end by themselves, such as the helper that writes the rest of a log.

    The end of the context counts as the end of this process."""
    found = [process for process in descendants() if process not in spare]
    watchdog = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C on the terminal must not reach it
    )
    if watchdog.stdin is None:
        raise RuntimeError("the watchdog has no standard input")
    with watchdog.stdin as pipe:
        # Process ids are reused, so the time of creation belongs to them.
        pipe.write(json.dumps([(child.pid, child.create_time()) for child in found]).encode())
        pipe.flush()
        yield


def main() -> None:
    """Wait for the end of standard input; then end the processes that it listed."""
    alive = []
    for pid, created in json.load(sys.stdin):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created:
                alive.append(process)
    _, alive = psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
