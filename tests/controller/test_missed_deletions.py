"""Deletions that no watch reported: nothing of a deleted object stays in memory or in metrics."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from tests.controller.scene import Scene
from tests.controller.test_job_cache import ray_job as cached_ray_job
from tests.controller.test_reconciler import KEY, EarlyWatches
from tuneyard.api.status import JobStatus, Progress
from tuneyard.controller import cluster as requests
from tuneyard.controller import metrics, resync
from tuneyard.controller.cluster import ApiError, Key
from tuneyard.controller.job_cache import MOST_DELETED_PODS, JobCache
from tuneyard.controller.queue import Queue
from tuneyard.controller.watch import Watches

LABELS = (KEY.namespace, KEY.kind, KEY.name)
SUCCEEDED = {
    "phase": "Succeeded",
    "planDigest": "sha256:0",
    "attempts": [
        {
            "number": 1,
            "rayJob": "job-1",
            "startedAt": "2026-11-21T12:00:00Z",
            "finishedAt": "2026-11-21T13:00:00Z",
            "reason": "Succeeded",
        }
    ],
    "conditions": [
        {
            "type": "Succeeded",
            "status": "True",
            "reason": "Succeeded",
            "lastTransitionTime": "2026-11-21T13:00:00Z",
        }
    ],
}


def measure() -> None:
    """Set a training series of the job."""
    now = "2026-01-01T00:00:00Z"
    progress = Progress(stage="sft", step=1, total_steps=4, percentage=25, last_updated_time=now)
    metrics.set_progress(LABELS, JobStatus(progress=progress))


def series() -> list[str]:
    """Return the names of the job's series."""
    return [
        sample.name
        for family in metrics.REGISTRY.collect()
        for sample in family.samples
        if sample.labels.get("name") == KEY.name
    ]


class Missed(EarlyWatches):
    """A cluster whose job was deleted without an event."""

    exists = False

    async def job(self, _: Key) -> Any:
        return self.body if self.exists else None

    async def jobs(self, kind: str, _: str | None) -> set[Key]:
        return {KEY} if self.exists and kind == KEY.kind else set()

    async def write_status(self, *_: Any) -> Any:
        raise ApiError(404, "NotFound", "the job does not exist")


def test_a_deleted_job_is_forgotten_with_its_series_at_the_next_listing() -> None:
    async def scenario() -> None:
        cluster = Missed()
        measure()
        cache = cluster.reconciler.cache
        cache.count_phase(KEY, "Succeeded")  # an idle job: only its phase is known
        await cluster.reconciler.check_existence()
        running = asyncio.create_task(cluster.reconciler.run())
        async with asyncio.timeout(30):
            while cache.known_jobs():
                await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(scenario())
    assert series() == []


def test_a_job_that_exists_is_not_read_again_by_the_listing() -> None:
    async def scenario() -> None:
        cluster = Missed()
        cluster.exists = True
        cluster.reconciler.cache.job(KEY).body = cluster.body
        await cluster.reconciler.check_existence()
        assert cluster.reconciler.cache.job(KEY).body == cluster.body

    asyncio.run(scenario())


def test_a_status_write_to_a_deleted_job_ends_its_reconciles() -> None:
    async def scenario() -> None:
        cluster = Missed()
        cluster.reconciler.cache.job(KEY).body = cluster.body
        await cluster.reconcile_until(lambda: not cluster.reconciler.cache.known_jobs())

    asyncio.run(scenario())


def test_a_finished_job_is_evicted_with_its_series_though_its_last_pod_went_unreported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resync, "LAG_SECONDS", 0.0)

    async def scenario() -> None:
        cluster = EarlyWatches()
        cluster.body["status"] = SUCCEEDED
        cache = cluster.reconciler.cache
        cache.update_pod(KEY, cached_ray_job(1), deleted=False)
        measure()
        assert series()
        await resync.Resync(cluster.reconciler).check_objects()
        await cluster.reconcile_until(lambda: KEY not in cache.jobs)

    asyncio.run(scenario())
    assert series() == []


def test_a_change_of_a_finished_job_whose_pods_still_exist_is_seen() -> None:
    cluster = EarlyWatches()
    cache, watches = cluster.reconciler.cache, Watches(cluster.reconciler)
    cluster.body |= {"kind": KEY.kind, "status": SUCCEEDED}
    cache.update_job(KEY, cluster.body)
    cache.update_pod(KEY, cached_ray_job(1), deleted=False)
    version = str(int(cluster.body["metadata"]["resourceVersion"]) + 1)
    changed = copy.deepcopy(cluster.body)
    changed["metadata"]["resourceVersion"] = version
    changed["spec"]["runPolicy"] = {"ttlSecondsAfterFinished": 0}
    watches.job(changed, deleted=False)
    body = cache.job(KEY).body or {}
    assert body["metadata"]["resourceVersion"] == version


def test_deleted_pods_are_kept_of_one_attempt_and_up_to_a_number() -> None:
    cache = JobCache()
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}

    def lose(name: str, attempt: str) -> None:
        pod = cached_ray_job(9, containerStatuses=[{"name": "ray-worker", "state": ended}])
        pod["metadata"] |= {"name": name, "labels": {"tuneyard.io/attempt": attempt}}
        cache.update_pod(KEY, pod, deleted=True)

    for number in range(3 * MOST_DELETED_PODS):
        lose(f"pod-{number}", "1")
    assert len(cache.job(KEY).deleted_pods) == MOST_DELETED_PODS
    lose("newest", "2")
    assert list(cache.job(KEY).deleted_pods) == ["newest"]


def test_delays_that_were_superseded_take_no_memory() -> None:
    """A finished job with a TTL of a week may be annotated every second."""

    async def scenario() -> int:
        async def work(_: str) -> None: ...

        queue: Queue[str] = Queue(work, workers=1)
        for _ in range(10_000):
            queue.add_after("job", 7 * 86400)
            queue.forget("job")
        return queue.num_delays

    assert asyncio.run(scenario()) < 200


@pytest.mark.apiserver
def test_jobs_are_listed_by_name_page_by_page(
    new_scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "LIST_CHUNK", 2)
    scene: Scene = new_scene("listed")
    names = {scene.create(f"job-{number}").name for number in range(5)}

    async def listed() -> set[Key]:
        configuration = Configuration()
        await config.load_kube_config(str(scene.kubeconfig), client_configuration=configuration)
        cluster = requests.Cluster(ApiClient(configuration))
        try:
            return await cluster.jobs("FineTuneJob", scene.namespace)
        finally:
            await cluster.close()

    assert asyncio.run(listed()) == {Key("FineTuneJob", scene.namespace, name) for name in names}
