"""A work queue: each key is processed at most once at a time, now or after a delay.

It has the semantics of client-go's queue: adding a key that waits does nothing, and a key that is
added while it is processed is processed once more.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF, LAST_BACKOFF = 0.2, 60.0
"""Seconds before a failed key is retried, doubled each time, with a jitter of half."""
MOST_AFTER = 120.0
"""The longest delay, in seconds, that a server may ask for: a day would stop a job for a day."""


def backoff(failures: int, after: float | None) -> float:
    """Return the seconds before the next try, after so many failures in a row. `after`: the least
    delay that a server asks for; None: none."""
    wait = min(FIRST_BACKOFF * 2 ** min(failures - 1, 10), LAST_BACKOFF)
    return max(min(after or 0.0, MOST_AFTER), wait * random.uniform(0.5, 1.0))


class Queue(Generic[K]):
    """A work queue and its workers."""

    def __init__(self, work: Callable[[K], Awaitable[None]], workers: int) -> None:
        """Make a queue. `work` processes a key; it raises `Requeue` to retry the key, and nothing
        else."""
        self._work, self._workers = work, workers
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: set[K] = set()
        self._busy: set[K] = set()
        self._dirty: set[K] = set()
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = 0
        self._failures: dict[K, int] = {}
        self._earlier = asyncio.Event()

    @property
    def num_delays(self) -> int:
        """The number of delays in memory, superseded ones included."""
        return len(self._heap)

    @property
    def is_behind(self) -> bool:
        """Whether a key waits for a worker."""
        return bool(self._waiting)

    def add(self, key: K) -> None:
        """Process the key as soon as possible."""
        self._due.pop(key, None)
        if key in self._busy:
            self._dirty.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Process the key after so many seconds, or earlier if it is added for an earlier time."""
        if seconds <= 0:
            self.add(key)
            return
        due = asyncio.get_running_loop().time() + seconds
        if key in self._waiting or self._due.get(key, float("inf")) <= due:
            return
        self._due[key] = due
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, key))
        if len(self._heap) > 2 * len(self._due) + 64:
            # An entry that was superseded would stay until its time: for a week, with a TTL.
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        self._earlier.set()

    def forget(self, key: K) -> None:
        """Drop the key's delay and its failure count."""
        self._due.pop(key, None)
        self._failures.pop(key, None)

    async def run(self) -> None:
        """Work until canceled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._release_due())
            for _ in range(self._workers):
                tasks.create_task(self._worker())

    async def _worker(self) -> None:
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._busy.add(key)
            try:
                await self._work(key)
                self._failures.pop(key, None)
            except Requeue as requeue:
                self._retry(key, requeue.after)
            finally:
                self._busy.discard(key)
                if key in self._dirty:
                    self._dirty.discard(key)
                    self.add(key)

    def _retry(self, key: K, after: float | None) -> None:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        self.add_after(key, backoff(failures, after))

    async def _release_due(self) -> None:
        """Add the keys whose delay is over, until canceled."""
        loop = asyncio.get_running_loop()
        while True:
            self._earlier.clear()
            while self._heap and self._heap[0][0] <= loop.time():
                due, _, key = heapq.heappop(self._heap)
                if self._due.get(key) == due:
                    self.add(key)
            wait = self._heap[0][0] - loop.time() if self._heap else None
            # wait_for of Python 3.11 ignores a cancellation at the moment when the event is set.
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._earlier.wait()


class Requeue(Exception):  # noqa: N818 - a request, not an error
    """Raised to retry a key. `after`: the least delay in seconds; None: the backoff alone."""

    def __init__(self, after: float | None = None) -> None:
        self.after = after
        super().__init__(f"retry after {after} s")
