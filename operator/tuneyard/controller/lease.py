"""One active replica, by a Lease (coordination.k8s.io/v1), as Kubernetes' own controllers do it.

The client library has a leader election too, but its LeaseLock cannot create a Lease (kubernetes
37.0: `pretty=True` is refused by its own validation), and it cannot give one back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

from tuneyard.controller.cluster import ApiError, Cluster, Object

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15.0, 10.0, 2.0
"""A holder renews every 2 s and gives up after 10 s without success; others wait 15 s from the last
renewal that they saw, by their own clock, before they take over."""

log = logging.getLogger("tuneyard")


class Lease:
    """This replica's side of the Lease."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self._identity = identity
        self._seen: Object | None = None
        """The spec as last seen."""
        self._seen_at = 0.0
        """When it was first seen so (monotonic)."""

    async def acquire(self) -> None:
        """Returns once this replica is the holder."""
        while not await self._try():
            await asyncio.sleep(RETRY_SECONDS)

    async def keep(self) -> None:
        """Renews; returns when the Lease is lost."""
        renewed = time.monotonic()
        while time.monotonic() - renewed < RENEW_SECONDS:
            await asyncio.sleep(RETRY_SECONDS)
            if await self._try():
                renewed = time.monotonic()
            elif self._seen and self._seen.get("holderIdentity") not in (self._identity, None):
                return

    async def give_back(self) -> None:
        """Lets the next replica start at once."""
        try:
            lease = await self._cluster.lease(self._namespace, self._name)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": None, "leaseDurationSeconds": 1}
                await self._cluster.put_lease(self._namespace, self._name, lease)
        except ApiError as error:
            log.warning("the Lease could not be given back: %s", error)

    async def _try(self) -> bool:
        """Takes or renews the Lease; false if somebody else holds it or the cluster is silent."""
        try:
            lease = await asyncio.wait_for(
                self._cluster.lease(self._namespace, self._name), RENEW_SECONDS
            )
            if lease is not None and not self._is_free(lease["spec"]):
                return False
            wanted = self._renewed(lease)
            stored = await asyncio.wait_for(
                self._cluster.put_lease(self._namespace, self._name, wanted), RENEW_SECONDS
            )
        except (ApiError, TimeoutError) as error:
            if not (isinstance(error, ApiError) and error.code == 409):
                log.warning("Lease %s: %s", self._name, error or "no answer")
            return False
        self._notice(stored["spec"])
        return True

    def _is_free(self, spec: Object) -> bool:
        self._notice(spec)
        holder = spec.get("holderIdentity")
        if not holder or holder == self._identity:
            return True
        return time.monotonic() - self._seen_at > float(spec.get("leaseDurationSeconds") or 0)

    def _notice(self, spec: Object) -> None:
        if spec != self._seen:
            self._seen, self._seen_at = spec, time.monotonic()

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
