"""An operator that was killed between the status of a first attempt and its stored plan."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.controller.memory import (
    JOBS,
    RAY_JOBS,
    MemoryApi,
    Object,
    Request,
    eventually,
    job,
    operated,
)
from tuneyard.api.compute import Compute
from tuneyard.api.meta import FINALIZER
from tuneyard.controller.settings import Settings

PATH, RAY_JOB = f"{JOBS}/tuned", f"{RAY_JOBS}/tuned-1"


def profile(**fields: Any) -> Settings:
    return Settings(profiles={"small": Compute.model_validate(fields)})


def no_config_map(request: Request) -> tuple[int, str] | None:
    """Refuse to store a plan, as if the operator were killed before."""
    is_write = request.method != "GET" and "/configmaps/" in request.path
    return (503, "killed") if is_write else None


async def killed(api: MemoryApi) -> None:
    """Open the first attempt in the status and end before its plan is stored."""
    body = job("tuned", suspend=False)
    body["spec"]["compute"] = {"profile": "small"}
    api.add(body)
    api.fault = no_config_map
    async with operated(api, profile(workers=1)):
        await eventually(lambda: api.status("tuned").get("attempts"))
    api.fault, api.on_change = lambda _: None, lambda _, __: None


def workers(ray_job: Object) -> int:
    found: int = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    return found


@pytest.mark.parametrize("edited", [1, 2])
def test_a_plan_that_was_never_stored_is_made_again_after_a_change_of_its_profile(
    edited: int,
) -> None:
    async def run() -> None:
        api = MemoryApi()
        await killed(api)
        before = api.status("tuned")["planDigest"]
        async with operated(api, profile(workers=edited)):
            await eventually(lambda: RAY_JOB in api.objects, lambda: api.status("tuned"))
        status = api.status("tuned")
        assert workers(api.objects[RAY_JOB]) == edited
        assert [each["number"] for each in status["attempts"]] == [1]
        assert status["phase"] == "Pending"
        assert (status["planDigest"] == before) == (edited == 1)
        name = f"tuned-plan-{status['planDigest'].removeprefix('sha256:')[:10]}"
        assert f"/api/v1/namespaces/team/configmaps/{name}" in api.objects

    asyncio.run(run())


def test_a_job_whose_plan_was_never_stored_and_is_rejected_now_starts_once_it_is_corrected() -> (
    None
):
    async def run() -> None:
        api = MemoryApi()
        await killed(api)
        async with operated(api, Settings()):
            await eventually(lambda: api.status("tuned")["phase"] == "Failed")
            status = api.status("tuned")
            assert status["failure"]["reason"] == "PlanRejected"
            assert not status.get("attempts")
        api.on_change = lambda _, __: None
        spec = {key: value for key, value in api.objects[PATH]["spec"].items() if key != "compute"}
        metadata = {**api.objects[PATH]["metadata"], "generation": 2}
        api.change(PATH, spec=spec, metadata=metadata)
        async with operated(api, Settings()):
            await eventually(lambda: RAY_JOB in api.objects)

    asyncio.run(run())


def test_a_plan_with_which_an_attempt_has_begun_stays_lost() -> None:
    async def run() -> None:
        api = MemoryApi()
        await killed(api)
        status = api.status("tuned")
        (attempt,) = status["attempts"]
        closed = {**attempt, "rayJobUid": "r", "finishedAt": attempt["startedAt"]}
        closed |= {"reason": "Preempted", "message": ""}
        api.change(PATH, status={**status, "attempts": [closed]})
        async with operated(api, profile(workers=2)):
            await eventually(lambda: api.status("tuned")["phase"] == "Failed")
        assert api.status("tuned")["failure"]["reason"] == "PlanLost"

    asyncio.run(run())


def test_an_output_is_erased_although_the_recorded_plan_is_lost() -> None:
    async def run() -> None:
        api = MemoryApi()
        await killed(api)
        output = {"uri": "pvc://models/tuned", "deletionPolicy": "Delete"}
        metadata = {**api.objects[PATH]["metadata"], "finalizers": [FINALIZER]}
        metadata["deletionTimestamp"] = "2030-01-01T00:00:00Z"
        api.change(PATH, spec={**api.objects[PATH]["spec"], "output": output}, metadata=metadata)
        async with operated(api, profile(workers=2)):
            await eventually(lambda: any(path.endswith("tuned-erase") for path in api.objects))

    asyncio.run(run())
