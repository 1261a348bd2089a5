"""Posts an attempt's newest picture to the operator, in its own thread: training never waits.

A picture that could not be posted is not kept: the next one says all of it. Only the last one, with
the ending, is posted until it is taken.
"""

from __future__ import annotations

import http.client
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path

from tuneyard.api.progress import MAX_POST_BYTES, POST_SECONDS, Answer, Post

IDLE_SECONDS = 15.0
"""Between posts without news: an answer is the only way to hear that the job shall stop."""
TIMEOUT_SECONDS = 10.0
"""Of one post."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0
"""The wait after a failure, doubled each time; jitter makes it up to a half more."""
MOST_RETRY_AFTER_SECONDS = 120.0
"""A server that asks for more patience is asked again earlier."""
FINAL_SECONDS = 600.0
"""How long the last post is retried."""
FOR_GOOD = (400, 413)
"""Statuses that the same post would get again. Not 401 and 403: tokens are renewed."""
STALE = 409

Say = Callable[..., None]
"""Writes a log line: an event's name and its fields."""


class Refused(Exception):  # noqa: N818
    """An answer other than 200."""

    def __init__(self, status: int, said: str, retry_after: float | None) -> None:
        self.status, self.retry_after = status, retry_after
        super().__init__(f"HTTP {status}: {said}" if said else f"HTTP {status}")


class Channel:
    """Sends posts over TLS, trusting the operator's own authority alone."""

    def __init__(self, url: str, token_file: Path, ca: str) -> None:
        """`ca`: certificates in PEM."""
        if not url.startswith("https://"):
            raise ValueError(f"{url} is not https: a token is never sent in the clear")
        self._url, self._token_file = url, token_file
        # Made of parts: without redirects, which would carry the token elsewhere, and without the
        # proxies that pods are told of, which know nothing of a service of the cluster.
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(
            urllib.request.HTTPSHandler(context=ssl.create_default_context(cadata=ca))
        )
        self._opener.add_handler(urllib.request.HTTPErrorProcessor())
        self._opener.add_handler(urllib.request.HTTPDefaultErrorHandler())

    def send(self, post: Post) -> Answer:
        """Raises Refused, OSError, HTTPException or ValueError (an answer that is none)."""
        request = urllib.request.Request(  # noqa: S310  https alone, see above
            self._url,
            data=_body(post),
            method="POST",
            headers={
                "Authorization": f"Bearer {self._token_file.read_text().strip()}",
                "Content-Type": "application/json",
            },
        )
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                return Answer.model_validate_json(response.read(MAX_POST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(300).decode(errors="replace").strip()
            raise Refused(error.code, said, _seconds(error.headers.get("Retry-After"))) from None


class Reporter:
    """Keeps the newest post and sends it when it is due."""

    def __init__(
        self,
        send: Callable[[Post], Answer],
        first: Post,
        *,
        on_stop: Callable[[], None],
        on_stale: Callable[[], None],
        say: Say,
    ) -> None:
        """`on_stop`: the operator wants an orderly end; `on_stale`: this attempt is over. Both are
        called in the reporter's thread; nothing is posted after `on_stale`."""
        self._send, self._on_stop, self._on_stale, self._say = send, on_stop, on_stale, say
        self._changed = threading.Condition()
        self._newest = first
        self._news = self._urgent = True
        self._ended = self.delivered = self.stale = False
        self._posted_at = self._not_before = -1e9
        self._failures = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="reporter")
        self._thread.start()

    def tell(self, post: Post, *, urgent: bool = False) -> None:
        """Replaces the newest post; urgent ones go out at once."""
        with self._changed:
            self._newest, self._news = post, True
            self._urgent = self._urgent or urgent
            self._changed.notify()

    def finish(self, post: Post) -> bool:
        """Posts the ending and returns whether it was taken, after FINAL_SECONDS at the latest."""
        with self._changed:
            self._newest, self._news, self._urgent, self._ended = post, True, True, True
            self._changed.notify()
        self._thread.join(FINAL_SECONDS)
        if not self.delivered and not self.stale:
            self._say("ending-not-delivered", tries=self._failures)
        return self.delivered

    def _run(self) -> None:
        while True:
            if self._deliver(*self._due()):
                return

    def _due(self) -> tuple[Post, bool]:
        """Waits until a post may go out; it, and whether it is the last."""
        with self._changed:
            while True:
                pause = 0.0 if self._urgent else POST_SECONDS if self._news else IDLE_SECONDS
                wait = max(self._posted_at + pause, self._not_before) - time.monotonic()
                if wait <= 0:
                    self._urgent = self._news = False
                    self._posted_at = time.monotonic()
                    return self._newest, self._ended
                self._changed.wait(wait)

    def _deliver(self, post: Post, final: bool) -> bool:
        """Sends; whether that was the last word."""
        try:
            answer = self._send(post)
        except Refused as refusal:
            if refusal.status == STALE:
                self.stale = True
                self._say("attempt-is-stale", error=str(refusal))
                self._on_stale()
                return True
            self._back_off(refusal, final, refusal.retry_after)
            return final and refusal.status in FOR_GOOD
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._back_off(error, final, None)
            return False
        self._failures = 0
        if answer.stop and not final:
            self._on_stop()
        self.delivered = final
        return final

    def _back_off(self, error: Exception, final: bool, retry_after: float | None) -> None:
        wait = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**self._failures)
        if retry_after is not None:
            wait = min(MOST_RETRY_AFTER_SECONDS, max(0.0, retry_after))
        wait *= random.uniform(1.0, 1.5)
        self._failures += 1
        said = f"{type(error).__name__}: {error}"[:300]
        self._say("post-failed", error=said, retry_seconds=round(wait, 1))
        with self._changed:
            self._not_before = time.monotonic() + wait
            self._urgent = self._urgent or final
            self._news = True


def _body(post: Post) -> bytes:
    """JSON; without the stages' metrics where it would be too long, which records hold anyway."""
    data = _json(post)
    if len(data) <= MAX_POST_BYTES or post.tuneyard is None:
        return data
    stages = [stage.model_copy(update={"metrics": {}}) for stage in post.tuneyard.stages]
    picture = post.tuneyard.model_copy(update={"stages": stages})
    return _json(post.model_copy(update={"tuneyard": picture}))


def _json(post: Post) -> bytes:
    return post.model_dump_json(by_alias=True, exclude_none=True).encode()


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header: seconds or a date; None: there is none that can be read."""
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
