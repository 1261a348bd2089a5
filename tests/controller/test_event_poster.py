"""Events that wait: for a slow API server, or for jobs that wait for a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.controller.memory import (
    JOBS,
    RAY_JOBS,
    MemoryApi,
    Object,
    eventually,
    job,
    key,
    operated,
)
from tuneyard.controller import event_poster
from tuneyard.controller.cluster import Cluster
from tuneyard.controller.event_poster import EventPoster
from tuneyard.controller.queue import Queue
from tuneyard.controller.settings import Settings
from tuneyard.status.events import Event


class Posts(list[Object]):
    """The events that the API server received."""

    async def post_event(self, _: str, event: Object) -> None:
        self.append(event)


def poster_to(posts: Posts, is_busy: Callable[[], bool] = lambda: False) -> EventPoster:
    return EventPoster(cast("Cluster", SimpleNamespace(post_event=posts.post_event)), is_busy)


def add_event(poster: EventPoster) -> None:
    body: Any = job("tuned")
    body["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    poster.add(key("tuned"), body, Event("Normal", "Running", "attempt 1 runs"))


def test_an_event_that_waits_has_the_time_of_its_change(monkeypatch: pytest.MonkeyPatch) -> None:
    posts = Posts()

    async def run() -> None:
        poster = poster_to(posts)
        monkeypatch.setattr(event_poster, "rfc3339", lambda _: "when it changed")
        add_event(poster)
        monkeypatch.setattr(event_poster, "rfc3339", lambda _: "later")
        async with posting(poster):
            await eventually(lambda: posts)

    asyncio.run(run())
    assert [event["firstTimestamp"] for event in posts] == ["when it changed"]


def test_an_event_waits_until_no_job_waits_for_a_worker() -> None:
    posts, waiting = Posts(), {"another job"}

    async def run() -> None:
        poster = poster_to(posts, lambda: bool(waiting))
        add_event(poster)
        async with posting(poster):
            await asyncio.sleep(5 * event_poster.POLL_SECONDS)
            assert posts == []
            waiting.clear()
            await eventually(lambda: posts)

    asyncio.run(run())


def test_an_event_does_not_wait_for_ever_if_jobs_always_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_poster, "LONGEST_WAIT_SECONDS", 0.3)
    posts = Posts()

    async def run() -> None:
        poster = poster_to(posts, lambda: True)
        add_event(poster)
        async with posting(poster):
            await eventually(lambda: posts)

    asyncio.run(run())


def test_in_a_burst_of_jobs_the_events_follow_the_last_ray_job() -> None:
    """The operator is behind until the last jobs have their workers."""
    names = [f"job-{number:02}" for number in range(40)]

    async def run() -> list[str]:
        api = MemoryApi()
        for name in names:
            api.add(job(name))
        async with operated(api, Settings(concurrency=2)):
            await eventually(lambda: len(starts(api)) == len(names))
        return [request.path for request in api.requests if request.method in ("POST", "PATCH")]

    paths = asyncio.run(run())
    ray_jobs = [number for number, path in enumerate(paths) if path.startswith(RAY_JOBS)]
    events = [number for number, path in enumerate(paths) if "/events/" in path]
    assert sum(number < ray_jobs[-3] for number in events) == 0


@pytest.mark.parametrize("why", ["the output stays", "an attempt starts"])
def test_an_operator_that_stops_while_jobs_wait_for_a_worker_has_posted_the_events(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """What an event reports is stored, or the job is gone: no later operator posts the event."""
    monkeypatch.setattr(Queue, "is_behind", property(lambda _: True))
    path = f"{JOBS}/tuned"

    async def run() -> MemoryApi:
        api, body = MemoryApi(), job("tuned")
        if why == "the output stays":
            body["spec"]["output"]["deletionPolicy"] = "Delete"
            api.fault = lambda asked: (
                (422, "no Job is admitted")
                if asked.method == "POST" and asked.path.endswith("/tuned-erase")
                else None
            )
        api.add(body)
        async with operated(api) as operator:
            await eventually(lambda: f"{RAY_JOBS}/tuned-1" in api.objects)
            if why == "the output stays":
                stamp = {"deletionTimestamp": "2030-01-01T00:00:00Z"}
                api.change(path, metadata={**api.objects[path]["metadata"], **stamp})
                await eventually(lambda: path not in api.objects)
            await asyncio.sleep(0.2)
            assert operator.reconciler.queue.is_behind
        return api

    api = asyncio.run(run())
    posted = {each.body["reason"] for each in api.requests if "/events/" in each.path}
    assert posted >= {"OutputLeft" if why == "the output stays" else "AttemptStarted"}


def starts(api: MemoryApi) -> list[Object]:
    events = (request.body for request in api.requests if "/events/" in request.path)
    return [event for event in events if event["reason"] == "AttemptStarted"]


@asynccontextmanager
async def posting(poster: EventPoster) -> AsyncIterator[None]:
    """Run the poster."""
    running = asyncio.create_task(poster.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
