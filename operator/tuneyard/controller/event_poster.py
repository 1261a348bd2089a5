"""Post the events of jobs. No reconcile waits for an event; events wait for reconciles."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
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

log = logging.getLogger("tuneyard")


class EventPoster:
    """The events that wait to be posted."""

    def __init__(self, cluster: Cluster, is_busy: Callable[[], bool]) -> None:
        """Make a poster without events. `is_busy`: whether jobs wait for a worker."""
        self._cluster, self._is_busy = cluster, is_busy
        self._waiting = asyncio.Queue[tuple[float, Object]](MOST_WAITING)

    def add(self, key: Key, job: Object, event: Event) -> None:
        """Post an event once no job waits for a worker, or after LONGEST_WAIT_SECONDS. `job`: the
        version of the job that it is about, of which nothing large is kept."""
        if self._waiting.full():
            log.warning("the event queue is full: dropped event %s of %s", event.reason, key.name)
            return
        due = time.monotonic() + LONGEST_WAIT_SECONDS
        self._waiting.put_nowait((due, _event(key, job["metadata"], event)))

    async def run(self) -> None:
        """Post events until canceled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_POSTED_AT_ONCE):
                tasks.create_task(self._post())

    async def _post(self) -> None:
        while True:
            due, event = await self._waiting.get()
            while self._is_busy() and time.monotonic() < due:
                await asyncio.sleep(POLL_SECONDS)
            regarding = event["involvedObject"]
            try:
                await self._cluster.post_event(regarding["namespace"], event)
            except ApiError as error:
                if error.code not in (404, 409):
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
