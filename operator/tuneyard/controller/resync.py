"""The resync: one paginated listing of each kind, in case a watch missed an event.

kopf does not report objects that were deleted while it reconnected, and a proxy can hold a dead
connection open. The listings contain metadata alone. Only of a job whose objects differ from the
cache are the objects themselves read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

from tuneyard.controller.cluster import ApiError
from tuneyard.controller.reconciler import ObjectId, Reconciler, Versions

OBJECTS_SECONDS = 60.0
"""How often RayJobs, Jobs and pods are listed."""
JOBS_SECONDS = 600.0
"""How often jobs are listed."""
LEAST_PAUSE = 20
"""A pause between two listings is at least so many times as long as the listing itself."""
LAG_SECONDS = 5.0
"""How late a watch event may come before the resync counts it as missed."""

log = logging.getLogger("tuneyard")


class Resync:
    """Compare the cache with the cluster from time to time."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    async def run(self) -> None:
        """Work until canceled."""
        jobs_at = time.monotonic() + JOBS_SECONDS
        pause = OBJECTS_SECONDS
        while True:
            await asyncio.sleep(pause)
            began = time.monotonic()
            try:
                await self.check_objects()
                if began >= jobs_at:
                    await self._reconciler.check_existence()
                    jobs_at = began + JOBS_SECONDS
            except ApiError as error:
                log.warning("the jobs and their objects could not be listed: %s", error)
            took = time.monotonic() - began
            pause = max(OBJECTS_SECONDS, LEAST_PAUSE * (took - LAG_SECONDS))

    async def check_objects(self) -> None:
        """Read the objects of each job that a watch has missed an event of. Raises ApiError."""
        before, listed = self._cached(), await self._reconciler.list_objects()
        suspects = _missed(before, listed)
        if not suspects:
            return
        await asyncio.sleep(LAG_SECONDS)
        now = self._cached()
        for key in {
            what[0]
            for what in suspects
            if now.get(what, -1) == before.get(what, -1)  # no watch has reported a change meanwhile
        }:
            await self._reconciler.read(key)
            self._reconciler.queue.add(key)

    def _cached(self) -> Versions:
        return dict(self._each_cached())

    def _each_cached(self) -> Iterator[tuple[ObjectId, int]]:
        for key, cached in self._reconciler.cache.jobs.items():
            for collection, items in cached.collections.items():
                for name, (number, _) in items.items():
                    yield (key, collection, name), number


def _missed(cached: Versions, listed: Versions) -> set[ObjectId]:
    """Return the objects that are newer in the listing, or in one of the two alone."""
    newer = {what for what, number in listed.items() if number > cached.get(what, -1)}
    return newer | (cached.keys() - listed.keys())
