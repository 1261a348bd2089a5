"""Start servers and wait until they are ready, from the process that is their parent."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from rig import linux
from rig.errors import RigError
from rig.state import State

POLL_SECONDS = 0.1
RESTART_SECONDS = 1.0
"""The wait before a server that ended is started again."""


def run(*command: str | Path) -> str:
    """Run a command and return its output; raise RigError with the output if the command fails."""
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        command_line = " ".join(str(part) for part in command)
        raise RigError(
            f"{command_line} failed with exit code {done.returncode}: {done.stdout.strip()}"
        )
    return done.stdout


def report(message: str) -> None:
    """Print a line to the supervisor's log, with the seconds since the machine started."""
    print(f"[{time.monotonic():.2f}] {message}", flush=True)


@dataclass(frozen=True)
class Server:
    """A server and how to start it again."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    process: subprocess.Popen[bytes]


class Servers:
    """The servers of a rig. The kernel ends each of them with this process."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._started: dict[int, Server] = {}

    def start(self, name: str, *command: str | Path, env: Mapping[str, str] | None = None) -> None:
        """Start a server that logs to `NAME.log`; `env` adds to the environment."""
        self._start(name, [str(part) for part in command], {**os.environ, **(env or {})})

    def _start(self, name: str, command: list[str], env: Mapping[str, str]) -> None:
        with (self._state.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._state.root,
                env=env,
                preexec_fn=linux.end_with_parent,
            )
        self._started[process.pid] = Server(name, command, env, process)

    def wait_for(self, condition: str, probe: Callable[[], object], timeout_seconds: float) -> None:
        """Poll until the probe returns a true value.

        RigError: the timeout has passed, or a server ended.
        `probe`: it may raise OSError, ValueError or RigError while its server starts.
        `condition`: what the probe checks, as a sentence for logs and errors.
        """
        deadline = time.monotonic() + timeout_seconds
        last_error: Exception | None = None
        while time.monotonic() < deadline:
            self._raise_if_server_ended(condition)
            try:
                if probe():
                    report(condition)
                    return
            except (OSError, ValueError, RigError) as error:
                last_error = error
            time.sleep(POLL_SECONDS)
        raise RigError(
            f"not true after {timeout_seconds:.0f} s: {condition} (last error: {last_error})"
        )

    def reap_forever(self) -> Never:
        """Reap ended children and start a server that ended again, as systemd does.

        As pid 1, this process also inherits the orphans of every pod.
        """
        while True:
            try:
                pid, status = os.wait()
            except ChildProcessError:
                time.sleep(RESTART_SECONDS)
                continue
            if server := self._started.pop(pid, None):
                code = os.waitstatus_to_exitcode(status)
                report(f"{server.name} ended with exit code {code} and is started again")
                time.sleep(RESTART_SECONDS)
                self._start(server.name, server.command, server.env)

    def _raise_if_server_ended(self, condition: str) -> None:
        for server in self._started.values():
            if server.process.poll() is not None:
                raise RigError(f"{server.name} ended while waiting for: {condition}")
