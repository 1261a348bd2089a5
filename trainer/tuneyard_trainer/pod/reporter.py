"""Posts an attempt's newest progress report to the operator, in a thread of its own.

Training never waits for a post. A report that could not be posted is dropped, since the next one
contains everything. Only the last report, with the outcome, is posted until the operator takes it.
"""

from __future__ import annotations

import http.client
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from tuneyard.api.progress import MAX_POST_BYTES, POST_SECONDS, Post, PostResponse, Refusal

IDLE_SECONDS = 15.0
"""The time between posts without news. Only the response to a post carries a stop request."""
TIMEOUT_SECONDS = 10.0
"""The timeout of one post, from its connection to the end of the response."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0
"""The wait after a failure. It doubles each time, and jitter adds up to half of it."""
MOST_RETRY_AFTER_SECONDS = 120.0
"""The longest wait that a Retry-After header can request."""
ASK_POLL_SECONDS = 0.5
"""How often a question checks whether it is canceled."""
FINAL_SECONDS = 600.0
"""The time for which the last post is retried."""
PERMANENT = (400, 413)
"""HTTP statuses that the same post would get again. 401 and 403 are not
permanent: tokens are renewed."""

LogEvent = Callable[..., None]
"""Writes a log line: the event's name and its fields."""


class Refused(Exception):  # noqa: N818
    """A response other than 200."""

    def __init__(self, status: int, text: str, retry_after: float | None) -> None:
        """`text`: the body. `superseded` is true only if the operator itself says so: a proxy, or
        an operator that cannot read the job, may also answer 409."""
        self.status, self.retry_after = status, retry_after
        message, self.superseded = text, False
        with suppress(ValidationError):
            refusal = Refusal.model_validate_json(text)
            message, self.superseded = refusal.message, refusal.superseded
        super().__init__(f"HTTP {status}: {message[:300]}" if message else f"HTTP {status}")


class StatusClient:
    """Sends posts over TLS and trusts the operator's certificate authority only."""

    def __init__(self, url: str, token_file: Path, ca: str) -> None:
        """`ca`: certificates in PEM."""
        parts = urlsplit(url)
        if parts.scheme != "https" or parts.hostname is None:
            raise ValueError(f"{url} is not https: the token would be sent unencrypted")
        self._host, self._port, self._path = parts.hostname, parts.port or 443, parts.path or "/"
        self._token_file = token_file
        self._context = ssl.create_default_context(cadata=ca)

    def send(self, post: Post) -> PostResponse:
        """Send a post. Raises Refused, OSError, HTTPException; ValueError: malformed response.

        Redirects, which would send the token elsewhere, and the proxies of the environment, which
        cannot reach a service of the cluster, are not used.
        """
        headers = {
            "Authorization": f"Bearer {self._token_file.read_text().strip()}",
            "Content-Type": "application/json",
        }
        with self._connection() as connection:
            connection.request("POST", self._path, _body(post), headers)
            response = connection.getresponse()
            content = response.read(MAX_POST_BYTES)
        if response.status != http.client.OK:
            text = content.decode(errors="replace").strip()
            raise Refused(response.status, text, _seconds(response.getheader("Retry-After")))
        return PostResponse.model_validate_json(content)

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPSConnection]:
        """Yield a new connection, which TIMEOUT_SECONDS end: the timeout of a socket is that of one
        read, and a response may arrive byte by byte."""
        address = (self._host, self._port)
        connection = http.client.HTTPSConnection(*address, timeout=TIMEOUT_SECONDS)
        plain = socket.create_connection(address, timeout=TIMEOUT_SECONDS)
        with self._context.wrap_socket(
            plain, server_hostname=self._host, do_handshake_on_connect=False
        ) as connection.sock:
            deadline = _Deadline(connection.sock)
            try:
                connection.sock.do_handshake()
                yield connection
            except (OSError, http.client.HTTPException) as error:
                deadline.check(error)
                raise
            finally:
                deadline.cancel()
                connection.close()
            deadline.check(None)


class _Deadline(threading.Timer):
    """Ends a connection after TIMEOUT_SECONDS, whatever it is doing."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__(TIMEOUT_SECONDS, self._end)
        self._connected, self._expired = connected, False
        self.daemon = True
        self.start()

    def _end(self) -> None:
        self._expired = True
        with suppress(OSError):  # it has ended by itself
            self._connected.shutdown(socket.SHUT_RDWR)

    def check(self, cause: Exception | None) -> None:
        """Raise TimeoutError if the connection was ended."""
        if self._expired:
            text = f"no complete response within {TIMEOUT_SECONDS:g} s"
            raise TimeoutError(text) from cause


class Reporter:
    """Holds the newest post and sends it when it is due."""

    def __init__(
        self,
        send: Callable[[Post], PostResponse],
        first: Post,
        *,
        on_stop: Callable[[], None],
        on_stale: Callable[[], None],
        log: LogEvent,
    ) -> None:
        """`on_stop`: the operator asks the attempt to stop. `on_stale`: a newer attempt
        exists, or the job does not exist any more. Both run in the reporter's thread, and nothing
        is posted after `on_stale`."""
        self._send, self._on_stop, self._on_stale, self._log = send, on_stop, on_stale, log
        self._changed = threading.Condition()
        self._newest = first
        self._news = self._urgent = True
        self._ended = self.delivered = self.stale = False
        self._version = 0
        """The number of the newest post."""
        self._answered: tuple[int, PostResponse | None] = (-1, None)
        """The number of the last post that was answered, and the response. None: it is malformed
        for this operator."""
        self._posted_at = self._not_before = -1e9
        self._failures = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="reporter")
        self._thread.start()

    def update(self, post: Post, *, urgent: bool = False) -> None:
        """Replace the newest post, unless the last one was given. An urgent one is sent at once."""
        with self._changed:
            if self._ended:
                return
            self._newest, self._news = post, True
            self._version += 1
            self._urgent = self._urgent or urgent
            self._changed.notify_all()

    def ask(self, post: Post, seconds: float, canceled: Callable[[], bool]) -> PostResponse | None:
        """Send a post at once and return the response. None: the operator did not respond within
        `seconds`, it does not accept the post, `canceled` became true, or the last post was
        given."""
        self.update(post, urgent=True)
        deadline = time.monotonic() + seconds
        with self._changed:
            version = self._version
            while time.monotonic() < deadline and not (canceled() or self.stale or self._ended):
                if self._answered[0] >= version:
                    return self._answered[1]
                self._changed.wait(ASK_POLL_SECONDS)
        return None

    def finish(self, post: Post, seconds: float | None = None) -> bool:
        """Give the last post; return after `seconds` at most whether the operator took it. None:
        FINAL_SECONDS."""
        with self._changed:
            self._newest, self._news, self._urgent, self._ended = post, True, True, True
            self._version += 1
            self._changed.notify_all()
        self._thread.join(FINAL_SECONDS if seconds is None else seconds)
        if not self.delivered and not self.stale:
            self._log("outcome-not-delivered", tries=self._failures)
        return self.delivered

    def _run(self) -> None:
        while True:
            if self._deliver(*self._due()):
                return

    def _due(self) -> tuple[Post, int, bool]:
        """Wait until a post is due. Return it, its number, and whether it is the last one."""
        with self._changed:
            while True:
                pause = 0.0 if self._urgent else POST_SECONDS if self._news else IDLE_SECONDS
                wait = max(self._posted_at + pause, self._not_before) - time.monotonic()
                if wait <= 0:
                    self._urgent = self._news = False
                    self._posted_at = time.monotonic()
                    return self._newest, self._version, self._ended
                self._changed.wait(wait)

    def _deliver(self, post: Post, version: int, final: bool) -> bool:
        """Send a post. Return whether no other post follows."""
        try:
            response = self._send(post)
        except Refused as refusal:
            if refusal.superseded:
                self.stale = True
                self._log("attempt-is-stale", error=str(refusal))
                self._on_stale()
                return True
            if refusal.status in PERMANENT:
                self._note_answer(version, None)
            self._back_off(refusal, final, refusal.retry_after)
            return final and refusal.status in PERMANENT
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._back_off(error, final, None)
            return False
        self._failures = 0
        self._note_answer(version, response)
        if response.stop and not final:
            self._on_stop()
        self.delivered = final
        return final

    def _note_answer(self, version: int, response: PostResponse | None) -> None:
        with self._changed:
            self._answered = (version, response)
            self._changed.notify_all()

    def _back_off(self, error: Exception, final: bool, retry_after: float | None) -> None:
        doublings = min(self._failures, 10)  # a float has no 2**1024
        wait = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**doublings)
        if retry_after is not None:
            wait = min(MOST_RETRY_AFTER_SECONDS, max(FIRST_RETRY_SECONDS, retry_after))
        wait *= random.uniform(1.0, 1.5)
        self._failures += 1
        text = f"{type(error).__name__}: {error}"[:300]
        self._log("post-failed", error=text, retry_seconds=round(wait, 1))
        with self._changed:
            self._not_before = time.monotonic() + wait
            self._urgent = self._urgent or final
            self._news = True


def _body(post: Post) -> bytes:
    """Return a post as JSON; a post that is too long loses the stages' metrics."""
    data = _json(post)
    if len(data) <= MAX_POST_BYTES or post.tuneyard is None:
        return data
    stages = [stage.model_copy(update={"metrics": {}}) for stage in post.tuneyard.stages]
    report = post.tuneyard.model_copy(update={"stages": stages})
    return _json(post.model_copy(update={"tuneyard": report}))


def _json(post: Post) -> bytes:
    return post.model_dump_json(by_alias=True, exclude_none=True).encode()


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a Retry-After header (seconds or a date); None: not readable."""
    if retry_after is None:
        return None
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return None
