"""The reconciler against a cluster in memory: early watch events, finalizers and deletions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from tuneyard.controller import resync, write_budget
from tuneyard.controller.cluster import FINALIZER, Cluster, Key
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings
from tuneyard.controller.watch import Watches
from tuneyard.manifests.manifest import parse
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.names import plan_digest
from tuneyard.rendering.placement import placed
from tuneyard.status.observed import LOST_SECONDS

KEY = Key("FineTuneJob", "team", "job")
SPEC = {
    "model": {"uri": "pvc://models/base"},
    "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
    "output": {"uri": "pvc://models/tuned"},
}
ERASED = {**SPEC, "output": {**SPEC["output"], "deletionPolicy": "Delete"}}
"""A job whose output is erased with it."""
NOW = "2026-11-21T12:00:00Z"
RELEASE = Path(__file__).parents[1] / "releases" / "0.2.0"


class EarlyWatches:
    """A cluster of one job whose watch events arrive before the responses to its writes."""

    def __init__(
        self,
        spec: dict[str, Any] | None = None,
        status: Any = None,
        *,
        settings: Settings | None = None,
        **metadata: Any,
    ) -> None:
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
            "spec": spec or SPEC,
            **({"status": status} if status else {}),
        }
        self.erase_job: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []
        self.stored_pods: list[dict[str, Any]] = []
        self.created: dict[str, dict[str, Any]] = {}
        self.statuses: list[dict[str, Any]] = []
        self.finalizer_writes: list[list[str]] = []
        self.reconciler = Reconciler(cast("Cluster", self), settings or Settings())

    async def reconcile_until(
        self, condition: Callable[[], bool], *, then_seconds: float = 0.0, add: bool = True
    ) -> None:
        """Run the reconciler until the condition holds. `add`: the job is in the queue."""
        running = asyncio.create_task(self.reconciler.run())
        if add:
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

    async def preparations(self, _: Key) -> list[dict[str, Any]]:
        return []

    async def pods(self, _: Key) -> list[dict[str, Any]]:
        return self.stored_pods

    async def list_objects(self, collection: str, _: str | None) -> AsyncIterator[dict[str, Any]]:
        found = {"pods": self.stored_pods, "rayjobs": list(self.created.values())}
        for item in found.get(collection, []):
            yield item

    async def batch_job(self, *_: str) -> dict[str, Any] | None:
        return self.erase_job

    async def config_map(self, *_: str) -> dict[str, Any]:
        plan = placed(plan_job(parse(self.body)), profiles={})
        return {"data": {"plan.json": plan.to_json()}}

    async def ensure(self, item: dict[str, Any], **_: Any) -> None:
        if item["kind"] == "Job":
            self.erase_job = {**item, "metadata": {**item["metadata"], "creationTimestamp": NOW}}

    async def create(self, item: dict[str, Any]) -> dict[str, Any]:
        stored = {**item, "metadata": {**item["metadata"], "uid": "r", "resourceVersion": "1"}}
        self.created[item["metadata"]["name"]] = stored
        self.reconciler.cache.update_ray_job(KEY, stored, deleted=False)
        self.reconciler.queue.add(KEY)
        return {"metadata": stored["metadata"]}

    async def delete_ray_job(self, _: str, name: str, **__: str) -> bool:
        self.reconciler.cache.update_ray_job(KEY, self.created.pop(name), deleted=True)
        return True

    async def write_status(self, body: Any, _: Key, __: Any, status: dict[str, Any]) -> Any:
        self.statuses.append(status)
        self.body = {**body, "status": status}
        return self.body

    async def add_finalizer(self, body: dict[str, Any], _: Key) -> dict[str, Any]:
        return self._set_finalizers([FINALIZER], body)

    async def remove_finalizer(self, body: dict[str, Any], _: Key) -> dict[str, Any]:
        return self._set_finalizers([], body)

    def _set_finalizers(self, names: list[str], body: dict[str, Any]) -> dict[str, Any]:
        self.finalizer_writes.append(names)
        self.body = {**body, "metadata": {**body["metadata"], "finalizers": names}}
        return self.body

    async def post_event(self, _: str, event: dict[str, Any]) -> None:
        self.events.append(event)

    async def warnings(self, *_: str) -> list[str]:
        return []


def ray_job(name: str) -> dict[str, Any]:
    labels = {"tuneyard.io/attempt": name[-1]}
    return {"metadata": {"name": name, "uid": name, "resourceVersion": "1", "labels": labels}}


def deleted_job(*, attempts: int = 1, spec: dict[str, Any] = ERASED) -> EarlyWatches:
    """Return the cluster of a deleted job with a finalizer."""
    status: dict[str, Any] = {"phase": "Running", "conditions": [], "stages": []}
    status["attempts"] = [
        {"number": number + 1, "rayJob": f"job-{number + 1}", "startedAt": NOW}
        for number in range(attempts)
    ]
    cluster = EarlyWatches(spec, status, deletionTimestamp=NOW, finalizers=[FINALIZER])
    status["planDigest"] = plan_digest(placed(plan_job(parse(cluster.body)), profiles={}))
    return cluster


def test_a_job_s_rayjobs_may_disappear_while_they_are_deleted_one_after_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def deleted() -> dict[str, Any]:
        cluster = deleted_job()
        cluster.created = {name: ray_job(name) for name in ("job-1", "job-2", "job-3")}
        await cluster.reconcile_until(lambda: cluster.erase_job is not None)
        return cluster.created

    assert asyncio.run(deleted()) == {}
    assert caplog.records == []  # a reconcile that fails is logged and retried


def test_the_uid_of_a_new_rayjob_waits_for_the_next_status_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a thousand new jobs, separate writes would be a thousand more."""
    monkeypatch.setattr(write_budget, "UID_SECONDS", 0.1)

    async def begun() -> list[dict[str, Any]]:
        cluster = EarlyWatches()
        await cluster.reconcile_until(lambda: bool(cluster.created), then_seconds=1)
        return cluster.statuses

    (status,) = asyncio.run(begun())
    assert [attempt["number"] for attempt in status["attempts"]] == [1]
    assert status["phase"] == "Pending"


# ---- the finalizer ------------------------------------------------------------------------------


def test_a_job_whose_output_stays_gets_no_finalizer() -> None:
    """Kubernetes' garbage collector removes its objects; a finalizer would block its namespace and
    the removal of the operator."""

    async def begun() -> EarlyWatches:
        cluster = EarlyWatches()
        await cluster.reconcile_until(lambda: bool(cluster.created), then_seconds=0.2)
        return cluster

    assert asyncio.run(begun()).finalizer_writes == []


def test_a_job_whose_output_is_erased_has_the_finalizer_before_its_first_attempt() -> None:
    async def begun() -> EarlyWatches:
        cluster = EarlyWatches(ERASED)
        await cluster.reconcile_until(lambda: bool(cluster.statuses))
        return cluster

    assert asyncio.run(begun()).finalizer_writes == [[FINALIZER]]


@pytest.mark.parametrize("moment", ["running", "suspended", "succeeded"])
def test_the_finalizer_that_a_release_put_on_every_job_is_removed(moment: str) -> None:
    async def upgraded() -> EarlyWatches:
        stored = json.loads((RELEASE / f"job-{moment}.json").read_text(encoding="utf-8"))
        names = {"name": KEY.name, "namespace": KEY.namespace, "finalizers": [FINALIZER]}
        cluster = EarlyWatches(stored["spec"], stored["status"])
        cluster.body["metadata"] |= {**stored["metadata"], **names}
        Watches(cluster.reconciler).job(cluster.body, deleted=False)
        await cluster.reconcile_until(lambda: bool(cluster.finalizer_writes), add=False)
        return cluster

    assert asyncio.run(upgraded()).finalizer_writes == [[]]


def test_a_finished_job_keeps_the_finalizer_that_its_output_needs() -> None:
    stored = json.loads((RELEASE / "job-succeeded.json").read_text(encoding="utf-8"))

    async def kept() -> EarlyWatches:
        cluster = EarlyWatches(ERASED, stored["status"], finalizers=[FINALIZER], generation=1)
        await cluster.reconcile_until(
            lambda: KEY not in cluster.reconciler.cache.jobs, then_seconds=0.1
        )
        return cluster

    assert asyncio.run(kept()).finalizer_writes == []


def test_a_deleted_job_of_a_release_goes_at_once_if_its_output_stays() -> None:
    """Its RayJob and pods are left to the garbage collector, even on a node that is lost."""

    async def deleted() -> EarlyWatches:
        cluster = deleted_job(spec=SPEC)
        cluster.created = {"job-1": ray_job("job-1")}
        await cluster.reconcile_until(lambda: bool(cluster.finalizer_writes))
        return cluster

    cluster = asyncio.run(deleted())
    assert cluster.finalizer_writes == [[]]
    assert list(cluster.created) == ["job-1"]


def test_a_new_job_waits_for_the_objects_of_a_deleted_job_of_its_name() -> None:
    async def reused() -> list[Any]:
        cluster = EarlyWatches()
        cache = cluster.reconciler.cache
        cache.update_job(KEY, cluster.body)
        old = ray_job("job-1")
        cache.update_ray_job(KEY, old, deleted=False)
        cache.forget(KEY)
        cluster.created = {"job-1": old}
        await cluster.reconcile_until(lambda: bool(cluster.statuses), then_seconds=0.1)
        return [status.get("attempts") for status in cluster.statuses]

    assert asyncio.run(reused())[0] == [], "the name of its first RayJob is taken"


def test_a_deleted_job_is_dropped_from_the_cache_although_a_watch_missed_its_last_pod(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resync, "LAG_SECONDS", 0.0)

    async def missed() -> None:
        cluster = EarlyWatches()
        cache, body = cluster.reconciler.cache, cluster.body
        cache.update_job(KEY, body)
        cache.update_pod(KEY, pod(0), deleted=False)
        cluster.body = cast("Any", None)
        Watches(cluster.reconciler).job(body, deleted=True)
        assert KEY in cache.jobs, "a new job of its name waits for the pod"
        await resync.Resync(cluster.reconciler).check_objects()
        await cluster.reconcile_until(lambda: KEY not in cache.jobs, add=False)

    asyncio.run(missed())


# ---- a deletion that waits ----------------------------------------------------------------------


def before(seconds: float) -> str:
    moment = datetime(2026, 11, 21, 13, tzinfo=UTC) - timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def pod(deleted_seconds_ago: float) -> dict[str, Any]:
    labels = {"tuneyard.io/attempt": "1", "ray.io/node-type": "worker"}
    metadata = {"name": "job-1-worker", "labels": labels, "resourceVersion": "1"}
    metadata["deletionTimestamp"] = before(deleted_seconds_ago)
    return {"metadata": metadata, "spec": {"nodeName": "node-7"}, "status": {"phase": "Running"}}


def waiting_deletion(cluster: EarlyWatches) -> EarlyWatches:
    """Fix the reconciler's clock at one hour after the deletion."""
    cluster.reconciler.clock = lambda: datetime(2026, 11, 21, 13, tzinfo=UTC)
    return cluster


def test_a_deletion_says_what_it_waits_for_and_since_when() -> None:
    async def deleted() -> EarlyWatches:
        cluster = waiting_deletion(deleted_job())
        cluster.stored_pods = [pod(LOST_SECONDS - 1)]
        await cluster.reconcile_until(lambda: bool(cluster.events), then_seconds=0.2)
        return cluster

    cluster = asyncio.run(deleted())
    (status,) = cluster.statuses
    (condition,) = status["conditions"]
    assert (condition["type"], condition["status"], condition["reason"]) == (
        *("Running", "False", "Deleting"),
    )
    assert f"waiting since {NOW} for job-1-worker on node node-7" in condition["message"]
    assert [event["reason"] for event in cluster.events] == ["Deleting"]
    assert cluster.erase_job is None
    assert cluster.finalizer_writes == []


def test_a_deletion_goes_on_without_the_pods_of_a_lost_node() -> None:
    async def deleted() -> EarlyWatches:
        cluster = waiting_deletion(deleted_job())
        cluster.stored_pods = [pod(LOST_SECONDS + 1)]
        await cluster.reconcile_until(lambda: cluster.erase_job is not None)
        return cluster

    assert asyncio.run(deleted()).finalizer_writes == []


@pytest.mark.parametrize("type_", ["Failed", "FailureTarget"])
def test_an_erasure_that_takes_too_long_ends_and_the_event_says_that_the_output_is_left(
    type_: str,
) -> None:
    """With a pod on a lost node, a Job has FailureTarget and never Failed."""

    async def deleted() -> EarlyWatches:
        cluster = waiting_deletion(deleted_job())
        await cluster.reconcile_until(lambda: cluster.erase_job is not None)
        assert cluster.finalizer_writes == []
        assert cluster.erase_job
        message = "Job was active longer than specified deadline"
        condition = {"type": type_, "status": "True", "message": message}
        cluster.erase_job["status"] = {"conditions": [condition]}
        cluster.statuses.clear()
        await cluster.reconcile_until(lambda: bool(cluster.finalizer_writes), then_seconds=0.1)
        return cluster

    cluster = asyncio.run(deleted())
    assert cluster.finalizer_writes == [[]]
    left = [event["message"] for event in cluster.events if event["reason"] == "OutputLeft"]
    assert left == [
        "the output at pvc://models/tuned was not removed: Job was active longer than specified "
        "deadline"
    ]


def test_a_new_attempt_s_pods_trust_the_authorities_of_that_moment() -> None:
    """The authorities change while the operator runs."""

    async def begun() -> dict[str, Any]:
        cluster = EarlyWatches(settings=Settings(progress_url="https://operator:8443"))
        cluster.reconciler.trust("the old and the new authority")
        await cluster.reconcile_until(lambda: bool(cluster.created))
        return cluster.created["job-1"]

    template = asyncio.run(begun())["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    env = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
    assert env["TUNEYARD_CA"] == "the old and the new authority"
