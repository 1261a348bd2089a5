"""Post the events of jobs. No reconcile waits for an event; events wait for reconciles."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from tuneyard.api.meta import API_VERSION
from tuneyard.controller.cluster import MANAGER, ApiError, Cluster, Key, Object
from tuneyard.status.events import Event
from tuneyard.status.times import rfc3339

MOST_WAITING = 10_000
"""Events beyond this number are dropped, so that a slow API server does not fill the memory."""
NUM_POSTED_AT_ONCE = 2
LONGEST_WAIT_SECONDS = 10.0
"""How long an event waits while jobs wait for a worker: in a burst of new jobs, their RayJobs come
first, and events would be one write in four."""
POLL_SECONDS = 0.1
CLOSING_SECONDS = 5.0
"""How long an operator that stops may post events; another replica gets the Lease after that."""

log = logging.getLogger("tuneyard")


class EventPoster:
    """The events that wait to be posted."""

    def __init__(self, cluster: Cluster, is_busy: Callable[[], bool]) -> None:
        """Make a poster without events. `is_busy`: whether jobs wait for a worker."""
        self._cluster, self._is_busy = cluster, is_busy
        self._waiting = asyncio.Queue[tuple[float, Object]]()

    def add(self, key: Key, job: Object, event: Event) -> None:
        """Post an event once no job waits for a worker, or after LONGEST_WAIT_SECONDS. `job`: the
        version of the job that it is about, of which nothing large is kept."""
        if self._waiting.qsize() >= MOST_WAITING:
            log.warning("the event queue is full: dropped event %s of %s", event.reason, key.name)
            return
        due = time.monotonic() + LONGEST_WAIT_SECONDS
        self._waiting.put_nowait((due, _event(key, job["metadata"], event)))

    async def run(self) -> None:
        """Post events until canceled; then post those that wait, for CLOSING_SECONDS at most: no
        later operator knows of them."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(NUM_POSTED_AT_ONCE):
                    tasks.create_task(self._post_waiting())
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSING_SECONDS):
                    await asyncio.gather(*(self._post_rest() for _ in range(NUM_POSTED_AT_ONCE)))

    async def post(self, key: Key, job: Object, event: Event) -> None:
        """Post an event at once: nothing else tells what it reports. An event that the API server
        refuses is logged. Raises ApiError if it may be accepted later."""
        await self._post(_event(key, job["metadata"], event), is_tried_again=True)

    async def _post_waiting(self) -> None:
        while True:
            due, event = await self._waiting.get()
            try:
                while self._is_busy() and time.monotonic() < due:
                    await asyncio.sleep(POLL_SECONDS)
                await self._post(event)
            except asyncio.CancelledError:
                self._waiting.put_nowait((due, event))
                raise

    async def _post_rest(self) -> None:
        while not self._waiting.empty():
            _, event = self._waiting.get_nowait()
            await self._post(event)

    async def _post(self, event: Object, *, is_tried_again: bool = False) -> None:
        """Post an event; log why it was refused. Raises ApiError if it `is_tried_again` and may be
        accepted then."""
        regarding = event["involvedObject"]
        try:
            await self._cluster.post_event(regarding["namespace"], event)
        except ApiError as error:
            if error.code == 409:  # it was posted before
                return
            if is_tried_again and not error.is_refusal:
                raise
            if error.code != 404:
                name = regarding["name"]
                log.warning("event %s of %s was refused: %s", event["reason"], name, error)


def _event(key: Key, metadata: Object, event: Event) -> Object:
    """Return the Event object of a change that was made now. Its name is a hash of content and job
    version, so that a repeated post creates no second event."""
    now = rfc3339(datetime.now(UTC))
    content = f"{metadata['uid']} {metadata['resourceVersion']} {event.reason} {event.message}"
    regarding = {
        "apiVersion": API_VERSION,
        "kind": key.kind,
        "namespace": key.namespace,
        "name": key.name,
        "uid": metadata["uid"],
    }
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{key.name}.{hashlib.sha256(content.encode()).hexdigest()[:16]}",
            "namespace": key.namespace,
        },
        "involvedObject": regarding,
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
