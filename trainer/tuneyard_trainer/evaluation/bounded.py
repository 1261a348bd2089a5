"""Processes of their own for texts that nobody vouches for: answers of models, templates of files.

Such a text can be an expression that no computer evaluates, or a loop without an end. Each process
answers requests one after another, within a time for each and a limit of memory, and without the
environment's credentials. `bounded_child` is its side.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tuneyard.errors import StageError

GRACE_SECONDS = 5.0
"""The time that a process has to end by itself after a request took too long, before it is
killed."""
START_SECONDS = 120.0
"""The longest start of a process. sympy is imported in a second on an idle machine."""

_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
"""The environment of a process, which needs no credentials."""


class BoundedProcess:
    """Runs a module that calls `bounded_child.serve`. Use it as a context.

    The process is started for the first request, and again after one that ended it.
    """

    def __init__(self, module: str, task: str) -> None:
        """`task`: what the process does, for messages."""
        self._module = module
        self._task = task
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def pid(self) -> int | None:
        """The id of the process. None: none runs."""
        return None if self._process is None else self._process.pid

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the process's reply to a request. None: it did not end in time, or it ended the
        process, such as by its memory. Raises StageError WorkerDied if no process starts."""
        if self._process is not None and self._process.poll() is not None:
            self._end()  # it was killed between two requests, which says nothing about this one
        process = self._process or self._started()
        self._process = process
        text = json.dumps({**request, "seconds": seconds}).encode() + b"\n"
        line = _exchanged(process, text, seconds + GRACE_SECONDS)
        if line is None:
            self._end()
            return None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        paths = os.pathsep.join(filter(None, sys.path))
        process = subprocess.Popen(  # noqa: S603  our own module
            [sys.executable, "-P", "-m", self._module],
            env=kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if _line(process, START_SECONDS) is None:
            _kill(process)
            raise StageError(
                "WorkerDied",
                f"the process that {self._task} did not start (exit code {process.returncode}).",
                advice="Run the job again; it goes on from this stage.",
                retryable=True,
            )
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill(process)


def _exchanged(process: subprocess.Popen[bytes], text: bytes, seconds: float) -> bytes | None:
    """Return the reply to a request. None: the process ended, or did not reply in time."""
    if process.stdin is None:
        return None
    try:
        process.stdin.write(text)
        process.stdin.flush()
    except BrokenPipeError:
        return None
    return _line(process, seconds)


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """Return the next line of a process. None: it wrote none in this time, or ended."""
    if process.stdout is None:
        return None
    file, found, end = process.stdout.fileno(), b"", time.monotonic() + seconds
    ready = select.poll()  # `select` takes no file descriptor from 1024
    ready.register(file, select.POLLIN)
    while not found.endswith(b"\n"):
        left = end - time.monotonic()
        part = os.read(file, 1 << 16) if left > 0 and ready.poll(left * 1000) else b""
        if not part:
            return None
        found += part
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
