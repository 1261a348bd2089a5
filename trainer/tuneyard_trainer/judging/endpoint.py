"""A judge at an OpenAI-compatible chat endpoint: asked by several threads, patiently, on a budget.

Standard library only. What an endpoint may lack (log-probabilities, a temperature, the name of the
length limit) is found out by its refusals. The key is never part of a message.
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

from tuneyard.api.alignment import JudgeEndpoint
from tuneyard.errors import StageError
from tuneyard_trainer.judging.judges import LABELS, Ask, Reply, label_of, normalised

BACKOFF_SECONDS = 0.5
"""The first pause, doubled with each attempt and scattered by half, up to `LONGEST_BACKOFF`."""
LONGEST_BACKOFF = 30.0
LONGEST_RETRY_AFTER = 300.0
"""The longest pause that an endpoint may ask for."""
MOST_BYTES = 8 << 20
TOP_LOGPROBS = 5
"""The most that all servers allow; one that answers with A or B has both among them."""
CHARACTERS_PER_TOKEN = 4
"""Where the endpoint does not count tokens, this many characters are taken for one."""

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
SPENT = "the budget was spent before it was answered"


class Budget:
    """What may still be sent. Safe for threads."""

    def __init__(
        self,
        max_requests: int | None,
        max_tokens: int | None,
        *,
        requests: int = 0,
        tokens: int = 0,
    ) -> None:
        """`requests`, `tokens`: what earlier attempts of the stage used up."""
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._requests, self._tokens = requests, tokens
        self._lock = threading.Lock()
        self.refused = False
        """Whether a request was not sent for want of budget."""

    def take(self) -> bool:
        """Whether one more request may be sent; counts it."""
        with self._lock:
            spent = self._max_requests is not None and self._requests >= self._max_requests
            if spent or (self._max_tokens is not None and self._tokens >= self._max_tokens):
                self.refused = True
                return False
            self._requests += 1
            return True

    def add_tokens(self, count: int) -> None:
        with self._lock:
            self._tokens += count


@dataclass(frozen=True)
class Dialect:
    """What an endpoint understands."""

    logprobs: bool = True
    temperature: bool = True
    limit: str = "max_tokens"

    def simpler(self, refusal: str) -> Dialect | None:
        """What to try after a refusal; None: nothing is left."""
        if self.logprobs and "logprobs" in refusal:
            return replace(self, logprobs=False)
        if self.temperature and "temperature" in refusal:
            return replace(self, temperature=False)
        if self.limit == "max_tokens" and "max_completion_tokens" in refusal:
            return replace(self, limit="max_completion_tokens")
        return replace(self, logprobs=False) if self.logprobs else None


class Again(Exception):  # noqa: N818 - no error yet
    """A failure that may pass. `after`: seconds that the endpoint asked for; None: it did not."""

    def __init__(self, why: str, after: float | None = None) -> None:
        self.why, self.after = why, after
        super().__init__(why)


class Refused(Exception):  # noqa: N818
    """This question, in this dialect, is not one for the endpoint."""


class Endpoint:
    """A `Judge`."""

    def __init__(
        self,
        settings: JudgeEndpoint,
        budget: Budget,
        *,
        stop: Callable[[], bool],
    ) -> None:
        """Raises StageError JudgeForbidden where the manifest names a key and none is there."""
        self.name = settings.model
        self._settings, self._budget, self._stop = settings, budget, stop
        base = settings.url.rstrip("/")
        ending = "/chat/completions"
        self._url = base if base.endswith(ending) else base + ending
        self._key = _key(settings)
        self._dialect = Dialect()
        self._open_at = 0.0  # monotonic: nobody sends before, once the endpoint asked for patience
        self._cancelled = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirects)

    def replies(self, asks: Sequence[Ask]) -> Iterator[Reply]:
        """At most `concurrency` at once. When asked to stop, those under way are waited for: what
        is paid for is kept."""
        waiting = iter(asks)
        self._cancelled.clear()
        with ThreadPoolExecutor(self._settings.concurrency, "judge") as pool:
            try:
                running = self._submit(pool, islice(waiting, self._settings.concurrency))
                while running:
                    done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                    if self._stop():
                        self._cancelled.set()
                    for future in done:
                        reply = future.result()
                        if not self._cancelled.is_set():
                            running |= self._submit(pool, islice(waiting, 1))
                        if reply is not None:
                            yield reply
            finally:
                self._cancelled.set()

    def _submit(self, pool: ThreadPoolExecutor, asks: Iterator[Ask]) -> set[Future[Reply | None]]:
        return {pool.submit(self._reply, ask) for ask in asks}

    # ---- one question, in a thread --------------------------------------------------------------

    def _reply(self, ask: Ask) -> Reply | None:
        """None: it was not asked, as the budget is spent or the stage stops."""
        dialect = self._dialect
        attempts = failures = 0
        why = ""
        while failures < self._settings.max_attempts:
            if not self._wait_for_turn():
                return None
            if not self._budget.take():
                return Reply(ask.key, attempts=attempts, problem=SPENT) if attempts else None
            attempts += 1
            try:
                answer = self._post(self._body(ask, dialect))
                reply = self._read(ask, answer, attempts)
            except Refused as refusal:
                simpler = dialect.simpler(str(refusal))
                if simpler is None:
                    return Reply(ask.key, attempts=attempts, problem=str(refusal))
                dialect = simpler
            except Again as failure:
                failures, why = failures + 1, failure.why
                self._pause(failures, failure.after)
            else:
                self._dialect = dialect
                return reply
        return Reply(ask.key, attempts=attempts, problem=f"{why}, {failures} times")

    def _wait_for_turn(self) -> bool:
        """Whether to go on, once everybody may."""
        while not self._cancelled.is_set():
            ahead = self._open_at - time.monotonic()
            if ahead <= 0:
                return True
            # Scattered: all threads at once would only be turned away again.
            self._cancelled.wait(ahead + random.uniform(0, BACKOFF_SECONDS))
        return False

    def _pause(self, failures: int, after: float | None) -> None:
        if after is not None:  # the limit is the account's, so it holds for every thread
            self._open_at = max(self._open_at, time.monotonic() + min(after, LONGEST_RETRY_AFTER))
            return
        pause = min(LONGEST_BACKOFF, BACKOFF_SECONDS * 2 ** (failures - 1))
        self._cancelled.wait(pause * random.uniform(0.5, 1.5))

    def _body(self, ask: Ask, dialect: Dialect) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": list(ask.messages),
            dialect.limit: ask.max_tokens,
        }
        if dialect.temperature:
            body["temperature"] = 0
        if ask.wants_label and dialect.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body

    def _post(self, body: dict[str, Any]) -> Any:
        """The JSON answer. Raises Again, Refused, and StageError where no question will do."""
        headers = {"Content-Type": "application/json", "User-Agent": "tuneyard"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(  # noqa: S310 - the contract allows http and https alone
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
            raise Again(f"no answer within {limit} s") from error
        except (OSError, HTTPException) as error:  # URLError is an OSError
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise Again(f"no answer within {limit} s") from error
            raise Again(self._shown(str(cause) or type(cause).__name__)) from error
        except ValueError as error:
            raise Again("an answer that is no JSON") from error

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        with error:
            try:
                text = error.read(4096).decode("utf-8", "replace")
            except (OSError, HTTPException):
                text = ""
        said = self._shown(f"HTTP {error.code}: {' '.join(text.split())[:300]}".rstrip(": "))
        if error.code in RETRIED:
            return Again(said, _retry_after(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            return StageError(
                "JudgeForbidden",
                f"{self._settings.url} refuses the key: {said}.",
                advice="Correct judge.endpoint.key (on one machine: its environment variable).",
            )
        if error.code in (404, 405) or 300 <= error.code < 400:
            return StageError(
                "JudgeNotFound",
                f"{self._url} is no chat endpoint for {self._settings.model}: {said}.",
                advice="Correct judge.endpoint.url (https://HOST/v1) or judge.endpoint.model.",
            )
        return Refused(said)

    def _shown(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _read(self, ask: Ask, answer: Any, attempts: int) -> Reply:
        """Raises Again for an answer of another shape."""
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content") or ""
            used = (answer.get("usage") or {}).get("total_tokens")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Again("an answer that is no chat completion") from error
        if not isinstance(text, str):
            raise Again("an answer whose content is no text")
        tokens = used if isinstance(used, int) else _estimated(ask, text)
        self._budget.add_tokens(tokens)
        probability: float | None = None
        mass: float | None = None
        if ask.wants_label:
            probability, mass = _label(text, choice.get("logprobs"))
        return Reply(ask.key, text, probability, mass, attempts, tokens)


# ---- labels -------------------------------------------------------------------------------------


def _label(text: str, logprobs: Any) -> tuple[float | None, float | None]:
    """P(A) and the labels' mass, from the token probabilities where the reply names its label, else
    0 or 1 from the text alone (mass None)."""
    named = label_of(text)
    if named is None:
        return None, None
    for token, mass_a, mass_b in _positions(logprobs):
        if token == named:
            return normalised(mass_a, mass_b)
    return float(named == "A"), None


def _positions(logprobs: Any) -> list[tuple[str, float, float]]:
    """Each token of a reply, with the probabilities of A and B in its place; [] where the endpoint
    gives none."""
    try:
        return [
            (_bare(position["token"]), *_masses(position["top_logprobs"]))
            for position in logprobs["content"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _masses(top: Any) -> tuple[float, float]:
    """The probabilities of A and B at one position, each over all tokens that spell it."""
    mass = dict.fromkeys(LABELS, 0.0)
    for candidate in top:
        token = _bare(candidate["token"])
        if token in mass:
            mass[token] += math.exp(min(0.0, float(candidate["logprob"])))
    return mass["A"], mass["B"]


def _bare(token: str) -> str:
    """A token without the space, the marks and the line ends that it may carry."""
    return token.strip(" \n\t*_`\"'()[]{}<>.:\u2581\u0120\u010a")


# ---- the wire -----------------------------------------------------------------------------------


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _key(settings: JudgeEndpoint) -> str | None:
    if settings.key is None:
        return None
    key = os.environ.get(settings.key.variable, "").strip()
    if not key:
        raise StageError(
            "JudgeForbidden",
            f"the judge's key is {settings.key.name}/{settings.key.key}, and the environment "
            f"variable {settings.key.variable} that carries it is not set.",
            advice=f"Set {settings.key.variable}, or remove judge.endpoint.key.",
        )
    return key


def _read_all(response: Any, deadline: float) -> bytes:
    """The whole body; raises TimeoutError where it dribbles past the deadline."""
    body = bytearray()
    while chunk := response.read1(1 << 16):
        body += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > MOST_BYTES:
            raise ValueError("too long")
    return bytes(body)


def _retry_after(value: str | None) -> float | None:
    """Seconds; None where the endpoint asks for none, or not in a way to be understood."""
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


def _estimated(ask: Ask, text: str) -> int:
    characters = len(text) + sum(len(turn["content"]) for turn in ask.messages)
    return -(-characters // CHARACTERS_PER_TOKEN)
