"""`tuneyard operator` as a separate process, for tests that start, kill and restart it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families
from rig.ports import Reservation

COMMAND = ("-c", "from tuneyard.cli.main import main; main()")
"""Python's arguments that start the command line."""


def wait_until(condition: Callable[[], object], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.1)


class Operator:
    """One replica: a context manager that starts it and ends it.

    `options` are the command's, with `_` for `-`: `Operator(kubeconfig, tmp_path, lease="mine")`.
    A flag has the value "". `command`: Python's arguments that start the command line.
    """

    def __init__(
        self, kubeconfig: Path, folder: Path, command: Sequence[str] = COMMAND, **options: str
    ) -> None:
        self._ports = Reservation()
        self.metrics_port = self._ports.take()
        options = {"identity": "one", "metrics_port": str(self.metrics_port), **options}
        self._arguments = [
            argument
            for name, value in options.items()
            for argument in (f"--{name.replace('_', '-')}", value)
            if argument
        ]
        self._kubeconfig, self._command = kubeconfig, command
        self._log = folder / f"operator-{options['identity']}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._ports.__exit__()

    @property
    def log(self) -> str:
        """The log of all its runs."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process."""
        environment = {**os.environ, "KUBECONFIG": str(self._kubeconfig)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._command, "operator", *self._arguments],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def wait_until_active(self, timeout_seconds: float = 60) -> None:
        wait_until(
            lambda: self.metric("tuneyard_leader") == 1.0 or not self.is_alive, timeout_seconds
        )
        assert self.is_alive, self.log

    def kill(self) -> None:
        """Kill the process and wait for its end; safe to repeat and to call from another thread."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_seconds: float = 30) -> int:
        """Send a signal and return the exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(timeout_seconds)

    def exposition(self) -> str:
        """Return the text of /metrics; "": no response."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=5) as answer:
                text: str = answer.read().decode()
                return text
        except OSError:
            return ""

    def metric(self, name: str, /, **labels: str) -> float | None:
        """Return the value of the first sample with these labels; None: there is none."""
        for family in text_string_to_metric_families(self.exposition()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return None
