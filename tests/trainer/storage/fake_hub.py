"""A model hub on loopback with a gated model and a gated data set, as the hub shows them: all may
list their files, and one token may read them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_reader"
COMMIT = "c" * 40
REPOSITORIES = {
    "models/org/model": {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": b"w" * 4096,
        "pytorch_model.bin": b"pickle",
        "README.md": b"# a card",
    },
    "datasets/org/data": {"train.jsonl": b'{"text": "a row"}\n'},
}


class FakeHub:
    """The hub's address, and the files that were downloaded from it, in order."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.downloads: list[str] = []


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve the hub until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub: Any = FakeHub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path.startswith("api/"):
            self._api(path.removeprefix("api/"))
        else:
            self._file(path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(self.path).removeprefix("/api/")
        repository = path.partition("/paths-info/")[0]
        entries = _entries(repository)
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else [text]
        self._send(200, [entry for entry in entries if entry["path"] in asked or len(asked) == 0])

    def _api(self, path: str) -> None:
        repository = "/".join(path.split("/")[:3])
        if repository not in REPOSITORIES:
            self._send(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            self._send(200, _entries(repository))
        else:
            name = repository.partition("/")[2]
            siblings = [{"rfilename": file} for file in REPOSITORIES[repository]]
            self._send(200, {"id": name, "sha": COMMIT, "gated": "manual", "siblings": siblings})

    def _file(self, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        if not repository.startswith("datasets/"):
            repository = f"models/{repository}"
        name = rest.partition("/")[2]
        data = REPOSITORIES[repository][name]
        given = self.headers.get("Authorization")
        if given != f"Bearer {TOKEN}":
            refused = {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}
            self._send(403 if given else 401, {"error": "gated"}, refused)
            return
        if self.command == "GET":
            self.server.hub.downloads.append(name)  # type: ignore[attr-defined]
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT}
        self._send(200, data, {**headers, "Accept-Ranges": "bytes"})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]


def _entries(repository: str) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
        for name, data in REPOSITORIES[repository].items()
    ]
