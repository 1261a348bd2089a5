"""A job with the name of a deleted job gets nothing of it: RayJob, pods, posts or series."""

from __future__ import annotations

import asyncio
import copy
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.controller.memory import (
    CONFIG_MAPS,
    JOBS,
    PODS,
    POLICIES,
    RAY_JOBS,
    MemoryApi,
    Object,
    Operator,
    eventually,
    job,
    key,
    operated,
    pod,
)
from tuneyard.api.progress import Post
from tuneyard.controller import job_cache, metrics
from tuneyard.controller.cluster import ApiError
from tuneyard.controller.job_cache import JobCache
from tuneyard.controller.reconciler import Reconciler, Versions
from tuneyard.controller.settings import Settings
from tuneyard.rendering.names import UID_LABEL
from tuneyard.status import observed

ROOT = Path(__file__).resolve().parents[2]
PATH, RAY_JOB = f"{JOBS}/tuned", f"{RAY_JOBS}/tuned-1"
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "c"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
KILLED = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}


def success(step: int = 100) -> Post:
    outcome = {"state": "Succeeded", "result": {"uri": "pvc://models/tuned/result"}}
    report = {"attempt": 1, "stage": "sft", "step": step, "totalSteps": 100, "outcome": outcome}
    status = {"progressPercentage": step, "metrics": [{"name": "loss", "value": 0.5}]}
    return Post.model_validate({"trainerStatus": status, "tuneyard": report})


def phase(api: MemoryApi) -> Any:
    return api.status("tuned").get("phase")


def attempts(api: MemoryApi) -> list[Object]:
    return api.status("tuned").get("attempts") or []


async def running(api: MemoryApi, operator: Operator) -> None:
    """Proceed to a first attempt that runs."""
    await eventually(lambda: RAY_JOB in api.objects)
    api.change(RAY_JOB, status=RUNNING)
    api.add(pod(api.objects[RAY_JOB], "head"))
    await eventually(lambda: attempts(api)[-1].get("runningAt"))


def replace_job(api: MemoryApi, operator: Operator, *, seen: bool) -> None:
    """Remove the job with force and create another with its name; its objects stay for a while.
    `seen`: the watches report the deletion."""
    api.on_change = operator.see if seen else lambda _, __: None
    api.remove(PATH)
    api.on_change = operator.see
    api.add(job("tuned"))


def collect(api: MemoryApi, *collections: str) -> None:
    """Remove the objects of collections, as the garbage collector does."""
    for collection in collections:
        for name in api.names(collection):
            api.remove(f"{collection}/{name}")


async def settled(api: MemoryApi, operator: Operator) -> None:
    """Let the operator handle the job several times."""
    for _ in range(5):
        operator.reconciler.queue.add(key("tuned"))
        await asyncio.sleep(0.05)


def test_an_outcome_of_the_deleted_job_does_not_end_the_new_one() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
            old = api.uid(PATH) or ""
            operator.reconciler.accept_post(key("tuned"), old, success(7))
            collect(api, PODS, RAY_JOBS, CONFIG_MAPS)
            replace_job(api, operator, seen=False)
            await eventually(lambda: RAY_JOB in api.objects)
            api.change(RAY_JOB, status=RUNNING)
            operator.reconciler.accept_post(key("tuned"), old, success())
            await eventually(lambda: phase(api) == "Running")
            await settled(api, operator)
            assert (phase(api), api.status("tuned").get("progress")) == ("Running", None)
            operator.reconciler.accept_post(key("tuned"), api.uid(PATH) or "", success())
            await eventually(lambda: phase(api) == "Succeeded")

    asyncio.run(run())


def test_a_rayjob_of_the_deleted_job_is_neither_adopted_nor_counted() -> None:
    """The watch has not reported it yet, so the operator does not know it."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
            old = api.uid(RAY_JOB)
            collect(api, PODS, CONFIG_MAPS)
            api.on_change = lambda _, __: None
            api.change(RAY_JOB, status=SUCCEEDED)
            api.remove(PATH)
            operator.reconciler.cache.jobs.clear()
            api.on_change = operator.see
            api.add(job("tuned"))
            await eventually(lambda: api.uid(RAY_JOB) not in (None, old))
            await settled(api, operator)
            (owner,) = api.objects[RAY_JOB]["metadata"]["ownerReferences"]
            assert owner["uid"] == api.uid(PATH)
            assert (phase(api), len(attempts(api))) == ("Pending", 1)

    asyncio.run(run())


@pytest.mark.parametrize("is_listed", [True, False])
def test_pods_of_a_deleted_job_that_no_watch_has_reported_yet_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, *, is_listed: bool
) -> None:
    """After a restart of the operator, the jobs' watch may be quicker than the pods' watch."""

    async def unavailable(_: Reconciler) -> Versions:
        raise ApiError(500, "InternalError", "slow")

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
        collect(api, RAY_JOBS)
        (head,) = api.names(PODS)
        replaced = {**job("tuned"), "spec": api.objects[PATH]["spec"]}
        api.remove(PATH)
        unseen = api.objects.pop(f"{PODS}/{head}")
        if not is_listed:
            monkeypatch.setattr(Reconciler, "list_objects", unavailable)
        async with operated(api, Settings(namespaces=("team",))) as operator:
            api.objects[f"{PODS}/{head}"] = unseen
            api.add(replaced)
            await asyncio.sleep(0.5)
            assert RAY_JOB not in api.objects
            api.remove(f"{PODS}/{head}")
            operator.reconciler.queue.add(key("tuned"))
            await eventually(lambda: RAY_JOB in api.objects)

    asyncio.run(run())


def test_the_pods_of_the_deleted_job_are_waited_for_and_explain_nothing() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
            states = [{"name": "ray-worker", "state": KILLED}]
            old = api.add(pod(api.objects[RAY_JOB], "worker", containerStatuses=states))
            replace_job(api, operator, seen=True)
            collect(api, RAY_JOBS, CONFIG_MAPS)
            await settled(api, operator)
            assert RAY_JOB not in api.objects, "the old pods still exist"
            for role in ("head", "worker"):
                api.remove(f"{PODS}/tuned-1-{role}")
            await eventually(lambda: RAY_JOB in api.objects)
            await running(api, operator)
            operator.see(old)
            operator.see(old, True)
            await settled(api, operator)
            assert (phase(api), [each.get("reason") for each in attempts(api)]) == (
                "Running",
                [None],
            )

    asyncio.run(run())


def test_pods_of_a_deleted_job_are_looked_for_if_only_its_ray_job_was_known() -> None:
    """The pods' watch may be late while the operator runs, too."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api, Settings(namespaces=("team",))) as operator:
            await eventually(lambda: RAY_JOB in api.objects)
            api.on_change = lambda _, __: None
            head = api.add(pod(api.objects[RAY_JOB], "head"))["metadata"]["name"]
            replace_job(api, operator, seen=True)
            collect(api, RAY_JOBS, CONFIG_MAPS)
            await settled(api, operator)
            assert RAY_JOB not in api.objects
            api.remove(f"{PODS}/{head}")
            operator.reconciler.queue.add(key("tuned"))
            await eventually(lambda: RAY_JOB in api.objects)

    asyncio.run(run())


def test_pods_of_a_deleted_job_are_looked_for_after_its_ray_job_is_gone_too() -> None:
    """The pods' watch is late, and the others have reported both deletions before the new job."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api, Settings(namespaces=("team",))) as operator:
            await eventually(lambda: RAY_JOB in api.objects)
            await settled(api, operator)
            api.on_change = lambda _, __: None
            head = api.add(pod(api.objects[RAY_JOB], "head"))["metadata"]["name"]
            api.on_change = operator.see
            api.remove(PATH)
            await settled(api, operator)
            collect(api, RAY_JOBS, CONFIG_MAPS)
            await settled(api, operator)
            api.add(job("tuned"))
            await settled(api, operator)
            is_started = RAY_JOB in api.objects
            assert not is_started, "an attempt began beside a pod of the deleted job"
            api.remove(f"{PODS}/{head}")
            operator.reconciler.queue.add(key("tuned"))
            await eventually(lambda: RAY_JOB in api.objects)

    asyncio.run(run())


def test_a_listing_at_start_that_a_proxy_answers_by_404_does_not_count_as_no_pods() -> None:
    """`Cluster` takes such a 404 of an object for an error; only that of RayJobs has a meaning."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
        collect(api, RAY_JOBS)
        (head,) = api.names(PODS)
        api.remove(PATH)
        unseen = api.objects.pop(f"{PODS}/{head}")
        api.fault = lambda asked: (404, "404 page not found") if asked.path == PODS else None
        async with operated(api, Settings(namespaces=("team",))) as operator:
            await asyncio.sleep(0.5)
            api.objects[f"{PODS}/{head}"] = unseen
            api.fault = lambda _: None
            api.add(job("tuned"))
            await settled(api, operator)
            is_started = RAY_JOB in api.objects
            assert not is_started, "an attempt began beside a pod of the deleted job"

    asyncio.run(run())


@pytest.mark.parametrize("found", ["by the watch", "at the start"])
def test_a_job_that_waits_for_pods_that_nobody_deletes_says_so(found: str) -> None:
    """After an outage of the API server the garbage collector may miss the end of a RayCluster: its
    pods run on, and nothing marks them for deletion."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await eventually(lambda: RAY_JOB in api.objects)
            await settled(api, operator)
            api.on_change = operator.see if found == "by the watch" else lambda _, __: None
            api.add(pod(api.objects[RAY_JOB], "head"))
            replace_job(api, operator, seen=True)
            collect(api, RAY_JOBS, CONFIG_MAPS)
            await settled(api, operator)
            for hours in (1, 24):
                operator.late = timedelta(hours=hours)
                await settled(api, operator)
            assert RAY_JOB not in api.objects
            shown = [each["message"] for each in api.status("tuned")["conditions"]]
            assert "tuned-1-head" in str(shown), "nothing says what it has waited for since a day"

    asyncio.run(run())


def test_a_late_deletion_of_the_old_job_does_not_remove_the_new_one_from_the_cache() -> None:
    """kopf handles objects with different UIDs side by side."""
    api, cache = MemoryApi(), JobCache()
    old = api.add(job("tuned"))
    api.remove(PATH)
    new = api.add(job("tuned"))
    cache.update_job(key("tuned"), new)
    assert not cache.forget(key("tuned"), old["metadata"]["uid"])
    assert cache.job(key("tuned")).body == new
    assert cache.forget(key("tuned"), new["metadata"]["uid"])


def test_deleted_jobs_are_remembered_for_a_while_and_then_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = JobCache()
    for name in ("a", "b"):
        cache.forget(key(name))
    assert [cache.had_former(key(name)) for name in ("a", "b", "c")] == [True, True, False]
    monkeypatch.setattr(job_cache, "FORMER_SECONDS", 0.0)
    cache.forget(key("c"))
    assert [cache.had_former(key(name)) for name in ("a", "b", "c")] == [False, False, False]
    assert len(cache._deleted) <= 1


def test_the_series_of_the_deleted_job_end_when_a_new_one_has_its_name() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
            operator.reconciler.accept_post(key("tuned"), api.uid(PATH) or "", success(7))
            await eventually(lambda: _has_series())
            replace_job(api, operator, seen=False)
            await eventually(lambda: not _has_series())
            await settled(api, operator)
            assert not _has_series()

    asyncio.run(run())


def _has_series() -> bool:
    return any(
        sample.labels.get("name") == "tuned"
        for family in metrics.LOSS.collect()
        for sample in family.samples
    )


def test_the_objects_of_a_job_that_release_0_2_started_are_still_its_own() -> None:
    """Its RayJob names the job's UID as its owner; its pods do not name it."""

    async def run() -> None:
        api = MemoryApi()
        ray_job = json.loads((ROOT / "tests/releases/0.2.0/ray-job.json").read_text())
        ray_job["metadata"]["namespace"] = "team"
        body = json.loads((ROOT / "tests/releases/0.2.0/job-running.json").read_text())
        body["metadata"]["namespace"] = "team"
        body["status"]["attempts"][0]["rayJobUid"] = ray_job["metadata"]["uid"] = "ray-1"
        api.add(body)
        api.add({**ray_job, "status": RUNNING})
        api.add(pod(ray_job, "head"))
        async with operated(api) as operator:
            (post,) = [success()]
            operator.reconciler.accept_post(key("minimal"), "job-uid", post)
            await eventually(lambda: api.status("minimal")["phase"] == "Succeeded")
        assert [each["reason"] for each in api.status("minimal")["attempts"]] == ["Succeeded"]

    asyncio.run(run())


def test_a_pod_without_a_uid_is_its_jobs_unless_it_is_older_than_the_job() -> None:
    def created(time: str, **labels: str) -> Object:
        return {"metadata": {"name": "p", "creationTimestamp": time, "labels": labels}}

    def belongs(pod: Object, uid: str) -> bool:
        return observed.pod(pod).belongs_to(uid, "2030-01-01T00:00:01Z")

    early, late = created("2030-01-01T00:00:00Z"), created("2030-01-01T00:00:02Z")
    assert not belongs(early, "u")
    assert belongs(late, "u")
    labeled = created("2030-01-01T00:00:02Z", **{"tuneyard.io/job-uid": "other"})
    assert not belongs(labeled, "u")
    assert belongs(labeled, "other")


def test_a_rayjob_of_another_client_with_the_attempts_name_is_reported_and_left_alone() -> None:
    async def run() -> None:
        api = MemoryApi()
        foreign = {"name": "tuned-1", "namespace": "team"}
        api.add({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": foreign, "spec": {}})
        api.add(job("tuned"))
        before = api.uid(RAY_JOB)
        async with operated(api):
            await eventually(lambda: "already exists" in str(api.status("tuned")))
            assert "create the job under another name" in str(api.status("tuned"))
        assert api.uid(RAY_JOB) == before
        assert "ownerReferences" not in api.objects[RAY_JOB]["metadata"]

    asyncio.run(run())


@pytest.mark.parametrize("collection", [CONFIG_MAPS, POLICIES])
def test_objects_that_the_garbage_collector_left_of_a_deleted_job_keep_no_new_job_waiting(
    collection: str,
) -> None:
    """After an outage of the API server, the collector may never notice that the job is gone."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api, Settings(job_network_policies=True)) as operator:
            await running(api, operator)
            (name,) = api.names(collection)
            path = f"{collection}/{name}"
            former = copy.deepcopy(api.objects[path]["metadata"])
            collect(api, *{PODS, RAY_JOBS, CONFIG_MAPS, POLICIES} - {collection})
            replace_job(api, operator, seen=True)
            await running(api, operator)
            (owner,) = api.objects[path]["metadata"]["ownerReferences"]
            assert owner["uid"] == api.uid(PATH)
        (deletion,) = (
            each for each in api.requests if (each.method, each.path) == ("DELETE", path)
        )
        conditions = {"uid": former["uid"], "resourceVersion": former["resourceVersion"]}
        assert deletion.body["preconditions"] == conditions

    asyncio.run(run())


def test_a_replica_with_an_old_cache_does_not_delete_the_objects_of_the_new_job() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
        (name,) = api.names(CONFIG_MAPS)
        present = api.objects[f"{CONFIG_MAPS}/{name}"]
        stale = copy.deepcopy(present)
        stale["metadata"]["ownerReferences"][0]["uid"] = "of-the-former-job"
        with pytest.raises(ApiError, match="belongs to another owner"):
            await api.cluster.ensure(stale, is_new=False)
        assert api.objects[f"{CONFIG_MAPS}/{name}"] == present

    asyncio.run(run())


def test_an_object_that_another_object_owns_too_is_not_deleted_with_what_a_job_left() -> None:
    """The garbage collector deletes nothing that still has an owner."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
            (name,) = api.names(CONFIG_MAPS)
            path = f"{CONFIG_MAPS}/{name}"
            before = api.objects[path]
            other = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "viewer", "uid": "v"}
            owners = [*before["metadata"]["ownerReferences"], other]
            kept = {**before["metadata"], "ownerReferences": owners}
            former = api.change(path, metadata=kept)["metadata"]["uid"]
            collect(api, PODS, RAY_JOBS)
            replace_job(api, operator, seen=True)
            await eventually(lambda: RAY_JOB in api.objects or "exists" in str(api.status("tuned")))
            assert api.uid(path) == former, "it was deleted"

    asyncio.run(run())


def test_a_network_policy_of_another_client_with_the_jobs_name_is_reported_and_left_alone() -> None:
    async def run() -> None:
        api = MemoryApi()
        metadata = {"name": "tuned-pods", "namespace": "team"}
        own = {"podSelector": {"matchLabels": {"app": "bank"}}}
        foreign = api.add({"kind": "NetworkPolicy", "metadata": metadata, "spec": own})
        api.add(job("tuned"))
        async with operated(api, Settings(job_network_policies=True)):
            await eventually(lambda: "already exists" in str(api.status("tuned")))
        assert api.objects[f"{POLICIES}/tuned-pods"] == foreign
        assert "create the job under another name" in str(api.status("tuned"))

    asyncio.run(run())


def test_the_objects_that_an_operator_created_before_it_was_killed_are_used() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        refused = iter([(500, "")] * 2)
        api.fault = lambda asked: next(refused, None) if asked.path == RAY_JOB else None
        async with operated(api, Settings(job_network_policies=True)) as operator:
            await running(api, operator)
        assert (len(api.names(CONFIG_MAPS)), api.names(POLICIES)) == (1, ["tuned-pods"])

    asyncio.run(run())


@pytest.mark.parametrize("watch", ["late", "early"])
def test_a_driver_of_the_deleted_job_stops_and_its_outcome_is_not_the_new_jobs(watch: str) -> None:
    """`watch`: whether the operator knows the new job when the driver posts."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        async with operated(api) as operator:
            await running(api, operator)
            head = observed.pod(api.objects[f"{PODS}/tuned-1-head"])
            api.remove(f"{PODS}/tuned-1-head")
            api.remove(RAY_JOB)
            current = operator.reconciler.current
            found = await current(key("tuned"), head)
            assert found
            assert found.metadata.uid == api.uid(PATH)
            api.on_change = operator.see if watch == "early" else lambda _, __: None
            api.remove(PATH)
            api.add(job("tuned"))
            new = observed.pod({"metadata": {"name": "new", "labels": {UID_LABEL: api.uid(PATH)}}})
            if watch == "early":
                assert await current(key("tuned"), head) is None
            found = await current(key("tuned"), new)
            assert found
            assert found.metadata.uid == api.uid(PATH), "a pod of the new job never stops for it"

    asyncio.run(run())


def test_an_erasure_waits_for_a_config_map_of_another_owner_and_does_not_give_up() -> None:
    """An apply would be refused for good, and the output would stay."""

    async def run() -> None:
        api = MemoryApi()
        erased = job("tuned")
        erased["spec"]["output"]["deletionPolicy"] = "Delete"
        api.add(erased)
        async with operated(api) as operator:
            await running(api, operator)
            (name,) = api.names(CONFIG_MAPS)
            old = api.objects[f"{CONFIG_MAPS}/{name}"]
            owner = {"uid": "another owner", "controller": True}
            metadata = {**old["metadata"], "ownerReferences": [owner]}
            api.objects[f"{CONFIG_MAPS}/{name}"] = {**old, "metadata": metadata}
            collect(api, PODS)
            stamp = {"deletionTimestamp": "2030-01-01T00:00:00Z"}
            api.change(PATH, metadata={**api.objects[PATH]["metadata"], **stamp})
            await eventually(lambda: "already exists" in str(api.status("tuned")))
            assert PATH in api.objects
            collect(api, CONFIG_MAPS)
            path = "/apis/batch/v1/namespaces/team/jobs/tuned-erase"
            await eventually(lambda: path in api.objects)

    asyncio.run(run())


def test_an_erasure_of_the_deleted_job_does_not_count_for_the_new_one() -> None:
    async def run() -> None:
        api = MemoryApi()
        erased = job("tuned")
        erased["spec"]["output"]["deletionPolicy"] = "Delete"
        api.add(erased)
        path = "/apis/batch/v1/namespaces/team/jobs/tuned-erase"
        owner = {"kind": "FineTuneJob", "name": "tuned", "uid": "an earlier job"}
        metadata = {"name": "tuned-erase", "ownerReferences": [owner], "resourceVersion": "1"}
        done = {"conditions": [{"type": "Complete", "status": "True"}]}
        async with operated(api) as operator:
            await running(api, operator)
            api.objects[path] = {"metadata": {**metadata, "uid": "x"}, "status": done}
            api.remove(f"{PODS}/tuned-1-head")
            stamp = {"deletionTimestamp": "2030-01-01T00:00:00Z"}
            api.change(PATH, metadata={**api.objects[PATH]["metadata"], **stamp})
            await eventually(lambda: "belongs to another owner" in str(api.status("tuned")))
            await settled(api, operator)
            assert PATH in api.objects
            del api.objects[path]
            operator.reconciler.queue.add(key("tuned"))
            await eventually(lambda: path in api.objects)
            assert api.objects[path]["metadata"]["ownerReferences"][0]["uid"] == api.uid(PATH)

    asyncio.run(run())
