"""Leader election by a Lease (coordination.k8s.io/v1), as Kubernetes' own controllers do it.

The client library has a leader election too, but its LeaseLock cannot create a Lease (kubernetes
37.0: its own validation refuses `pretty=True`), and it cannot release one.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

from tuneyard.controller.cluster import ApiError, Cluster, Object

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15.0, 10.0, 2.0
"""A holder renews every 2 s and gives up 10 s after it sent its last renewal that succeeded; others
take over 15 s after the last renewal that they observed, by their own clock."""
TRY_SECONDS = RENEW_SECONDS / 2
"""Limit of one try, so that a connection that hangs leaves time for another try."""

log = logging.getLogger("tuneyard")


class Lease:
    """The Lease as this replica acquires, renews and releases it."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self._identity = identity
        self._observed: Object | None = None
        """The spec as last read."""
        self._observed_at = 0.0
        """When that spec was read for the first time (the event loop's time)."""
        self._renewed_at = 0.0
        """When the last renewal that succeeded was sent (the event loop's time)."""

    async def acquire(self) -> None:
        """Wait until this replica holds the Lease."""
        while not await self._try_acquire():
            await asyncio.sleep(RETRY_SECONDS)

    async def renew(self) -> None:
        """Renew the Lease until it is lost: until another replica holds it, or RENEW_SECONDS after
        the last renewal that succeeded was sent."""
        try:
            while not self._is_taken:
                async with asyncio.timeout_at(self._renewed_at + RENEW_SECONDS):
                    await self._renew_once()
        except TimeoutError:
            log.warning("Lease %s: not renewed within %.0f s", self._name, RENEW_SECONDS)

    async def _renew_once(self) -> None:
        """Return after a renewal, or when another replica holds the Lease."""
        await asyncio.sleep(RETRY_SECONDS)
        while not (await self._try_acquire() or self._is_taken):
            await asyncio.sleep(RETRY_SECONDS)

    async def release(self) -> None:
        """Release the Lease, so that the next replica starts at once."""
        try:
            lease = await self._cluster.lease(self._namespace, self._name)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": None, "leaseDurationSeconds": 1}
                await self._cluster.put_lease(self._namespace, self._name, lease)
        except ApiError as error:
            log.warning("the Lease could not be released: %s", error)

    async def _try_acquire(self) -> bool:
        """Take or renew the Lease; return False if another replica holds it or the cluster does not
        respond."""
        try:
            async with asyncio.timeout(TRY_SECONDS):
                lease = await self._cluster.lease(self._namespace, self._name)
                if lease is not None and not self._is_free(lease["spec"]):
                    return False
                sent = _now()
                renewed = self._renewed(lease)
                stored = await self._cluster.put_lease(self._namespace, self._name, renewed)
        except (ApiError, TimeoutError) as error:
            if not (isinstance(error, ApiError) and error.code == 409):
                log.warning("Lease %s: %s", self._name, str(error) or "no response")
            return False
        self._observe(stored["spec"])
        self._renewed_at = sent
        return True

    @property
    def _is_taken(self) -> bool:
        """Whether another replica held the Lease when it was last read."""
        return (self._observed or {}).get("holderIdentity") not in (self._identity, None)

    def _is_free(self, spec: Object) -> bool:
        self._observe(spec)
        holder = spec.get("holderIdentity")
        if not holder or holder == self._identity:
            return True
        return _now() - self._observed_at > float(spec.get("leaseDurationSeconds") or 0)

    def _observe(self, spec: Object) -> None:
        if spec != self._observed:
            self._observed, self._observed_at = spec, _now()

    def _renewed(self, lease: Object | None) -> Object:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        lease = lease or {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
        }
        spec = dict(lease.get("spec") or {})
        if spec.get("holderIdentity") != self._identity:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        spec |= {
            "holderIdentity": self._identity,
            "renewTime": now,
            "leaseDurationSeconds": int(LEASE_SECONDS),
        }
        return {**lease, "spec": spec}


def _now() -> float:
    return asyncio.get_running_loop().time()
