"""A TCP proxy between drivers and operator that can be cut or slowed down."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

CHUNK_BYTES = 65536


class Wire:
    """A context manager that listens on `port` and passes bytes on to `target`."""

    def __init__(self, port: int, target: int) -> None:
        self.port, self._target = port, target
        self._delay, self._is_cut, self._closed = 0.0, False, False
        self._open: set[socket.socket] = set()
        self._changing = threading.Lock()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        threading.Thread(target=self._accept, daemon=True, name="wire").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._listener.close()
        self._break()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """While active, every connection is broken and new ones are refused."""
        self._is_cut = True
        self._break()
        try:
            yield
        finally:
            self._is_cut = False

    @contextmanager
    def slowed(self, seconds: float) -> Iterator[None]:
        """While active, each chunk waits."""
        self._delay = seconds
        try:
            yield
        finally:
            self._delay = 0.0

    def _break(self) -> None:
        with self._changing:
            broken, self._open = self._open, set()
        for each in broken:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:  # the operator is down
                near.close()
                continue
            far.settimeout(None)
            with self._changing:
                self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=[source, sink], daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                time.sleep(self._delay)
                sink.sendall(data)
        with self._changing:
            self._open -= {source, sink}
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
