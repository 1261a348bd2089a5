"""The process under test of operator_burst.py: started, measured, stopped."""

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
QUIET_SECONDS = 3.0
"""An operator is quiet after so long..."""
QUIET_SHARE = 0.05
"""...with less than this share of one core."""


class Operator:
    """One process of the operator, with its children."""

    def __init__(self, name: str, command: Sequence[str], rig: Rig, log: Path) -> None:
        self._name, self._log = name, log
        self.started = time.monotonic()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "KUBECONFIG": str(rig.kubeconfig)},
                stdout=file,
                stderr=file,
            )
        self._family = psutil.Process(self._process.pid)

    def check(self) -> None:
        if self._process.poll() is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(f"{self._name} ended with {self._process.returncode}:\n{tail}")

    def memory(self) -> int:
        """Bytes of resident memory."""
        return sum(process.memory_info().rss for process in self._processes())

    def peak_memory(self) -> int:
        """Bytes of resident memory at its highest, as the kernel counted it."""
        kilobytes = 0
        for process in self._processes():
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes += int(re.findall(r"^VmHWM:\s+(\d+)", status, re.M)[0])
        return kilobytes << 10

    def processor_seconds(self) -> float:
        times = [process.cpu_times() for process in self._processes()]
        return sum(each.user + each.system for each in times)

    async def quiet(self, timeout_seconds: float = 600) -> float:
        """Wait until it has nothing left to do; the monotonic time at which it came to rest."""
        deadline = time.monotonic() + timeout_seconds
        since, spent = time.monotonic(), self.processor_seconds()
        while time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
            self.check()
            now, spent_now = time.monotonic(), self.processor_seconds()
            if spent_now - spent > QUIET_SHARE * QUIET_SECONDS:
                since, spent = now, spent_now
            elif now - since > QUIET_SECONDS:
                return since
        raise SystemExit(f"{self._name} was still busy after {timeout_seconds:.0f} s")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _processes(self) -> list[psutil.Process]:
        return [self._family, *self._family.children(recursive=True)]


@dataclass(frozen=True)
class Contender:
    """An operator to measure."""

    name: str
    template: str
    """Its command line; {python}, {benchmarks}, {port1} and {port2} are filled in."""

    @contextmanager
    def running(self, rig: Rig, logs: Path) -> Iterator[Operator]:
        with Reservation() as ports:
            filled = self.template.format(
                python=sys.executable,
                benchmarks=ROOT / "benchmarks",
                port1=ports.take(),
                port2=ports.take(),
            )
            operator = Operator(self.name, shlex.split(filled), rig, logs / f"{self.name}.log")
            try:
                yield operator
            finally:
                operator.stop()
