"""The event channel between the workers and the driver.

Workers send events; the driver sends the request to stop, and the answer to a worker's question.
The events are JSON over sockets that a key of this run authenticates. A Ray actor would have to be
polled instead.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

POST_SECONDS = 1.0
"""The least time between two progress events of a worker. Stage events are never delayed."""
DRAIN_SECONDS = 10.0
"""How long the server waits for the last events of a group that has ended."""
STOP = b"stop"
"""The request to stop; any other message of the driver is an answer, in JSON."""
ASK_POLL_SECONDS = 0.5
"""How often a worker that waits for an answer checks whether it was asked to stop."""
AUTHENTICATION_SECONDS = 10.0
"""How long a connection may take to prove that it knows the key."""


class EventClient:
    """A worker's connection to the driver.

    Sending waits for the driver only when the kernel's buffers, some megabytes, are full.
    """

    def __init__(
        self, address: tuple[str, int], key: bytes, on_lost: Callable[[], None] | None = None
    ) -> None:
        """`on_lost` is called in a thread of its own when the driver has ended."""
        self._on_lost = on_lost
        self._connection = Client(address, authkey=key)
        self._stop = threading.Event()
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._sending = threading.Lock()
        self._sent_at = 0.0
        self._unsent: dict[str, float] = {}
        threading.Thread(target=self._listen, daemon=True, name="event-client").start()

    def emit(self, event: dict[str, Any]) -> None:
        """Send an event. Stage events go out at once and in order. A progress event that is not due
        is dropped, and its metrics are added to the next one."""
        if event["type"] == "progress":
            self._unsent |= event["metrics"]
            if not _urgent(event) and time.monotonic() - self._sent_at < POST_SECONDS:
                return
            self._sent_at = time.monotonic()
            event = event | {"metrics": self._unsent}
        self._unsent = {}
        with self._sending, suppress(OSError):  # Ray kills a worker whose driver is gone
            self._connection.send_bytes(json.dumps(event).encode())

    def ask(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """Send an event and return the driver's answer. None: the driver asked to stop instead."""
        self.emit(event)
        while not self.stopped():
            with suppress(queue.Empty):
                return self._answers.get(timeout=ASK_POLL_SECONDS)
        return None

    def stopped(self) -> bool:
        """Return whether the driver has asked this worker to stop."""
        return self._stop.is_set()

    def ask_to_stop(self) -> None:
        """Tell the driver that this worker's pod is being deleted; the driver then stops all
        workers. Any thread may call this."""
        with self._sending, suppress(OSError):
            self._connection.send_bytes(json.dumps({"type": "draining"}).encode())

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                message = self._connection.recv_bytes()
                if message == STOP:
                    self._stop.set()
                else:
                    self._answers.put(json.loads(message))
        if self._on_lost is not None:
            self._on_lost()


class EventServer:
    """The driver's end of the channel: the connections of all workers."""

    def __init__(self, host: str) -> None:
        """`host`: this machine's address, as the workers reach it."""
        self.key = secrets.token_bytes(32)
        # Without a key of its own: it would authenticate one connection at a time, and wait for a
        # silent one without end.
        self._listener = Listener((host, 0))
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._connections: list[Any] = []
        self._readers: list[threading.Thread] = []
        self._stop_requested = self._closed = False
        self._start(self._accept)

    @property
    def address(self) -> tuple[str, int]:
        """The address that workers connect to."""
        host, port = self._listener.address
        return host, port

    @property
    def has_clients(self) -> bool:
        """Whether any worker has connected."""
        return bool(self._connections)

    def ask_to_stop(self) -> None:
        """Ask all workers to stop, also those that connect later."""
        self._stop_requested = True
        for connection in self._connections:
            self._send(connection, STOP)

    def answer(self, value: Mapping[str, Any]) -> None:
        """Answer the worker that asks. All workers receive it, and the others do not read it."""
        for connection in self._connections:
            self._send(connection, json.dumps(value).encode())

    def close(self) -> None:
        """Close the channel after the events that were sent have been read."""
        for reader in self._readers:
            reader.join(DRAIN_SECONDS)
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except OSError:
                time.sleep(0.1)  # it disconnected at once
                continue
            self._start(self._serve, connection)

    def _serve(self, connection: Connection) -> None:
        """Read the events of a connection, if it is a worker's."""
        if not self._is_worker(connection):
            connection.close()
            return
        self._readers.append(threading.current_thread())
        self._connections.append(connection)
        if self._stop_requested:
            self._send(connection, STOP)
        with suppress(EOFError, OSError):
            while True:
                self.events.put(json.loads(connection.recv_bytes()))

    def _is_worker(self, connection: Connection) -> bool:
        """Return whether the other end proves in time that it knows the key."""
        limit = threading.Timer(AUTHENTICATION_SECONDS, _shut_down, [connection])
        limit.daemon = True
        limit.start()
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
        except (AuthenticationError, EOFError, OSError):
            return False
        finally:
            limit.cancel()
        return True

    def _send(self, connection: Any, message: bytes) -> None:
        with suppress(OSError):
            connection.send_bytes(message)

    def _start(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="event-server")
        thread.start()
        return thread


def _shut_down(connection: Connection) -> None:
    """End a connection for the thread that reads from it, which `close` would not do."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ended:
        ended.shutdown(socket.SHUT_RDWR)


def _urgent(event: dict[str, Any]) -> bool:
    """Return whether a progress event must not be replaced by a later one."""
    final = bool(event["totalSteps"]) and event["step"] == event["totalSteps"]
    return final or event["message"] is not None or event.get("resumedStep") is not None
