"""A judge at an OpenAI-compatible chat endpoint: several threads, retries with back-off, a budget.

Standard library only. Endpoints differ in optional fields (log-probabilities, temperature, the name
of the length limit): a field that the endpoint rejects is left out from then on. The API key never
appears in a message.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import islice
from typing import Any

from tuneyard.api.sources import JudgeEndpoint
from tuneyard.errors import StageError
from tuneyard_trainer.judging.judges import JUDGE, LABELS, JudgePrompt, Reply, label_of, normalize

BACKOFF_SECONDS = 0.5
"""The first pause. It doubles with each failure up to `MAX_BACKOFF_SECONDS`, with up to 50 %
jitter."""
MAX_BACKOFF_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 300.0
"""The longest pause that an endpoint can request."""
MAX_RESPONSE_BYTES = 8 << 20
TOP_LOGPROBS = 5
"""The most that all servers allow. For a reply of A or B, both letters are among the top 5."""
CHARACTERS_PER_TOKEN = 4
"""The estimate if the endpoint does not count tokens."""

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
BUDGET_SPENT = "the budget was spent before the reply"


class Budget:
    """The requests and tokens that a stage may use. Thread-safe."""

    def __init__(
        self,
        max_requests: int | None,
        max_tokens: int | None,
        *,
        requests: int = 0,
        tokens: int = 0,
    ) -> None:
        """`requests`, `tokens`: used by earlier attempts of the stage."""
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._requests, self._tokens = requests, tokens
        self._lock = threading.Lock()
        self.exhausted = False
        """Whether the budget prevented a request."""

    def take(self) -> bool:
        """Count one request. Return False if the budget does not allow it."""
        with self._lock:
            spent = self._max_requests is not None and self._requests >= self._max_requests
            if spent or (self._max_tokens is not None and self._tokens >= self._max_tokens):
                self.exhausted = True
                return False
            self._requests += 1
            return True

    def add_tokens(self, count: int) -> None:
        """Count the tokens of a reply and its prompt."""
        with self._lock:
            self._tokens += count


@dataclass(frozen=True)
class RequestFields:
    """The optional request fields that an endpoint accepts."""

    logprobs: bool = True
    temperature: bool = True
    limit: str = "max_tokens"
    """The name of the length limit."""

    def without_rejected(self, message: str) -> RequestFields | None:
        """Return the fields to try after a rejection with this message. None: no other fields are
        left to try."""
        if self.logprobs and "logprobs" in message:
            return replace(self, logprobs=False)
        if self.temperature and "temperature" in message:
            return replace(self, temperature=False)
        if self.limit == "max_tokens" and "max_completion_tokens" in message:
            return replace(self, limit="max_completion_tokens")
        return replace(self, logprobs=False) if self.logprobs else None


class RetryLater(Exception):  # noqa: N818 - handled by the retry loop
    """A failure that may pass. `after`: seconds to wait that the endpoint requests, if it does."""

    def __init__(self, problem: str, after: float | None = None) -> None:
        self.problem, self.after = problem, after
        super().__init__(problem)


class Rejected(Exception):  # noqa: N818 - handled by the retry loop
    """The endpoint rejects this prompt with these fields."""


class Endpoint:
    """A `Judge` at an endpoint."""

    def __init__(
        self,
        settings: JudgeEndpoint,
        budget: Budget,
        *,
        stop: Callable[[], bool],
        path: str = JUDGE,
    ) -> None:
        """`path`: the judge's field in the manifest, for messages. Raises StageError JudgeForbidden
        if the manifest names an API key and none is set."""
        self.name = settings.model
        self._path = path
        self._settings, self._budget, self._stop = settings, budget, stop
        base = settings.url.rstrip("/")
        path = "/chat/completions"
        self._url = base if base.endswith(path) else base + path
        self._key = _key(settings, path)
        self._fields = RequestFields()
        self._not_before = 0.0  # monotonic; no thread sends earlier, after a Retry-After
        self._canceled = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirects)

    def replies(self, prompts: Sequence[JudgePrompt]) -> Iterator[Reply]:
        """Yield replies as they arrive, with at most `concurrency` requests at once. When asked to
        stop, wait for the requests in progress: they cost money."""
        waiting = iter(prompts)
        self._canceled.clear()
        with ThreadPoolExecutor(self._settings.concurrency, "judge") as pool:
            try:
                running = self._submit(pool, islice(waiting, self._settings.concurrency))
                while running:
                    done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                    if self._stop():
                        self._canceled.set()
                    for future in done:
                        reply = future.result()
                        if not self._canceled.is_set():
                            running |= self._submit(pool, islice(waiting, 1))
                        if reply is not None:
                            yield reply
            finally:
                self._canceled.set()

    def _submit(
        self, pool: ThreadPoolExecutor, prompts: Iterator[JudgePrompt]
    ) -> set[Future[Reply | None]]:
        return {pool.submit(self._reply, prompt) for prompt in prompts}

    # ---- one prompt, in a thread ----------------------------------------------------------------

    def _reply(self, prompt: JudgePrompt) -> Reply | None:
        """Return the reply to a prompt. None: no request was sent, because the budget is spent or
        the stage stops."""
        fields = self._fields
        attempts = failures = 0
        problem = ""
        while failures < self._settings.max_attempts:
            if not self._wait_until_allowed():
                return None
            if not self._budget.take():
                if not attempts:
                    return None
                return Reply(prompt.key, attempts=attempts, problem=BUDGET_SPENT)
            attempts += 1
            try:
                response = self._post(self._body(prompt, fields))
                reply = self._read(prompt, response, attempts)
            except Rejected as rejection:
                others = fields.without_rejected(str(rejection))
                if others is None:
                    return Reply(prompt.key, attempts=attempts, problem=str(rejection))
                fields = others
            except RetryLater as failure:
                failures, problem = failures + 1, failure.problem
                self._pause(failures, failure.after)
            else:
                self._fields = fields
                return reply
        return Reply(prompt.key, attempts=attempts, problem=f"{problem}, {failures} times")

    def _wait_until_allowed(self) -> bool:
        """Wait until requests may be sent. Return False if the judge was canceled meanwhile."""
        while not self._canceled.is_set():
            left = self._not_before - time.monotonic()
            if left <= 0:
                return True
            # With jitter: requests of all threads at once would be rejected again.
            self._canceled.wait(left + random.uniform(0, BACKOFF_SECONDS))
        return False

    def _pause(self, failures: int, after: float | None) -> None:
        if after is not None:  # the account's rate limit applies to all threads
            until = time.monotonic() + min(after, MAX_RETRY_AFTER_SECONDS)
            self._not_before = max(self._not_before, until)
            return
        pause = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (failures - 1))
        self._canceled.wait(pause * random.uniform(0.5, 1.5))

    def _body(self, prompt: JudgePrompt, fields: RequestFields) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": list(prompt.messages),
            fields.limit: prompt.max_tokens,
        }
        if fields.temperature:
            body["temperature"] = 0
        if prompt.wants_label and fields.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body

    def _post(self, body: dict[str, Any]) -> Any:
        """Send a request and return the parsed JSON response. Raises RetryLater, Rejected, and
        StageError if no prompt can succeed."""
        headers = {"Content-Type": "application/json", "User-Agent": "tuneyard"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(  # noqa: S310 - the contract allows only http and https
            self._url, json.dumps(body).encode(), headers, method="POST"
        )
        limit = self._settings.timeout_seconds
        deadline = time.monotonic() + limit
        try:
            with self._opener.open(request, timeout=limit) as response:
                return json.loads(_read_all(response, deadline))
        except urllib.error.HTTPError as error:
            raise self._failure(error) from error
        except TimeoutError as error:
            raise RetryLater(f"no response within {limit} s") from error
        except (OSError, HTTPException) as error:  # URLError is an OSError
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise RetryLater(f"no response within {limit} s") from error
            raise RetryLater(self._redacted(str(cause) or type(cause).__name__)) from error
        except (ValueError, RecursionError) as error:
            raise RetryLater("the response is not JSON") from error

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        with error:
            try:
                text = error.read(4096).decode("utf-8", "replace")
            except (OSError, HTTPException):
                text = ""
        problem = self._redacted(f"HTTP {error.code}: {' '.join(text.split())[:300]}".rstrip(": "))
        if error.code in RETRIED_STATUS:
            return RetryLater(problem, _retry_after(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            return StageError(
                "JudgeForbidden",
                f"{self._settings.url} rejects the API key: {problem}.",
                advice=f"Correct {self._path}.endpoint.key (for `tuneyard run`: its environment "
                "variable).",
            )
        if error.code in (404, 405) or 300 <= error.code < 400:
            return StageError(
                "JudgeNotFound",
                f"{self._url} is not a chat endpoint of {self._settings.model}: {problem}.",
                advice=f"Correct {self._path}.endpoint.url (https://HOST/v1) or "
                f"{self._path}.endpoint.model.",
            )
        return Rejected(problem)

    def _redacted(self, text: str) -> str:
        """Return text without the API key."""
        return text.replace(self._key, "[key]") if self._key else text

    def _read(self, prompt: JudgePrompt, response: Any, attempts: int) -> Reply:
        """Return the reply in a response. Raises RetryLater if it is not a chat completion."""
        try:
            choice = response["choices"][0]
            text = choice["message"].get("content") or ""
            used = (response.get("usage") or {}).get("total_tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RetryLater("the response is not a chat completion") from error
        if not isinstance(text, str):
            raise RetryLater("the content of the response is not text")
        tokens = used if isinstance(used, int) else _estimated_tokens(prompt, text)
        self._budget.add_tokens(tokens)
        probability: float | None = None
        mass: float | None = None
        if prompt.wants_label:
            probability, mass = _label(text, choice.get("logprobs"))
        return Reply(prompt.key, text, probability, mass, attempts, tokens)


# ---- labels -------------------------------------------------------------------------------------


def _label(text: str, logprobs: Any) -> tuple[float | None, float | None]:
    """Return P(A) and the mass of both labels: from the token probabilities at the label, or 0 or 1
    (mass None) from the text alone. None, None: the text names no label."""
    named = label_of(text)
    if named is None:
        return None, None
    for token, mass_a, mass_b in _positions(logprobs):
        if token == named:
            return normalize(mass_a, mass_b)
    return float(named == "A"), None


def _positions(logprobs: Any) -> list[tuple[str, float, float]]:
    """Return each token of a reply with the probabilities of A and B at its position. []: the
    endpoint gives none."""
    try:
        return [
            (_bare(position["token"]), *_masses(position["top_logprobs"]))
            for position in logprobs["content"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _masses(top: Any) -> tuple[float, float]:
    """Return the probabilities of A and B at one position, each summed over its spellings. Raises
    ValueError for a log-probability that is NaN."""
    mass = dict.fromkeys(LABELS, 0.0)
    for candidate in top:
        token = _bare(candidate["token"])
        if token in mass:
            logprob = float(candidate["logprob"])
            if math.isnan(logprob):  # `min` would take it for 0
                raise ValueError("a log-probability is NaN")
            mass[token] += math.exp(min(0.0, logprob))
    return mass["A"], mass["B"]


def _bare(token: str) -> str:
    """Return a token without white space, punctuation and the space markers of tokenizers."""
    return token.strip(" \n\t*_`\"'()[]{}<>.:\u2581\u0120\u010a")


# ---- HTTP ---------------------------------------------------------------------------------------


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they turn a POST into a GET and send the API key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _key(settings: JudgeEndpoint, path: str) -> str | None:
    """Return the API key. None: the manifest names none. Raises StageError JudgeForbidden."""
    if settings.key is None:
        return None
    key = os.environ.get(settings.key.variable, "").strip()
    if not key:
        raise StageError(
            "JudgeForbidden",
            f"the environment variable {settings.key.variable}, which holds the judge's API key "
            f"{settings.key.name}/{settings.key.key}, is not set.",
            advice=f"Set {settings.key.variable}, or remove {path}.endpoint.key.",
        )
    return key


def _read_all(response: Any, deadline: float) -> bytes:
    """Return the whole body. Raises TimeoutError after the deadline, also while bytes arrive, and
    ValueError above MAX_RESPONSE_BYTES."""
    body = bytearray()
    while chunk := response.read1(1 << 16):
        body += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > MAX_RESPONSE_BYTES:
            raise ValueError("too long")
    return bytes(body)


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header. None: it is missing or invalid."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _estimated_tokens(prompt: JudgePrompt, text: str) -> int:
    characters = len(text) + sum(len(turn["content"]) for turn in prompt.messages)
    return -(-characters // CHARACTERS_PER_TOKEN)
