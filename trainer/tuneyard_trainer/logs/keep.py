"""Start the helper process that keeps this process's log, and wait for it at the end."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FINISH_SECONDS = 20.0
"""How long the end of a process waits for its log to be written. The helper goes on after that."""


@dataclass(frozen=True)
class LogPlace:
    """The output that logs are kept in, and the attempt that owns it."""

    output: str
    """A path or an fsspec URL."""
    attempt: int
    job_uid: str | None = None
    """The uid of the job; None on one machine."""
    drain: str = ""
    """The folder in which a pod's preStop hook asks its processes to end; "": there is no hook."""


def own_files() -> list[Path]:
    """Return the files that this process's standard output and standard error go to, as in Ray's
    processes; none for a terminal or a pipe."""
    regular = [number for number in (1, 2) if stat.S_ISREG(os.fstat(number).st_mode)]
    return list(dict.fromkeys(Path(f"/proc/self/fd/{number}").readlink() for number in regular))


@contextmanager
def kept(
    place: LogPlace, name: str, files: Sequence[Path], warn: Callable[[str], None]
) -> Iterator[None]:
    """While active, and at the end, the content of these files is kept as the log of this name.

    `warn` is called, in another thread, with the reason if that fails; no error is raised.
    """
    if not files:
        warn("the log cannot be kept: standard output and standard error are not files")
        yield
        return
    # -P: no module of the working directory, which a user may have downloaded, is imported.
    command = [sys.executable, "-P", "-m", "tuneyard_trainer.logs.keeper"]
    command += ["--output", place.output]
    command += ["--attempt", str(place.attempt), "--name", name, "--parent", str(os.getpid())]
    if place.job_uid is not None:
        command += ["--job-uid", place.job_uid]
    if place.drain:
        command += ["--drain", place.drain]
    try:
        process = subprocess.Popen(  # noqa: S603  our own module
            [*command, "--", *map(str, files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends this process, and the helper after it
        )
    except OSError as error:
        warn(f"the log cannot be kept: {error}")
        yield
        return
    reader = threading.Thread(target=_relay, args=(process, warn), daemon=True, name="log")
    reader.start()
    try:
        yield
    finally:
        _finish(process)


def _relay(process: subprocess.Popen[str], warn: Callable[[str], None]) -> None:
    for line in process.stdout or ():
        warn(line.rstrip())


def _finish(process: subprocess.Popen[str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(FINISH_SECONDS)
    except subprocess.TimeoutExpired:
        return  # it ends by itself
