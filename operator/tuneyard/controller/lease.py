"""Leader election by a Lease (coordination.k8s.io/v1), as Kubernetes' own controllers do it.

The client library has a leader election too, but its LeaseLock cannot create a Lease (kubernetes
37.0: its own validation refuses `pretty=True`), and it cannot release one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

from tuneyard.controller.cluster import ApiError, Cluster, Object

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15.0, 10.0, 2.0
"""A holder renews every 2 s and gives up after 10 s without success; others take
over 15 s after the last renewal that they observed, by their own clock."""

log = logging.getLogger("tuneyard")


class Lease:
    """The Lease as this replica acquires, renews and releases it."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self._identity = identity
        self._observed: Object | None = None
        """The spec as last read."""
        self._observed_at = 0.0
        """When that spec was read for the first time (monotonic)."""

    async def acquire(self) -> None:
        """Wait until this replica holds the Lease."""
        while not await self._try_acquire():
            await asyncio.sleep(RETRY_SECONDS)

    async def renew(self) -> None:
        """Renew the Lease until it is lost."""
        renewed = time.monotonic()
        while time.monotonic() - renewed < RENEW_SECONDS:
            await asyncio.sleep(RETRY_SECONDS)
            if await self._try_acquire():
                renewed = time.monotonic()
            elif self._observed and self._observed.get("holderIdentity") not in (
                self._identity,
                None,
            ):
                return

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
            lease = await asyncio.wait_for(
                self._cluster.lease(self._namespace, self._name), RENEW_SECONDS
            )
            if lease is not None and not self._is_free(lease["spec"]):
                return False
            renewed = self._renewed(lease)
            stored = await asyncio.wait_for(
                self._cluster.put_lease(self._namespace, self._name, renewed), RENEW_SECONDS
            )
        except (ApiError, TimeoutError) as error:
            if not (isinstance(error, ApiError) and error.code == 409):
                log.warning("Lease %s: %s", self._name, error or "no response")
            return False
        self._observe(stored["spec"])
        return True

    def _is_free(self, spec: Object) -> bool:
        self._observe(spec)
        holder = spec.get("holderIdentity")
        if not holder or holder == self._identity:
            return True
        return time.monotonic() - self._observed_at > float(spec.get("leaseDurationSeconds") or 0)

    def _observe(self, spec: Object) -> None:
        if spec != self._observed:
            self._observed, self._observed_at = spec, time.monotonic()

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
