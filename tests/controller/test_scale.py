"""Many active jobs: few reads, a budget for progress writes, little memory for each job."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.controller.memory import (
    JOBS,
    LISTED_AT_START,
    NAMESPACE,
    PODS,
    PREPARATIONS,
    RAY_JOBS,
    MemoryApi,
    eventually,
    job,
    key,
    operated,
    pod,
)
from tests.controller.scene import outcome, post
from tuneyard.api.progress import Post
from tuneyard.controller import cluster as requests
from tuneyard.controller import metrics, reconciler, resync, watch, write_budget
from tuneyard.controller.job_cache import CachedJob, JobCache
from tuneyard.controller.review_limits import REVIEWS_PER_SECOND, review_seconds
from tuneyard.controller.settings import Settings
from tuneyard.controller.write_budget import Turns, WriteBudget, write_interval

TEAM = Settings(namespaces=(NAMESPACE,))
KINDS_READ = (JOBS, RAY_JOBS, PODS)
RUNNING = {"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}
MANAGED = [{"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:spec": {}}}]


def progress(step: int, stage: str = "sft", **report: Any) -> Post:
    return Post.model_validate(post(1, step, stage=stage, **report))


def collections_read(api: MemoryApi) -> list[str]:
    """Return the collections that were listed."""
    return [each.path for each in api.requests if each.method == "GET" and each.path in KINDS_READ]


def num_reconciles() -> float:
    samples = next(iter(metrics.RECONCILE_SECONDS.collect())).samples
    return next(each.value for each in samples if each.name.endswith("_count"))


def status_writes(api: MemoryApi, name: str) -> list[Any]:
    path = f"{JOBS}/{name}/status"
    return [each.body["status"] for each in api.requests if each.path == path]


async def start(api: MemoryApi, name: str) -> None:
    """Create a job and play its RayJob until it runs."""
    api.add(job(name))
    await eventually(lambda: f"{name}-1" in api.names(RAY_JOBS))
    ray_job = api.change(f"{RAY_JOBS}/{name}-1", status=RUNNING)
    api.add(pod(ray_job, "head"))


def deliver(operator: Any, name: str, report: Post) -> None:
    """Hand a post to the operator as a pod of the job's attempt does."""
    cached = operator.reconciler.cache.job(key(name))
    operator.reconciler.accept_post(key(name), cached.uid, report)


# ---- reads --------------------------------------------------------------------------------------


def test_an_active_job_is_reconciled_again_without_any_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconciler, "RECHECK_SECONDS", 0.05)

    async def run() -> MemoryApi:
        api = MemoryApi()
        async with operated(api) as operator:
            for name in ("one", "two", "three"):
                await start(api, name)
                deliver(operator, name, progress(1))
                await eventually(lambda n=name: api.status(n).get("progress"))
            api.add(job("held", suspend=True))
            await eventually(lambda: api.status("held").get("phase") == "Suspended")
            await asyncio.sleep(0.2)
            api.requests.clear()
            await asyncio.sleep(0.5)
        return api

    assert asyncio.run(run()).requests == []


def test_finished_jobs_that_are_to_be_deleted_later_are_not_read_when_the_operator_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = {"type": "Succeeded", "status": "True", "reason": "Succeeded", "message": ""}
    condition = {**ended, "lastTransitionTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    waits: dict[Any, float] = {}

    async def run() -> None:
        api = MemoryApi()
        for name in ("one", "two"):
            done = job(name, ttlSecondsAfterFinished=600)
            api.add({**done, "status": {"phase": "Succeeded", "planDigest": "sha256:0"}})
            status = {**api.status(name), "conditions": [condition]}
            api.change(f"{JOBS}/{name}", status=status)
        async with operated(api) as operator:
            queue = operator.reconciler.queue
            monkeypatch.setattr(queue, "add_after", waits.__setitem__)
            await eventually(lambda: len(waits) == 2)
            assert {each.path for each in api.requests} <= LISTED_AT_START
            assert operator.reconciler.cache.jobs == {}, "they need no memory"
            operator.late = timedelta(seconds=600)
            for name in waits:
                queue.add(name)
            await eventually(lambda: not api.names(JOBS))

    asyncio.run(run())
    assert all(0 < seconds <= 600 for seconds in waits.values())


def test_a_restarted_operator_reconciles_each_job_once_whatever_its_watches_report_first() -> None:
    async def run() -> list[float]:
        api = MemoryApi()
        async with operated(api):
            for name in ("a", "b", "c"):
                await start(api, name)
            await eventually(lambda: all(api.status(n).get("phase") == "Running" for n in "abc"))
        kinds = [[o for p, o in api.objects.items() if p.startswith(each)] for each in KINDS_READ]
        counts = []
        for order in itertools.permutations(kinds):
            api.requests.clear()
            before = num_reconciles()
            async with operated(api, TEAM, seen=False) as operator:
                for objects in order:
                    await asyncio.sleep(0.1)
                    for item in objects:
                        operator.see(item)
                await asyncio.sleep(0.4)
            counts.append(num_reconciles() - before)
            assert {each.path for each in api.requests} == {RAY_JOBS, PREPARATIONS, PODS}
        return counts

    assert asyncio.run(run()) == [3.0] * 6


def test_an_operator_that_starts_waits_for_no_object_that_has_gone_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconciler, "QUIET_SECONDS", 0.1)

    async def run() -> None:
        api = MemoryApi()
        async with operated(api):
            await start(api, "a")
        async with operated(api, TEAM, seen=False) as operator:
            await eventually(lambda: api.requests)
            operator.see(api.add(job("b")))
            await eventually(lambda: "b-1" in api.names(RAY_JOBS))

    asyncio.run(run())


def test_a_rayjob_whose_job_no_watch_reports_is_reconciled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "UNKNOWN_SECONDS", 0.1)

    async def run() -> None:
        api = MemoryApi()
        async with operated(api):
            await start(api, "a")
        async with operated(api, TEAM, seen=False) as operator:
            operator.see(api.change(f"{RAY_JOBS}/a-1", status={**RUNNING, "jobStatus": "FAILED"}))
            await eventually(lambda: api.status("a")["attempts"][0].get("finishedAt"))

    asyncio.run(run())


def test_the_resync_lists_each_kind_once_page_by_page_and_reads_no_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requests, "LIST_CHUNK", 2)
    monkeypatch.setattr(resync, "LAG_SECONDS", 0.0)

    async def run() -> MemoryApi:
        api = MemoryApi()
        async with operated(api) as operator:
            for number in range(5):
                await start(api, f"job-{number}")
            await asyncio.sleep(0.1)
            api.requests.clear()
            await of_namespace(operator.reconciler).check_objects()
        return api

    assert collections_read(asyncio.run(run())) == [RAY_JOBS] * 3 + [PODS] * 3


def of_namespace(found: reconciler.Reconciler) -> resync.Resync:
    """Return a resync that lists the namespace of the tests alone."""
    found.settings = type(found.settings)(namespaces=(NAMESPACE,))
    return resync.Resync(found)


@pytest.mark.parametrize(
    "change",
    [
        lambda api: api.remove(f"{RAY_JOBS}/two-1"),
        lambda api: api.change(f"{RAY_JOBS}/two-1", status={"jobStatus": "FAILED"}),
        lambda api: api.remove(f"{PODS}/two-1-head"),
    ],
    ids=["a RayJob is deleted", "a RayJob is changed", "a pod is deleted"],
)
def test_the_resync_reads_the_one_job_whose_watch_event_was_missed(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[MemoryApi], object]
) -> None:
    monkeypatch.setattr(resync, "LAG_SECONDS", 0.0)

    async def run() -> tuple[JobCache, MemoryApi, int]:
        api = MemoryApi()
        async with operated(api) as operator:
            for name in ("one", "two", "three"):
                await start(api, name)
            see, api.on_change = api.on_change, lambda _, __: None
            change(api)
            api.on_change = see
            api.requests.clear()
            read = itertools.count()
            original = operator.reconciler.read

            async def count(name: requests.Key) -> None:
                assert name == key("two")
                next(read)
                await original(name)

            monkeypatch.setattr(operator.reconciler, "read", count)
            await of_namespace(operator.reconciler).check_objects()
            return operator.reconciler.cache, api, next(read)

    cache, api, reads = asyncio.run(run())
    assert reads == 1
    known = cache.job(key("two"))
    stored = {path.rpartition("/")[2] for path in api.objects if "/two-1" in path}
    assert {*known.ray_jobs, *known.pods} == stored & {"two-1", "two-1-head"}
    assert (
        all(each.job_status != "RUNNING" for _, each in known.ray_jobs.values()) or known.pods == {}
    )


# ---- the budget of progress writes --------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_many_jobs_share_the_writes_of_a_second_and_each_gets_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(write_budget, "time", clock)
    running: dict[str, Any] = {"status": {"progress": {}, "stages": []}}
    budget, jobs = WriteBudget(2), [CachedJob() for _ in range(200)]
    for cached in jobs:
        cached.body = running
    written: list[tuple[float, int]] = []
    for _ in range(600):  # 300 s
        for number, cached in enumerate(jobs):
            if budget.wait_of_post(cached, progress(1)) == 0:
                written.append((clock.now, number))
                cached.written_at, cached.write_turn = clock.now, None
                cached.write_interval = 10.0
        clock.now += 0.5
    for second in range(300):
        of_second = [at for at, _ in written if second <= at - 1000 < second + 1]
        assert len(of_second) <= 3
    counts = [sum(1 for _, each in written if each == number) for number in range(200)]
    assert set(counts) <= {2, 3, 4}


def test_a_few_jobs_are_written_every_ten_seconds_and_long_ones_every_minute() -> None:
    assert [write_interval(seconds) for seconds in (0, 300, 900, 1800, 86400)] == [
        *(10.0, 10.0, 30.0, 60.0, 60.0)
    ]


def test_turns_are_apart_and_do_not_add_up_while_nobody_takes_them() -> None:
    turns = Turns(2)
    assert [turns.take(10.0) for _ in range(3)] == [10.0, 10.5, 11.0]
    assert [turns.take(20.0) for _ in range(2)] == [20.0, 20.5]


@pytest.mark.parametrize(
    ("name", "state", "is_news"),
    [
        ("prepare", "Skipped", False),
        ("prepare", "Pending", False),
        ("prepare", "Running", True),
        ("sft", "Running", False),
        ("sft", "Succeeded", True),
        ("unknown", "Running", False),
    ],
)
def test_a_post_waits_for_no_turn_only_if_it_changes_a_stage_of_the_status(
    name: str, state: str, *, is_news: bool
) -> None:
    """A later attempt reports the stages that an earlier one finished as skipped, in every post."""
    done = {"name": "prepare", "kind": "prepare", "state": "Succeeded"}
    trained = {"name": "sft", "kind": "sft", "state": "Running"}
    cached = CachedJob(write_interval=60.0, written_at=time.monotonic() - 20.0)
    cached.body = {"status": {"progress": {}, "stages": [done, trained]}}
    reported = progress(1, stages=[{"name": name, "kind": name, "state": state}])
    assert (WriteBudget(1).wait_of_post(cached, reported) == 0) == is_news


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """All turns of the next hour are taken."""
    monkeypatch.setattr(Turns, "take", lambda _, earliest: earliest + 3600)


@pytest.mark.usefixtures("spent")
def test_a_job_s_first_progress_waits_for_no_turn_and_its_next_one_does() -> None:
    async def run() -> MemoryApi:
        api = MemoryApi()
        async with operated(api) as operator:
            await start(api, "one")
            operator.reconciler.cache.job(key("one")).written_at = 0.0
            deliver(operator, "one", progress(1))
            await eventually(lambda: api.status("one").get("progress"))
            operator.reconciler.cache.job(key("one")).written_at = 0.0
            deliver(operator, "one", progress(2))
            await asyncio.sleep(0.3)
        return api

    assert asyncio.run(run()).status("one")["progress"]["step"] == 1


@pytest.mark.usefixtures("spent")
@pytest.mark.parametrize("moment", ["a stage", "a failure", "an outcome", "a suspension"])
def test_what_is_not_progress_is_written_while_all_turns_are_taken(moment: str) -> None:
    done = {"name": "prepare", "kind": "prepare", "state": "Succeeded"}

    async def run() -> None:
        api = MemoryApi()
        async with operated(api) as operator:
            await start(api, "one")
            cached = operator.reconciler.cache.job(key("one"))
            deliver(operator, "one", progress(1))
            await eventually(lambda: api.status("one").get("progress"))
            cached.written_at = 0.0  # long ago
            deliver(operator, "one", progress(2))
            match moment:
                case "a stage":
                    deliver(operator, "one", progress(2, stages=[done]))
                    await eventually(lambda: "Succeeded" in str(api.status("one")["stages"]))
                case "a failure":
                    api.change(f"{RAY_JOBS}/one-1", status={"jobStatus": "FAILED"})
                    await eventually(lambda: api.status("one")["attempts"][0].get("finishedAt"))
                case "an outcome":
                    ended = progress(2, outcome=outcome("Failed", "BadRow"))
                    deliver(operator, "one", ended)
                    await eventually(lambda: api.status("one")["phase"] == "Failed")
                case _:
                    spec = api.objects[f"{JOBS}/one"]["spec"]
                    api.change(f"{JOBS}/one", spec={**spec, "runPolicy": {"suspend": True}})
                    await eventually(lambda: "Stopping" in str(api.status("one")["conditions"]))

    asyncio.run(run())


def test_the_budget_is_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    monkeypatch.setattr(Turns, "__init__", lambda _, rate: taken.append(rate))
    reconciler.Reconciler(MemoryApi().cluster, reconciler.Settings(progress_writes=7))
    assert 7 in taken


# ---- reviews of tokens --------------------------------------------------------------------------


def test_the_reviews_of_many_tokens_stay_below_a_rate() -> None:
    assert review_seconds(100) == 60
    kept = [review_seconds(10_000) for _ in range(1000)]
    assert 0.9 < sum(10_000 / each for each in kept) / len(kept) / REVIEWS_PER_SECOND < 1.2
    assert max(kept) - min(kept) > 500, "the pods of a restarted operator must not stay in step"


# ---- memory -------------------------------------------------------------------------------------


def test_the_cache_keeps_no_managed_fields() -> None:
    async def run() -> None:
        api = MemoryApi()
        async with operated(api) as operator:
            cached = operator.reconciler.cache
            body = job("one")
            body["metadata"]["managedFields"] = MANAGED
            api.add(body)
            await eventually(lambda: "one-1" in api.names(RAY_JOBS))
            assert "managedFields" in api.objects[f"{JOBS}/one"]["metadata"]
            assert "managedFields" not in (cached.job(key("one")).body or {})["metadata"]
            read = await api.cluster.job(key("one"))
            assert read is not None
            assert "managedFields" not in read["metadata"]

    asyncio.run(run())
