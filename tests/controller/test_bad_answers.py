"""Answers of the API server that are cut or ask for too much: they are errors, not empty lists."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from tests.controller.memory import RAY_JOBS, MemoryApi, eventually, job, key, operated, pod
from tuneyard.controller import reconciler, resync
from tuneyard.controller.cluster import ApiError
from tuneyard.controller.lease import Lease
from tuneyard.controller.queue import LAST_BACKOFF, MOST_AFTER, Queue, Requeue


class Cut:
    """A 200 whose body ends early, as HTTP/1.0 without a length hands it over."""

    status, reason, headers = 200, "OK", cast("Mapping[str, str]", {})

    async def read(self) -> bytes:
        return b'{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[{"meta'


async def cut_answers(*_: Any, **__: Any) -> Cut:
    return Cut()


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b"[" * 100_000])
def test_an_answer_that_is_no_object_is_an_error(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    async def read(_: Cut) -> bytes:
        return body

    monkeypatch.setattr(Cut, "read", read)
    api = MemoryApi()
    api.request = cut_answers  # type: ignore[method-assign, assignment]
    with pytest.raises(ApiError, match="BadAnswer"):
        asyncio.run(api.cluster.pods(key("tuned")))


def test_a_cut_list_of_pods_starts_no_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "LAG_SECONDS", 0.0)

    async def run() -> list[str]:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            path = f"{RAY_JOBS}/tuned-1"
            await eventually(lambda: path in api.objects)
            head = pod(api.objects[path], "head")
            head["metadata"]["finalizers"] = ["test/stays"]  # it is slow to end
            api.add(head)
            api.change(path, status={"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"})
            await eventually(lambda: path not in api.objects)
            serve = api.request

            async def request(method: str, url: str, **more: Any) -> Any:
                is_list = method == "GET" and url.split("?")[0].endswith(("/pods", "/rayjobs"))
                return Cut() if is_list else await serve(method, url, **more)

            api.request = request  # type: ignore[method-assign]
            with pytest.raises(ApiError, match="BadAnswer"):
                await resync.Resync(operator.reconciler).check_objects()
            for _ in range(10):
                operator.reconciler.queue.add(key("tuned"))
                await asyncio.sleep(0.05)
            return api.names(RAY_JOBS)

    assert asyncio.run(run()) == []


def test_a_cut_lease_is_not_acquired_and_ends_nothing() -> None:
    api = MemoryApi()
    api.request = cut_answers  # type: ignore[method-assign, assignment]
    assert asyncio.run(Lease(api.cluster, "system", "tuneyard", "me")._try_acquire()) is False


def test_a_retry_after_of_a_day_does_not_stop_a_job_for_a_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delays: list[float] = []

    async def run() -> None:
        async def work(_: str) -> None:
            raise Requeue(86_400.0)

        queue = Queue(work, 1)
        monkeypatch.setattr(queue, "add_after", lambda _, seconds: delays.append(seconds))
        running = asyncio.create_task(queue.run())
        queue.add("job")
        await eventually(lambda: delays)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())
    assert LAST_BACKOFF <= delays[0] <= MOST_AFTER


def test_the_listing_at_start_waits_as_long_as_a_busy_server_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each listing is of all pods of the cluster, page by page, while the API server is behind."""
    tries = []

    async def busy(_: reconciler.Reconciler) -> reconciler.Versions:
        tries.append(429)
        raise ApiError(429, "TooManyRequests", "retry later", retry_after=30.0)

    monkeypatch.setattr(reconciler.Reconciler, "list_objects", busy)

    async def run() -> None:
        async with operated(MemoryApi()):
            await asyncio.sleep(0.5)

    asyncio.run(run())
    assert tries == [429]
