"""The Lease on a clock that jumps to the next event, and the end of the active replica."""

from __future__ import annotations

import asyncio
import copy
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from tuneyard.controller import app
from tuneyard.controller.cluster import ApiError, Cluster
from tuneyard.controller.lease import LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, Lease
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings

Object = dict[str, Any]
HOUR, ROUNDING = 3600.0, 1e-6


class Jumps(selectors.DefaultSelector):
    """Instead of waiting for a time, the clock jumps there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumps = Jumps()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(main())


def now() -> float:
    return asyncio.get_running_loop().time()


class Leases:
    """An API server with one Lease."""

    def __init__(self) -> None:
        self.lease_: Object | None = None
        self.read_seconds = self.write_seconds = 0.0
        """How long the responses take; a write is stored at once."""
        self.error: ApiError | None = None
        self.sent_at: list[float] = []
        """When the writes that succeeded arrived."""

    async def lease(self, *_: str) -> Object | None:
        await asyncio.sleep(self.read_seconds)
        if self.error:
            raise self.error
        return copy.deepcopy(self.lease_)

    async def put_lease(self, _: str, __: str, lease: Object) -> Object:
        if self.error:
            raise self.error
        at, version = now(), lease["metadata"].get("resourceVersion", "0")
        if self.lease_ and self.lease_["metadata"]["resourceVersion"] != version:
            raise ApiError(409, "Conflict", "the Lease has changed")
        metadata = {**lease["metadata"], "resourceVersion": str(int(version) + 1)}
        self.lease_ = {**lease, "metadata": metadata}
        await asyncio.sleep(self.write_seconds)
        self.sent_at.append(at)
        return copy.deepcopy(self.lease_)

    def replica(self, identity: str) -> Lease:
        return Lease(cast("Cluster", self), "team", "operator", identity)


def test_a_lease_whose_requests_hang_is_given_up_in_time() -> None:
    async def scenario() -> None:
        leases = Leases()
        lease = leases.replica("one")
        await lease.acquire()
        leases.read_seconds = leases.write_seconds = HOUR
        await lease.renew()
        assert now() - leases.sent_at[-1] <= RENEW_SECONDS + ROUNDING

    run(scenario)


@pytest.mark.parametrize("slow", ["the first", "a later"])
def test_a_renewal_counts_from_when_it_was_sent_and_not_from_its_response(slow: str) -> None:
    async def scenario() -> None:
        leases = Leases()
        lease = leases.replica("one")
        leases.write_seconds = 3.0 if slow == "the first" else 0.0
        await lease.acquire()
        renewing = asyncio.ensure_future(lease.renew())
        leases.write_seconds = 3.0
        if slow == "a later":
            while len(leases.sent_at) < 3:
                await asyncio.sleep(0.1)
        leases.error = ApiError(503, "ServiceUnavailable", "no response")
        await renewing
        assert now() - leases.sent_at[-1] <= RENEW_SECONDS + ROUNDING

    run(scenario)


def test_a_holder_that_cannot_renew_gives_up_before_another_replica_takes_over() -> None:
    async def scenario() -> None:
        leases = Leases()
        one, two = leases.replica("one"), leases.replica("two")
        await one.acquire()
        taking = asyncio.ensure_future(two.acquire())
        renewing = asyncio.ensure_future(one.renew())
        await asyncio.sleep(RENEW_SECONDS)
        one._cluster = cast("Cluster", Leases())
        one._cluster.error = ApiError(0, "NoAnswer", "")  # type: ignore[attr-defined]
        await renewing
        gave_up = now()
        await taking
        assert now() - gave_up >= LEASE_SECONDS - RENEW_SECONDS - RETRY_SECONDS

    run(scenario)


def test_one_hanging_request_or_error_does_not_lose_the_lease() -> None:
    async def scenario() -> None:
        leases = Leases()
        lease = leases.replica("one")
        await lease.acquire()
        renewing = asyncio.ensure_future(lease.renew())
        for _ in range(5):
            leases.read_seconds = HOUR
            await asyncio.sleep(RETRY_SECONDS + 0.1)
            leases.read_seconds = 0.0
            leases.error = ApiError(503, "ServiceUnavailable", "no response")
            await asyncio.sleep(0.5)
            leases.error = None
            await asyncio.sleep(2 * RENEW_SECONDS)
            assert not renewing.done()
        renewing.cancel()

    run(scenario)


def test_a_holder_stops_when_it_reads_that_another_replica_holds_the_lease() -> None:
    async def scenario() -> None:
        leases = Leases()
        lease = leases.replica("one")
        await lease.acquire()
        assert leases.lease_
        leases.lease_["spec"]["holderIdentity"] = "two"
        await lease.renew()
        assert leases.lease_["spec"]["holderIdentity"] == "two"

    run(scenario)


# ---- the end of the active replica --------------------------------------------------------------


class Writer:
    """A reconciler that writes without end."""

    def __init__(self, active: asyncio.Event) -> None:
        self.num_writes = 0
        self.wrote_while_standby = False
        self._active = active

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write())

    async def _write(self) -> None:
        while True:
            try:
                await asyncio.sleep(0.1)
            finally:
                self.num_writes += 1
                self.wrote_while_standby |= not self._active.is_set()


@pytest.mark.parametrize("end", ["the Lease is lost", "a signal", "the watches end"])
def test_nothing_is_written_after_the_active_replica_has_ended(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    watching = asyncio.Event()

    async def watch(*_: Any) -> None:
        await watching.wait()

    monkeypatch.setattr(app, "_watch", watch)
    monkeypatch.setattr(app, "Resync", lambda writer: writer)

    async def scenario() -> None:
        leases, stop, active = Leases(), asyncio.Event(), asyncio.Event()
        writer = Writer(active)
        leading = asyncio.ensure_future(
            app._run_as_leader(
                cast("Cluster", leases), Settings(), cast("Reconciler", writer), stop, active
            )
        )
        await asyncio.sleep(60)
        assert active.is_set()
        assert writer.num_writes
        if end == "a signal":
            stop.set()
        elif end == "the watches end":
            watching.set()
        else:
            leases.error = ApiError(503, "ServiceUnavailable", "no response")
        assert await leading == (0 if end == "a signal" else 1)
        num_writes = writer.num_writes
        assert not active.is_set()
        await asyncio.sleep(60)
        assert writer.num_writes == num_writes

    run(scenario)
