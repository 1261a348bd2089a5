"""An OpenAI-compatible chat endpoint for tests, with programmable responses."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tuneyard.api.sources import JudgeEndpoint

QUESTION = "Principle: {principle}\nPrompt: {conversation}\nA: {first}\nB: {second}\nA or B?"


@dataclass
class Answer:
    """An HTTP response."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


def completion(text: str, labels: dict[str, float] | None = None, tokens: int = 10) -> Answer:
    """Return a chat completion. `labels`: probabilities of its first token, sent as
    log-probabilities."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
    if labels:
        top = [{"token": token, "logprob": math.log(p)} for token, p in labels.items()]
        choice["logprobs"] = {"content": [{**top[0], "token": text[:1], "top_logprobs": top}]}
    return Answer({"choices": [choice], "usage": {"total_tokens": tokens}})


def answers_of(body: dict[str, Any]) -> tuple[str, str]:
    """Return the two completions that a comparison by `QUESTION` shows, A first."""
    text = body["messages"][-1]["content"]
    first = text.partition("\nA: ")[2].rpartition("\nB: ")[0]
    second = text.rpartition("\nB: ")[2].removesuffix("\nA or B?")
    return first, second


def prefers_greater(body: dict[str, Any]) -> str:
    """Judge by the completions alone, without a position bias."""
    first, second = answers_of(body)
    return "A" if first > second else "B"


class JudgeServer:
    """A server that records its requests. `respond` takes a request's body and its index."""

    def __init__(self, respond: Callable[[dict[str, Any], int], Answer]) -> None:
        self.respond = respond
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def settings(self, **changes: Any) -> JudgeEndpoint:
        values: dict[str, Any] = {"url": self.url, "model": "judge-1", "concurrency": 2}
        return JudgeEndpoint(**(values | {"timeout_seconds": 20, "max_attempts": 4} | changes))

    def _begin(self, body: dict[str, Any], handler: BaseHTTPRequestHandler) -> int:
        with self._lock:
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self.paths.append(handler.path)
            self.times.append(time.monotonic())
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            return len(self.bodies) - 1

    def _end(self) -> None:
        with self._lock:
            self._under_way -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                number = judge._begin(body, self)
                try:
                    answer = judge.respond(body, number)
                    time.sleep(answer.delay)
                finally:
                    judge._end()  # before the response, which the next request may follow at once
                self._send(answer)

            def _send(self, answer: Answer) -> None:
                body = answer.body
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client closed the connection

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
