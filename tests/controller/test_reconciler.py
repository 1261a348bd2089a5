"""The reconciler when watch events arrive before the responses to its own requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from tuneyard.controller import reconciler as module
from tuneyard.controller.cluster import FINALIZER, Cluster, Key
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings

KEY = Key("FineTuneJob", "team", "job")
SPEC = {
    "model": {"uri": "pvc://models/base"},
    "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
    "output": {"uri": "pvc://models/tuned"},
}


class EarlyWatches:
    """A cluster of one job whose watch events arrive before the responses to its writes."""

    def __init__(self, settings: Settings | None = None, **metadata: Any) -> None:
        self.body: dict[str, Any] = {
            "apiVersion": "tuneyard.io/v1alpha1",
            "kind": KEY.kind,
            "metadata": {
                "name": KEY.name,
                "namespace": KEY.namespace,
                "uid": "u",
                "resourceVersion": "1",
                **metadata,
            },
            "spec": SPEC,
        }
        self.created: dict[str, dict[str, Any]] = {}
        self.statuses: list[dict[str, Any]] = []
        self.reconciler = Reconciler(cast("Cluster", self), settings or Settings())

    async def reconcile_until(
        self, condition: Callable[[], bool], *, then_seconds: float = 0.0
    ) -> None:
        running = asyncio.create_task(self.reconciler.run())
        self.reconciler.queue.add(KEY)
        try:
            async with asyncio.timeout(30):
                while not condition():
                    await asyncio.sleep(0.01)
            await asyncio.sleep(then_seconds)
            assert not running.done()
        finally:
            running.cancel()

    # ---- the interface of Cluster ---------------------------------------------------------------

    async def job(self, _: Key) -> dict[str, Any]:
        return self.body

    async def ray_jobs(self, _: Key) -> list[dict[str, Any]]:
        return list(self.created.values())

    async def pods(self, _: Key) -> list[dict[str, Any]]:
        return []

    async def apply(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["kind"] == "RayJob":
            stored = {**item, "metadata": {**item["metadata"], "uid": "r", "resourceVersion": "1"}}
            self.created[item["metadata"]["name"]] = stored
            self.reconciler.cache.update_ray_job(KEY, stored, deleted=False)
            self.reconciler.queue.add(KEY)
            return {"metadata": stored["metadata"]}
        return {"metadata": item["metadata"]}

    async def delete_ray_job(self, _: str, name: str) -> bool:
        self.reconciler.cache.update_ray_job(KEY, self.created.pop(name), deleted=True)
        return True

    async def write_status(self, body: Any, _: Key, __: Any, status: dict[str, Any]) -> Any:
        self.statuses.append(status)
        self.body = {**body, "status": status}
        return self.body

    async def add_finalizer(self, body: dict[str, Any], _: Key) -> dict[str, Any]:
        self.body = {**body, "metadata": {**body["metadata"], "finalizers": [FINALIZER]}}
        return self.body

    async def remove_finalizer(self, body: dict[str, Any], _: Key) -> dict[str, Any]:
        self.body = {**body, "metadata": {**body["metadata"], "finalizers": []}}
        return self.body

    async def post_event(self, *_: Any) -> None:
        pass

    async def warnings(self, *_: str) -> list[str]:
        return []


def ray_job(name: str) -> dict[str, Any]:
    labels = {"tuneyard.io/attempt": name[-1]}
    return {"metadata": {"name": name, "uid": name, "resourceVersion": "1", "labels": labels}}


def test_a_job_s_rayjobs_may_disappear_while_they_are_deleted_one_after_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def deleted() -> dict[str, Any]:
        deletion = {"deletionTimestamp": "2026-11-21T12:00:00Z", "finalizers": [FINALIZER]}
        cluster = EarlyWatches(**deletion)
        cluster.created = {name: ray_job(name) for name in ("job-1", "job-2", "job-3")}
        await cluster.reconcile_until(lambda: not cluster.body["metadata"]["finalizers"])
        return cluster.created

    assert asyncio.run(deleted()) == {}
    assert caplog.records == []  # a reconcile that fails is logged and retried


def test_the_uid_of_a_new_rayjob_waits_for_the_next_status_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a thousand new jobs, separate writes would be a thousand more."""
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.1)

    async def begun() -> list[dict[str, Any]]:
        cluster = EarlyWatches()
        await cluster.reconcile_until(lambda: bool(cluster.created), then_seconds=1)
        return cluster.statuses

    (status,) = asyncio.run(begun())
    assert [attempt["number"] for attempt in status["attempts"]] == [1]
    assert status["phase"] == "Pending"


def test_a_new_attempt_s_pods_trust_the_authorities_of_that_moment() -> None:
    """The authorities change while the operator runs."""

    async def begun() -> dict[str, Any]:
        cluster = EarlyWatches(Settings(progress_url="https://operator:8443"))
        cluster.reconciler.trust("the old and the new authority")
        await cluster.reconcile_until(lambda: bool(cluster.created))
        return cluster.created["job-1"]

    template = asyncio.run(begun())["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    env = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
    assert env["TUNEYARD_CA"] == "the old and the new authority"
