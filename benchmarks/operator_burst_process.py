"""Start, measure and stop an operator's process, for operator_burst.py."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from operator_burst_api import ROOT
from rig.ports import Reservation
from rig.rig import Rig

POLL_SECONDS = 0.2
IDLE_SECONDS = 3.0
"""An operator is idle if it uses less than IDLE_FRACTION of one core for this long."""
IDLE_FRACTION = 0.05
"""A fraction of one core."""


class Operator:
    """A running operator: one process and its children."""

    def __init__(self, name: str, command: Sequence[str], rig: Rig, log: Path) -> None:
        self.name, self._log = name, log
        self.started = time.monotonic()
        # The image contains the bytecode of all modules; without it, each start takes 2 s more.
        env = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                env={**env, "KUBECONFIG": str(rig.kubeconfig)},
                stdout=file,
                stderr=file,
            )
        self._parent = psutil.Process(self._process.pid)

    def check(self) -> None:
        """Exit with the end of the log if the process has ended."""
        if self._process.poll() is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(
                f"{self.name} ended with exit code {self._process.returncode}:\n{tail}"
            )

    def memory(self) -> int:
        """Return the resident memory in bytes."""
        return sum(process.memory_info().rss for process in self._processes())

    def peak_memory(self) -> int:
        """Return the peak of the resident memory in bytes, as the kernel counts it (VmHWM)."""
        kilobytes = 0
        for process in self._processes():
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes += int(re.findall(r"^VmHWM:\s+(\d+)", status, re.M)[0])
        return kilobytes << 10

    def processor_seconds(self) -> float:
        """Return user and system time since the start."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(each.user + each.system for each in times)

    async def wait_until_idle(self, timeout_seconds: float = 600) -> float:
        """Wait until the operator is idle; return the monotonic time at which that began."""
        deadline = time.monotonic() + timeout_seconds
        since, spent = time.monotonic(), self.processor_seconds()
        while time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
            self.check()
            now, spent_now = time.monotonic(), self.processor_seconds()
            if spent_now - spent > IDLE_FRACTION * IDLE_SECONDS:
                since, spent = now, spent_now
            elif now - since > IDLE_SECONDS:
                return since
        raise SystemExit(f"{self.name} was still busy after {timeout_seconds:.0f} s")

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after 20 seconds."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _processes(self) -> list[psutil.Process]:
        return [self._parent, *self._parent.children(recursive=True)]


@dataclass(frozen=True)
class Candidate:
    """An operator to measure."""

    name: str
    template: str
    """The command line, with the placeholders {python}, {benchmarks}, {port1} and {port2}."""

    @contextmanager
    def running(self, rig: Rig, logs: Path) -> Iterator[Operator]:
        """Run the operator on the rig until the context ends; its log is appended to in `logs`."""
        with Reservation() as ports:
            command = self.template.format(
                python=sys.executable,
                benchmarks=ROOT / "benchmarks",
                port1=ports.take(),
                port2=ports.take(),
            )
            operator = Operator(self.name, shlex.split(command), rig, logs / f"{self.name}.log")
            try:
                yield operator
            finally:
                operator.stop()
