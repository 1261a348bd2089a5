"""The Job that prepares the data of a job with GPUs: no RayJob, so no GPU pod, exists meanwhile.

The operator works on an API server in memory, and the tests act as Kubernetes' Job controller.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from tests.controller.memory import (
    CONFIG_MAPS,
    JOBS,
    PODS,
    POLICIES,
    PREPARATIONS,
    RAY_JOBS,
    MemoryApi,
    Object,
    Operator,
    Request,
    eventually,
    job,
    key,
    operated,
    preparing_pod,
)
from tests.planning.models import facts
from tuneyard.api.job_facts import Device, JobFacts
from tuneyard.api.progress import Post
from tuneyard.controller import reconciler
from tuneyard.controller.settings import Settings
from tuneyard.manifests.manifest import parse

JOB = f"{JOBS}/tuned"
PREPARATION = f"{PREPARATIONS}/tuned-1-prepare"
POD = f"{PODS}/tuned-1-prepare-abcde"
COMPLETE = {"conditions": [{"type": "Complete", "status": "True"}]}
FAILED = {
    "conditions": [{"type": "Failed", "status": "True", "message": "Job has reached the limit"}]
}
DONE = {"name": "prepare", "kind": "prepare", "state": "Succeeded"}
GIB = 1 << 30


def gpu_job(name: str = "tuned", gpu: str | None = None, **policy: Any) -> Object:
    """Return the manifest of a job whose workers have a GPU each."""
    made = job(name, **policy)
    made["spec"]["compute"] = {"workers": 2, "gpusPerWorker": 1} | ({"gpu": gpu} if gpu else {})
    return made


def play(
    scenario: Callable[[MemoryApi, Operator], Awaitable[None]],
    *jobs: Object,
    settings: Settings | None = None,
) -> MemoryApi:
    """Run a scenario with an operator and one job; return the server."""
    api = MemoryApi()

    async def run() -> None:
        for item in jobs or (gpu_job(),):
            api.add(item)
        async with operated(api, settings) as operator:
            await scenario(api, operator)

    asyncio.run(run())
    return api


async def prepare(api: MemoryApi, operator: Operator) -> None:
    """Let the pod of the Job run, and its driver post."""
    await eventually(lambda: PREPARATION in api.objects)
    api.add(preparing_pod(api.objects[PREPARATION]))
    post(operator, stages=[{**DONE, "state": "Running"}], stage="prepare")
    await eventually(lambda: attempt(api).get("preparingAt"))


def post(operator: Operator, **report: Any) -> None:
    value = {"attempt": 1, "preparing": True, **report}
    body = {"trainerStatus": {"progressPercentage": 3}, "tuneyard": value}
    cached = operator.reconciler.cache.job(key("tuned"))
    operator.reconciler.accept_post(key("tuned"), cached.uid, Post.model_validate(body))


def failure(reason: str, *, retryable: bool = False) -> Object:
    found = {"reason": reason, "message": f"it was {reason}"}
    return {"state": "Failed", "failure": found, "retryable": retryable}


def attempt(api: MemoryApi) -> Object:
    attempts: list[Object] = api.status("tuned").get("attempts") or [{}]
    return attempts[-1]


def phase(api: MemoryApi) -> str | None:
    return api.status("tuned").get("phase")


def writes(api: MemoryApi, path: str) -> list[Request]:
    found = [each for each in api.requests if each.path.startswith(path)]
    return [each for each in found if each.method not in ("GET", "WATCH")]


def test_no_ray_job_and_no_gpu_pod_exist_while_the_data_are_prepared() -> None:
    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        for hours in range(1, 4):
            operator.late = timedelta(hours=hours)
            operator.reconciler.queue.add(key("tuned"))
            await asyncio.sleep(0.1)
        assert (phase(api), api.names(RAY_JOBS)) == ("Preparing", [])
        assert "nvidia.com/gpu" not in str(api.objects[PREPARATION])
        post(operator, stages=[DONE])
        api.change(PREPARATION, status=COMPLETE)
        await eventually(lambda: api.names(RAY_JOBS) == ["tuned-1"])
        await eventually(lambda: api.names(PREPARATIONS) == [])
        worker = api.objects[f"{RAY_JOBS}/tuned-1"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert "nvidia.com/gpu" in str(worker)
        assert (phase(api), attempt(api)["number"]) == ("Pending", 1)
        assert attempt(api)["preparedAt"]
        assert "runningAt" not in attempt(api)

    api = play(scenario, gpu_job(startDeadlineSeconds=60))
    order = [each.path for each in api.requests if each.method == "POST"]
    created = [path for path in order if path.startswith((PREPARATIONS, RAY_JOBS))]
    assert created == [PREPARATION, f"{RAY_JOBS}/tuned-1"]


def test_the_job_is_the_attempt_s_own_and_has_the_right_of_its_plan_and_its_network() -> None:
    async def scenario(api: MemoryApi, _: Operator) -> None:
        await eventually(lambda: PREPARATION in api.objects)
        found = api.objects[PREPARATION]
        labels = found["spec"]["template"]["metadata"]["labels"]
        assert labels["tuneyard.io/attempt"] == "1"
        assert labels["tuneyard.io/job-uid"] == api.uid(JOB)
        assert found["metadata"]["ownerReferences"][0]["uid"] == api.uid(JOB)
        (policy,) = (api.objects[f"{POLICIES}/{name}"] for name in api.names(POLICIES))
        chosen = policy["spec"]["podSelector"]["matchLabels"]
        assert chosen.items() <= labels.items(), "the policy covers its pod"
        volumes = found["spec"]["template"]["spec"]["volumes"]
        (plan,) = (each["configMap"]["name"] for each in volumes if "configMap" in each)
        assert api.names(CONFIG_MAPS) == [plan]

    play(scenario, settings=Settings(job_network_policies=True))


def test_a_job_that_is_done_and_cannot_be_deleted_does_not_keep_the_ray_job_from_starting() -> None:
    def refused(request: Request) -> tuple[int, str] | None:
        is_delete = request.method == "DELETE" and request.path == PREPARATION
        return (403, "a policy forbids to delete Jobs") if is_delete else None

    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        api.fault = refused
        api.change(PREPARATION, status=COMPLETE)
        await eventually(lambda: api.names(RAY_JOBS) == ["tuned-1"])
        await eventually(lambda: sum(each.method == "DELETE" for each in api.requests) > 1)

    api = play(scenario)
    created = [each.path for each in api.requests if each.method == "POST"]
    assert created.count(f"{RAY_JOBS}/tuned-1") == 1


def test_a_job_without_gpus_is_prepared_by_its_workers() -> None:
    async def scenario(api: MemoryApi, _: Operator) -> None:
        await eventually(lambda: api.names(RAY_JOBS))
        assert writes(api, PREPARATIONS) == []

    play(scenario, job("tuned"))


def test_bad_data_end_the_job_with_the_row_and_no_ray_job_was_ever_created() -> None:
    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        post(operator, outcome=failure("InvalidData"))
        await eventually(lambda: phase(api) == "Failed")
        await eventually(lambda: api.names(PREPARATIONS) == [])

    api = play(scenario)
    assert api.status("tuned")["failure"]["reason"] == "InvalidData"
    assert writes(api, RAY_JOBS) == []


def test_a_failure_that_may_pass_is_retried_by_a_job_of_the_next_attempt() -> None:
    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        post(operator, outcome=failure("SourceUnavailable", retryable=True))
        await eventually(lambda: attempt(api).get("reason") == "SourceUnavailable")
        await asyncio.sleep(0.2)
        assert api.names(PREPARATIONS) == [], "its pod still runs"
        api.remove(POD)
        await eventually(lambda: api.names(PREPARATIONS) == ["tuned-2-prepare"])

    assert writes(play(scenario, gpu_job(backoffSeconds=0)), RAY_JOBS) == []


def test_a_pod_that_is_killed_is_explained_by_kubernetes_although_its_watch_is_late() -> None:
    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        ended = {"exitCode": 137, "reason": "OOMKilled"}
        state = {"containerStatuses": [{"name": "prepare", "state": {"terminated": ended}}]}
        see, api.on_change = api.on_change, lambda *_: None
        api.change(POD, status={"phase": "Failed", **state})
        api.on_change = see
        api.change(PREPARATION, status=FAILED)
        await eventually(lambda: phase(api) == "Failed")

    api = play(scenario)
    assert api.status("tuned")["failure"]["reason"] == "OutOfMemory"
    assert "tuned-1-prepare" in api.status("tuned")["failure"]["message"]


def test_an_image_of_an_earlier_release_prepares_the_data_in_its_workers() -> None:
    async def scenario(api: MemoryApi, _: Operator) -> None:
        await eventually(lambda: PREPARATION in api.objects)
        ended = {"exitCode": 2, "message": "error: unrecognized arguments: --prepare"}
        state = {"containerStatuses": [{"name": "prepare", "state": {"terminated": ended}}]}
        api.add(preparing_pod(api.objects[PREPARATION], phase="Failed", **state))
        api.change(PREPARATION, status=FAILED)
        await eventually(lambda: api.names(PREPARATIONS) == [])
        assert api.names(RAY_JOBS) == [], "its pod is waited for"
        api.remove(POD)
        await eventually(lambda: api.names(RAY_JOBS) == ["tuned-1"])
        assert "prepareJob" not in attempt(api)

    play(scenario)


@pytest.mark.parametrize("policy", ["suspend", "cancel"])
def test_a_job_that_must_stop_while_it_prepares_ends_its_job_at_once(policy: str) -> None:
    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        known = api.objects[JOB]
        metadata = {**known["metadata"], "generation": 2}
        api.change(JOB, metadata=metadata, spec={**known["spec"], "runPolicy": {policy: True}})
        await eventually(lambda: attempt(api).get("finishedAt"))
        await eventually(lambda: api.names(PREPARATIONS) == [])
        api.remove(POD)
        await eventually(lambda: phase(api) in ("Suspended", "Failed"))

    assert writes(play(scenario), RAY_JOBS) == []


def test_a_deleted_job_whose_output_is_erased_first_loses_its_preparation() -> None:
    made = gpu_job()
    made["spec"]["output"]["deletionPolicy"] = "Delete"

    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        stamp = {"deletionTimestamp": "2030-01-01T00:00:00Z"}
        api.change(JOB, metadata={**api.objects[JOB]["metadata"], **stamp})
        await eventually(lambda: PREPARATION not in api.objects)
        assert api.names(PREPARATIONS) == [], "the erasure waits for the pod"
        api.remove(POD)
        operator.reconciler.queue.add(key("tuned"))
        await eventually(lambda: api.names(PREPARATIONS) == ["tuned-erase"])

    play(scenario, made)


def test_a_new_job_waits_for_the_pod_that_prepares_data_for_a_deleted_job_of_its_name() -> None:
    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        api.remove(JOB)
        api.add(gpu_job())
        await eventually(lambda: PREPARATION not in api.objects)
        await asyncio.sleep(0.3)
        assert api.names(PREPARATIONS) == [], "the pod of the deleted job still runs"
        api.remove(POD)
        await eventually(lambda: PREPARATION in api.objects)
        assert api.objects[PREPARATION]["metadata"]["ownerReferences"][0]["uid"] == api.uid(JOB)

    play(scenario)


def test_a_job_that_the_api_server_refuses_is_reported_and_ends_the_job() -> None:
    def forbidden(request: Request) -> tuple[int, str] | None:
        is_create = request.method == "POST" and PREPARATIONS in request.path
        return (403, "exceeded quota: team, requested: count/jobs.batch=1") if is_create else None

    async def scenario(api: MemoryApi, operator: Operator) -> None:
        api.fault = forbidden
        await eventually(lambda: "QuotaExceeded" in str(api.status("tuned").get("conditions")))
        assert phase(api) == "Preparing"
        operator.late = timedelta(seconds=700)
        operator.reconciler.queue.add(key("tuned"))
        await eventually(lambda: phase(api) == "Failed")

    api = play(scenario, gpu_job(startDeadlineSeconds=600))
    assert api.status("tuned")["failure"]["reason"] == "QuotaExceeded"
    assert api.names(RAY_JOBS) == []


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_a_new_operator_goes_on_whatever_its_watches_report_first(order: tuple[int, ...]) -> None:
    """The former one has ended while the data were prepared, and they were done meanwhile."""
    api = MemoryApi()

    async def run() -> None:
        api.add(gpu_job())
        async with operated(api) as operator:
            await prepare(api, operator)
        api.change(POD, status={"phase": "Succeeded"})
        api.change(PREPARATION, status=COMPLETE)
        items = list(api.objects.values())
        async with operated(api, seen=False) as operator:
            for index in order:
                operator.see(items[index])
                await asyncio.sleep(0.01)
            await eventually(lambda: api.names(RAY_JOBS) == ["tuned-1"])
            await eventually(lambda: api.names(PREPARATIONS) == [])

    asyncio.run(run())
    created = [each.path for each in api.requests if each.method == "POST"]
    assert [created.count(path) for path in (PREPARATION, f"{RAY_JOBS}/tuned-1")] == [1, 1]
    assert len(api.status("tuned")["attempts"]) == 1


def test_a_new_operator_adopts_the_job_that_the_former_one_has_just_created() -> None:
    """It ended after the Job was created and before it knew."""
    api = MemoryApi()

    async def run() -> None:
        api.add(gpu_job())
        async with operated(api):
            await eventually(lambda: PREPARATION in api.objects)
        uid = api.uid(PREPARATION)
        known = api.objects[JOB]["status"]["attempts"][0]
        known.pop("prepareJobUid", None)
        async with operated(api, seen=False) as operator:
            operator.see(api.objects[JOB])  # before the watch of Jobs reports anything
            await eventually(lambda: operator.reconciler.cache.job(key("tuned")).preparations)
            api.change(PREPARATION, status={"ready": 1})
            await asyncio.sleep(0.1)
        assert api.uid(PREPARATION) == uid
        assert (api.names(PREPARATIONS), api.names(RAY_JOBS)) == (["tuned-1-prepare"], [])
        assert len(api.status("tuned")["attempts"]) == 1

    asyncio.run(run())


def test_the_warnings_of_a_job_without_a_pod_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "WARNING_SECONDS", 0.05)
    quota = 'Error creating: pods "tuned-1-prepare-x" is forbidden: exceeded quota: team'

    async def scenario(api: MemoryApi, _: Operator) -> None:
        async def warnings(_: str, name: str) -> list[str]:
            return [quota] if name == "tuned-1-prepare" else []

        monkeypatch.setattr(api.cluster, "warnings", warnings)
        await eventually(lambda: "QuotaExceeded" in str(api.status("tuned").get("conditions")))
        assert phase(api) == "Preparing"

    play(scenario)


# ---- whether it fits ----------------------------------------------------------------------------


def test_a_job_is_judged_by_the_gpu_that_it_names_and_again_by_the_one_that_it_gets() -> None:
    """Both times by one decision, however often its driver asks."""

    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        ahead = JobFacts(model=facts("8B"), done=["prepare"], devices=2)
        real = ahead.model_copy(update={"device": Device(gpu="NVIDIA", memory=200 * GIB)})

        async def refusal(asked: JobFacts) -> str | None:
            body = parse(api.objects[JOB])
            answer = await operator.reconciler.fit_of(key("tuned"), body, 1, asked)
            return answer.refusal.reason if answer and answer.refusal else None

        assert await refusal(ahead) == "DoesNotFit"
        assert await refusal(real) == "DoesNotFit", "it has no workers yet"
        post(operator, stages=[DONE])
        api.change(PREPARATION, status=COMPLETE)
        await eventually(lambda: api.names(RAY_JOBS))
        assert await refusal(real) is None
        assert await refusal(ahead) is None

    play(scenario, gpu_job(gpu="L4"))


def test_a_job_of_unknown_gpus_is_not_refused_before_it_has_them() -> None:
    async def scenario(api: MemoryApi, operator: Operator) -> None:
        await prepare(api, operator)
        asked = JobFacts(model=facts("8B"), done=["prepare"], devices=2)
        answer = await operator.reconciler.fit_of(key("tuned"), parse(api.objects[JOB]), 1, asked)
        assert answer is not None
        assert answer.refusal is None

    play(scenario)
