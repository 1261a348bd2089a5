"""Events that wait for a slow API server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.controller.memory import Object, job, key
from tuneyard.controller import event_poster
from tuneyard.controller.cluster import Cluster
from tuneyard.controller.event_poster import EventPoster
from tuneyard.status.events import Event


def test_an_event_that_waits_has_the_time_of_its_change(monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[Object] = []

    async def post_event(_: str, event: Object) -> None:
        posted.append(event)

    async def run() -> None:
        poster = EventPoster(cast("Cluster", SimpleNamespace(post_event=post_event)))
        body: Any = job("tuned")
        body["metadata"] |= {"uid": "u", "resourceVersion": "1"}
        monkeypatch.setattr(event_poster, "rfc3339", lambda _: "when it changed")
        poster.add(key("tuned"), body, Event("Normal", "Running", "attempt 1 runs"))
        monkeypatch.setattr(event_poster, "rfc3339", lambda _: "later")
        running = asyncio.create_task(poster.run())
        while not posted:
            await asyncio.sleep(0)
        running.cancel()

    asyncio.run(run())
    assert [event["firstTimestamp"] for event in posted] == ["when it changed"]
