"""Limits on the reviews of tokens, so that nobody can flood the API server through a status server.

A valid token costs one review a minute, or fewer with many pods. An invalid one is refused without
a review for a while. An address whose tokens were refused too often gets no review at all until
some time has passed, and never do more than a few reviews run at the same time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MOST_AT_ONCE, MOST_WAITING = 16, 512
"""Reviews at the same time, and posts that wait for one. With 10 ms for a review, 16 at once serve
1,600 new tokens a second; ten thousand pods need 170."""
REFUSALS_AT_ONCE, REFUSALS_PER_SECOND = 60, 1.0
"""Refused reviews that one address may cause at once and in the long run. Pods of one node may
share an address, and a node runs up to 110 pods."""
MOST_ADDRESSES = 4096
RETRY_SECONDS = 5
FIRST_REVIEW_SECONDS, REVIEWS_PER_SECOND = 60.0, 10.0
"""How long the review of a valid token is kept, and the reviews of known tokens per second that it
is kept longer for. With ten thousand pods, it is kept for 17 minutes."""


def review_seconds(num_tokens: int) -> float:
    """Return how long to keep a review while so many tokens are known. The times differ at random,
    because the pods of a restarted operator post all at once."""
    return max(FIRST_REVIEW_SECONDS, num_tokens / REVIEWS_PER_SECOND * random.uniform(0.5, 1.5))


class TooManyReviews(Exception):  # noqa: N818 - a response, not a defect
    """A token is not reviewed now."""


class Recent(Generic[K, V]):
    """A mapping whose entries expire, with a limit on their number: the oldest make room."""

    def __init__(
        self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """Return the value; None: there is none, or it has expired."""
        entry = self._entries.get(key)
        return entry[1] if entry and entry[0] > self._clock() else None

    def put(self, key: K, value: V, seconds: float | None = None) -> None:
        """Store a value, and drop what has expired or what is too much. `seconds` None: the time
        that holds for all entries."""
        now = self._clock()
        self._entries.pop(key, None)
        self._entries[key] = (now + (self._seconds if seconds is None else seconds), value)
        while len(self._entries) > self._most or next(iter(self._entries.values()))[0] <= now:
            self._entries.popitem(last=False)


class ReviewLimits:
    """The limits of one status server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._free = asyncio.Semaphore(MOST_AT_ONCE)
        self._num_waiting = 0
        self._clock = clock
        # An address without an entry has all of its refusals left, so an entry may expire.
        seconds = REFUSALS_AT_ONCE / REFUSALS_PER_SECOND
        self._refusals: Recent[str, tuple[float, float]] = Recent(MOST_ADDRESSES, seconds, clock)

    @asynccontextmanager
    async def review(self, address: str) -> AsyncIterator[None]:
        """Wait until a review may begin for a post from this address. Raises TooManyReviews."""
        self._check(address)
        if self._num_waiting >= MOST_WAITING:
            raise TooManyReviews("too many tokens are being reviewed")
        self._num_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._num_waiting -= 1
        try:
            self._check(address)  # others from this address may have been refused meanwhile
            yield
        finally:
            self._free.release()

    def count_refusal(self, address: str) -> None:
        """Count a refused token of this address."""
        self._refusals.put(address, (self._refused(address) + 1, self._clock()))

    def _check(self, address: str) -> None:
        if self._refused(address) >= REFUSALS_AT_ONCE:
            raise TooManyReviews(f"too many tokens from {address} were refused")

    def _refused(self, address: str) -> float:
        """Return the refusals of an address, of which time takes away one after the other."""
        number, at = self._refusals.get(address) or (0.0, 0.0)
        return max(0.0, number - (self._clock() - at) * REFUSALS_PER_SECOND)
