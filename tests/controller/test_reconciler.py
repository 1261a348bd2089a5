"""What watches tell while the operator waits for an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from tuneyard.controller.cluster import FINALIZER, Cluster, Key
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings

KEY = Key("FineTuneJob", "team", "job")


class Quick:
    """A cluster whose watches tell of each deletion before the answer to it comes."""

    def __init__(self) -> None:
        self.there = {f"job-{n}": ray_job(f"job-{n}") for n in (1, 2, 3)}
        self.reconciler = Reconciler(cast("Cluster", self), Settings())
        self.released = asyncio.Event()

    async def job(self, key: Key) -> dict[str, Any]:
        metadata = {
            "name": key.name,
            "namespace": key.namespace,
            "resourceVersion": "1",
            "deletionTimestamp": "2026-11-21T12:00:00Z",
            "finalizers": [FINALIZER],
        }
        return {"apiVersion": "tuneyard.io/v1alpha1", "kind": key.kind, "metadata": metadata}

    async def ray_jobs(self, _: Key) -> list[dict[str, Any]]:
        return list(self.there.values())

    async def pods(self, _: Key) -> list[dict[str, Any]]:
        return []

    async def delete_ray_job(self, _: str, name: str) -> bool:
        self.reconciler.world.see_ray_job(KEY, self.there.pop(name), deleted=True)
        return True

    async def remove_finalizer(self, body: Mapping[str, Any], _: Key) -> Mapping[str, Any]:
        self.released.set()
        return body


def ray_job(name: str) -> dict[str, Any]:
    labels = {"tuneyard.io/attempt": name[-1]}
    return {"metadata": {"name": name, "uid": name, "resourceVersion": "1", "labels": labels}}


def test_a_job_s_clusters_may_go_while_they_are_deleted_one_after_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def deleted() -> dict[str, Any]:
        cluster = Quick()
        running = asyncio.create_task(cluster.reconciler.run())
        cluster.reconciler.queue.add(KEY)
        try:
            await asyncio.wait_for(cluster.released.wait(), timeout=30)
        finally:
            running.cancel()
        return cluster.there

    assert asyncio.run(deleted()) == {}
    assert caplog.records == []  # a look that fails is tried again, and logged
