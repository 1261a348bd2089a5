"""Start servers and wait for them, from the one process that owns them all."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Never

from rig import linux
from rig.errors import RigError
from rig.state import State

POLL_SECONDS = 0.1


def run(*command: str | Path) -> str:
    """Run a command to its end and return what it printed; raise with that text if it failed."""
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        words = " ".join(str(part) for part in command)
        raise RigError(f"{words} failed with {done.returncode}: {done.stdout.strip()}")
    return done.stdout


def report(message: str) -> None:
    """One line in the supervisor's log, with the seconds since the machine started."""
    print(f"[{time.monotonic():.2f}] {message}", flush=True)


class Servers:
    """The servers of a rig. Each dies with this process; the death of one fails whoever waits."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._started: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}

    def start(self, name: str, *command: str | Path, env: Mapping[str, str] | None = None) -> None:
        with (self._state.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._state.root,
                env={**os.environ, **(env or {})},
                preexec_fn=linux.die_with_parent,
            )
        self._started[process.pid] = (name, process)

    def wait_for(self, what: str, probe: Callable[[], object], timeout_seconds: float) -> None:
        """Poll until the probe returns something true. It may raise: servers refuse at first."""
        deadline = time.monotonic() + timeout_seconds
        problem: Exception | None = None
        while time.monotonic() < deadline:
            self._fail_on_dead_server(what)
            try:
                if probe():
                    report(what)
                    return
            except (OSError, ValueError, RigError) as error:
                problem = error
            time.sleep(POLL_SECONDS)
        raise RigError(f"not in {timeout_seconds:.0f} s: {what} (last problem: {problem})")

    def reap_forever(self) -> Never:
        """Collect ended children. As pid 1 this process also inherits the orphans of every pod."""
        while True:
            try:
                self._note_end(*os.wait())
            except ChildProcessError:
                time.sleep(1)

    def _fail_on_dead_server(self, what: str) -> None:
        for name, process in self._started.values():
            if process.poll() is not None:
                raise RigError(f"{name} ended while waiting for: {what}")

    def _note_end(self, pid: int, status: int) -> None:
        if pid in self._started:
            report(f"{self._started[pid][0]} ended with {os.waitstatus_to_exitcode(status)}")
