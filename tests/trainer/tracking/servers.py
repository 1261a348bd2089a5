"""Servers in place of MLflow's: one that never answers, and one that refuses what it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Requests:
    """What a server was asked."""

    url: str
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of each request, in order."""
    bodies: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    """Ends the requests that are not answered."""


@contextmanager
def serving(
    status: int | None, message: str = "who?", location: str | None = None
) -> Iterator[Requests]:
    """Run a server that answers each request with this status and message. None: it never answers.
    `location`: where it sends clients to; None: nowhere."""
    asked = Requests("")

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            asked.bodies.append(self.rfile.read(length).decode())
            asked.headers.append(dict(self.headers))
            if status is None:
                asked.released.wait()
                return
            body = json.dumps({"error_code": "PERMISSION_DENIED", "message": message}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if location is not None:
                self.send_header("Location", location + self.path)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer  # noqa: N815  the names of the standard library

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    asked.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield asked
    finally:
        asked.released.set()
        server.shutdown()
        server.server_close()
