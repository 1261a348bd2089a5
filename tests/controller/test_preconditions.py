"""Every deletion names the version that was observed, so that a replica whose cache is old deletes
nothing that its successor created."""

from __future__ import annotations

import asyncio
import copy

from tests.controller.memory import (
    JOBS,
    RAY_JOBS,
    MemoryApi,
    Object,
    eventually,
    job,
    key,
    operated,
)

PATH, FIRST, SECOND = f"{JOBS}/tuned", f"{RAY_JOBS}/tuned-1", f"{RAY_JOBS}/tuned-2"
NOW = "2030-01-01T00:00:00Z"


def second(api: MemoryApi) -> Object:
    """Return a RayJob of attempt 2."""
    metadata = copy.deepcopy(api.objects[FIRST]["metadata"])
    for name in ("uid", "resourceVersion", "creationTimestamp"):
        del metadata[name]
    metadata["labels"]["tuneyard.io/attempt"] = "2"
    return {**api.objects[FIRST], "metadata": {**metadata, "name": "tuned-2"}}


def deletions(api: MemoryApi) -> list[Object]:
    return [request.body for request in api.requests if request.method == "DELETE"]


def test_a_replica_with_an_old_cache_does_not_delete_its_successors_rayjob() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await eventually(lambda: FIRST in api.objects)
            await eventually(lambda: api.status("tuned").get("attempts"))
            orphan = copy.deepcopy(second(api))
            orphan["metadata"] |= {"uid": "an orphan", "resourceVersion": "99"}
            api.on_change = lambda _, __: None
            # The successor has closed attempt 1, removed its RayJob and started attempt 2.
            api.add(second(api))
            api.remove(FIRST)
            status = api.status("tuned")
            (attempt,) = status["attempts"]
            closed = {**attempt, "finishedAt": NOW, "reason": "WorkerLost"}
            started = {"number": 2, "rayJob": "tuned-2", "startedAt": NOW}
            api.change(PATH, status={**status, "attempts": [closed, started]})
            uid = api.uid(SECOND)
            operator.see(orphan)
            await eventually(lambda: deletions(api))
            await asyncio.sleep(1)
            assert api.uid(SECOND) == uid

    asyncio.run(run())


def test_a_rayjob_that_changed_is_deleted_after_a_new_look() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await eventually(lambda: FIRST in api.objects)
            api.on_change = lambda _, __: None
            observed = copy.deepcopy(api.add(second(api)))
            api.change(SECOND, status={"jobDeploymentStatus": "Initializing"})
            operator.see(observed)
            await eventually(lambda: SECOND not in api.objects)
        versions = [each["preconditions"]["resourceVersion"] for each in deletions(api)]
        assert versions[0] == observed["metadata"]["resourceVersion"]
        assert len(versions) == 2, "the first one is a conflict"

    asyncio.run(run())


def test_a_job_that_changed_since_its_time_to_live_ended_is_not_deleted() -> None:
    """For example, somebody has set a longer time to live."""

    async def run() -> None:
        api = MemoryApi()
        body = job("tuned", ttlSecondsAfterFinished=1)
        condition = {"type": "Failed", "status": "True", "reason": "Canceled"}
        condition |= {"lastTransitionTime": "2020-01-01T00:00:00Z", "message": ""}
        failure = {"reason": "Canceled", "message": "", "advice": ""}
        body["status"] = {"phase": "Failed", "planDigest": "sha256:0", "failure": failure}
        body["status"]["conditions"] = [condition]
        stored = api.add(body)
        async with operated(api) as operator:
            operator.reconciler.cache.update_job(key("tuned"), copy.deepcopy(stored))
            api.on_change = lambda _, __: None
            policy = {"runPolicy": {"ttlSecondsAfterFinished": 10**9}}
            api.change(PATH, spec={**api.objects[PATH]["spec"], **policy})
            operator.reconciler.queue.add(key("tuned"))
            await eventually(lambda: deletions(api))
            await asyncio.sleep(0.5)
        assert PATH in api.objects
        (preconditions,) = (each["preconditions"] for each in deletions(api))
        assert set(preconditions) == {"uid", "resourceVersion"}

    asyncio.run(run())
