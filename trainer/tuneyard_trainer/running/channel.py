"""The line between each worker and the driver: events out, and the one word that comes back, stop.

JSON over sockets, authenticated by a key of this run; not a Ray actor, which alone would cost half
a percent of a core, and would have to be polled.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from typing import Any

POST_SECONDS = 1.0
"""Least time between two progress posts of a worker; stage events are never held back."""
HANG_UP_SECONDS = 10.0
"""How long an ended group's last words are waited for."""


class EventClient:
    """A worker's line to the driver. Sending never waits for the driver to read, short of the
    megabytes that the kernel buffers."""

    def __init__(self, address: tuple[str, int], key: bytes) -> None:
        self._connection = Client(address, authkey=key)
        self._stop = threading.Event()
        self._sending = threading.Lock()
        self._posted = 0.0
        self._held: dict[str, float] = {}
        threading.Thread(target=self._listen, daemon=True, name="line").start()

    def emit(self, event: dict[str, Any]) -> None:
        """Sends stage events at once and in order; of progress what is due, with the newest metrics
        of what was not."""
        if event["type"] == "progress":
            self._held |= event["metrics"]
            if not _urgent(event) and time.monotonic() - self._posted < POST_SECONDS:
                return
            self._posted = time.monotonic()
            event = event | {"metrics": self._held}
        self._held = {}
        with self._sending, suppress(OSError):  # without its driver this worker is to be killed
            self._connection.send_bytes(json.dumps(event).encode())

    def stopped(self) -> bool:
        """Whether the driver asked to stop."""
        return self._stop.is_set()

    def ask_to_stop(self) -> None:
        """Tells the driver that this worker's pod is about to go; the driver tells all workers.
        May be called from any thread."""
        with self._sending, suppress(OSError):
            self._connection.send_bytes(json.dumps({"type": "draining"}).encode())

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            self._connection.recv_bytes()  # the driver says nothing else
            self._stop.set()


class EventServer:
    """The driver's end of all lines."""

    def __init__(self, host: str) -> None:
        """`host`: this machine's address, as the workers reach it."""
        self.key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), authkey=self.key)
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lines: list[Any] = []
        self._readers: list[threading.Thread] = []
        self._asked = self._closed = False
        self._start(self._accept)

    @property
    def address(self) -> tuple[str, int]:
        """Where workers call."""
        host, port = self._listener.address
        return host, port

    @property
    def called(self) -> bool:
        """Whether any worker has called yet."""
        return bool(self._lines)

    def ask_to_stop(self) -> None:
        """Tells all workers, those to come included."""
        self._asked = True
        for line in self._lines:
            self._tell(line)

    def close(self) -> None:
        """Ends the lines once what is on them was read."""
        for reader in self._readers:
            reader.join(HANG_UP_SECONDS)
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                line = self._listener.accept()
            except (AuthenticationError, EOFError, OSError):
                time.sleep(0.1)  # not one of ours, or it hung up; anybody may knock
                continue
            self._lines.append(line)
            self._readers.append(self._start(self._read, line))
            if self._asked:
                self._tell(line)

    def _read(self, line: Any) -> None:
        with suppress(EOFError, OSError):
            while True:
                self.events.put(json.loads(line.recv_bytes()))

    def _tell(self, line: Any) -> None:
        with suppress(OSError):
            line.send_bytes(b"stop")

    def _start(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="desk")
        thread.start()
        return thread


def _urgent(event: dict[str, Any]) -> bool:
    """Progress that says more than a number that will be overtaken."""
    final = bool(event["totalSteps"]) and event["step"] == event["totalSteps"]
    return final or event["message"] is not None or event.get("resumedStep") is not None
