"""An HTTPS server in place of the operator's: it records posts and sends programmable replies."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.tls import write_certificate


@dataclass
class Reply:
    """A response: its status, body, headers and delay in seconds."""

    status: int = 200
    stop: bool = False
    superseded: bool = False
    """Of a refusal: the operator says that the attempt is not the newest."""
    body: bytes | None = None
    """None: the operator's."""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    pause: float = 0.0
    """Seconds before each byte of the response."""

    @property
    def data(self) -> bytes:
        if self.body is not None:
            return self.body
        refusal = {"message": "no", "superseded": self.superseded}
        return json.dumps({"stop": self.stop} if self.status == 200 else refusal).encode()


SUPERSEDED = Reply(409, superseded=True)


class StatusServer:
    """The recorded posts, and the replies to send: each of `replies` once, then `reply`."""

    def __init__(self) -> None:
        self.posts: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.tokens: list[str | None] = []
        self.replies: list[Reply] = []
        self.reply = Reply()
        self.url = self.ca = ""
        self.arrived = threading.Condition()

    def take(self, body: bytes, token: str | None) -> Reply:
        with self.arrived:
            self.posts.append(json.loads(body))
            self.times.append(time.monotonic())
            self.tokens.append(token)
            self.arrived.notify_all()
            return self.replies.pop(0) if self.replies else self.reply

    def wait_for(self, count: int, seconds: float = 20.0) -> None:
        """Wait until `count` posts have arrived. Raises AssertionError after `seconds`."""
        with self.arrived:
            if not self.arrived.wait_for(lambda: len(self.posts) >= count, seconds):
                raise AssertionError(f"{len(self.posts)} posts arrived, not {count}")


@contextmanager
def serving(folder: Path) -> Iterator[StatusServer]:
    """Run a server on a free port, with a new certificate in `folder`."""
    certificate, key = write_certificate(folder)
    status = StatusServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reply = status.take(body, self.headers["Authorization"])
            time.sleep(reply.seconds)
            if reply.pause:
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}":
                    time.sleep(reply.pause)
                    self.wfile.write(bytes([byte]))
                return
            self.send_response(reply.status)
            length = str(len(reply.data))
            for name, value in {**reply.headers, "Content-Length": length}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    status.url = f"https://127.0.0.1:{server.server_port}/progress"
    status.ca = certificate.read_text()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield status
    finally:
        server.shutdown()
        server.server_close()
