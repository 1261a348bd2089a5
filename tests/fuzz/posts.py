"""Random posts to a status server: malformed, huge, slow and forged ones."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

from tests.controller.played import GOOD, KEY, POST, PlayedCluster, Served, served
from tests.fuzz.mutations import mutated_text, mutated_value
from tests.planning.models import facts
from tuneyard.api.progress import MAX_POST_BYTES
from tuneyard.controller import status_server
from tuneyard.manifests.manifest import parse
from tuneyard.status.observe import Waiting, observe

Object = dict[str, Any]

EXPECTED = (200, 400, 401, 403, 404, 405, 408, 409, 413, 429, 503)
FULL: Object = {
    "trainerStatus": {
        "progressPercentage": 45,
        "estimatedRemainingSeconds": 789,
        "metrics": [{"name": "loss", "value": "0.75"}, {"name": "kl", "value": 0.1}],
        "lastUpdatedTime": "2026-01-23T13:00:00Z",
    },
    "tuneyard": {
        "attempt": 1,
        "stage": "sft",
        "step": 45,
        "totalSteps": 100,
        "resumedStep": 40,
        "stages": [
            {
                "name": "prepare",
                "kind": "prepare",
                "state": "Succeeded",
                "startedAt": "2026-01-23T12:00:00Z",
                "finishedAt": "2026-01-23T12:30:00Z",
                "metrics": {"rows": 12.0},
            },
            {"name": "sft", "kind": "sft", "state": "Running"},
        ],
        "facts": {
            "model": facts("8B").model_dump(mode="json", by_alias=True),
            "rows": {"prepare": {"longest": 900, "heldOut": 120}},
            "prompts": {"evaluate": {"longest": 40, "count": 12}},
            "models": {"evaluate/judge": 8_030_261_248},
            "device": {"gpu": "NVIDIA H100", "memory": 79 << 30},
            "devices": 2,
        },
    },
}
OUTCOMES: tuple[Object, ...] = (
    {"state": "Succeeded", "result": {"uri": "pvc://models/out/result", "digest": "sha256:d"}},
    {"state": "Failed", "failure": {"reason": "Flaky", "message": "it was"}, "retryable": True},
    {"state": "Interrupted", "retryable": True},
)


def requests(runs: int, seed: int) -> Iterator[bytes]:
    """Yield random requests; half of them are well-formed HTTP with a valid token."""
    random_ = random.Random(seed)
    ends = [{**FULL, "tuneyard": {**FULL["tuneyard"], "outcome": each}} for each in OUTCOMES]
    stale = {**FULL, "tuneyard": {**FULL["tuneyard"], "attempt": 2}}
    known = [FULL, POST, stale, *ends]
    for _ in range(runs):
        value = mutated_value(random_, random_.choice(known), known)
        body = json.dumps(value, ensure_ascii=random_.random() < 0.9).encode(errors="surrogatepass")
        kind = random_.choice(("post", "post", "post", "malformed", "huge", "forged", "broken"))
        yield _request(random_, kind, body)


def _request(random_: random.Random, kind: str, body: bytes) -> bytes:
    path, token, extra = Served.path, GOOD, ""
    if kind == "malformed":
        body = mutated_text(random_, body.decode(errors="replace")).encode(errors="surrogatepass")
        body = random_.choice((body, body[: len(body) // 2], b"[" * 20_000, random_.randbytes(200)))
    if kind == "huge":
        body += random_.choice((b" ", b"[", b"\xff")) * (2 * MAX_POST_BYTES)
    if kind == "forged":
        token = random_.choice((mutated_text(random_, token), "x" * 5000, "\u00e9", "a.b.c"))
        path = random_.choice((path, mutated_text(random_, path), path.replace("job", "%00")))
        extra = random_.choice(("", "Content-Encoding: gzip\r\n", "Transfer-Encoding: chunked\r\n"))
    lengths = (len(body), len(body), -1, 2**70) if kind == "broken" else (len(body),)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{extra}"
    if "chunked" not in extra:
        head += f"Content-Length: {random_.choice(lengths)}\r\n"
    message = (head + "Connection: close\r\n\r\n").encode(errors="replace") + body
    if kind == "broken":
        place = random_.randint(0, len(message))
        message = message[:place] + random_.randbytes(random_.randint(0, 9)) + message[place + 3 :]
    return message


async def _answer(running: Served, request: bytes) -> int | None:
    """Send a request as it is and return the status of the response; None: there is none."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", running.port, ssl=running.client_context()
    )
    try:
        async with asyncio.timeout(20):
            writer.write(request)
            line = await reader.readline()
    except OSError:
        return None
    finally:
        writer.transport.abort()
    return int(line.split()[1]) if line.startswith(b"HTTP/") else None


def _problem_of_state(running: Served) -> str | None:
    """Return how the newest post breaks the next status; None: the status can be stored."""
    cached = running.reconciler.cache.job(KEY)
    job = parse(running.cluster.body)
    assert job.status is not None
    state = cached.observed_state(job.status.attempts[-1])
    status = observe(job, Waiting("Planned", ""), state, datetime.now(UTC)).status
    value = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    text = json.dumps(value, allow_nan=False)
    text.encode()
    stored = parse({**running.cluster.body, "status": json.loads(text)})
    return None if stored.status == status else "the status means something else as JSON"


@asynccontextmanager
async def _server() -> AsyncIterator[Served]:
    """Run a status server that waits for nobody for long."""
    short = {"STORED_SECONDS": 0.0, "READ_SECONDS": 0.2, "CONNECTION_SECONDS": 2.0}
    with patch.multiple(status_server, **short):
        async with served(PlayedCluster()) as running:
            yield running


async def statuses(runs: int, seed: int) -> Counter[int | None]:
    """Return how often each status was answered."""
    async with _server() as running:
        return Counter([await _answer(running, request) for request in requests(runs, seed)])


async def problems(runs: int, seed: int) -> list[tuple[str, bytes]]:
    """Return what went wrong, each with the request that caused it."""
    return await problems_of(requests(runs, seed))


async def problems_of(sent: Iterable[bytes]) -> list[tuple[str, bytes]]:
    """Return which requests went wrong, and how. A good post must succeed after all of them."""
    found: list[tuple[str, bytes]] = []
    good = _request(random.Random(0), "post", json.dumps(POST).encode())
    async with _server() as running:
        for request in sent:
            if problem := await _problem(running, request):
                found.append((problem, request))
        if (status := await _answer(running, good)) != 200:
            found.append((f"a good post was answered {status} afterwards", good))
    return found


async def _problem(running: Served, request: bytes) -> str | None:
    try:
        status = await _answer(running, request)
        return _problem_of_state(running) if status in (None, *EXPECTED) else f"HTTP {status}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
