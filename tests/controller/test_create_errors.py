"""The API server fails to create an attempt's objects: the status reports its answer."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from tests.controller.memory import (
    RAY_JOBS,
    Fault,
    MemoryApi,
    Operator,
    Request,
    eventually,
    job,
    key,
    operated,
)
from tuneyard.controller import reconciler

WEBHOOK = 'Internal error occurred: failed calling webhook "rayjobs.policy.example.com"'


def on_create(path: str, status: int, message: str = WEBHOOK) -> Fault:
    """Refuse to create the objects whose path contains the text."""

    def fault(request: Request) -> tuple[int, str] | None:
        is_create = request.method in ("POST", "PATCH") and "/finetunejobs/" not in request.path
        return (status, message) if is_create and path in request.path else None

    return fault


def condition(api: MemoryApi, type_: str) -> dict[str, Any]:
    conditions = api.status("tuned").get("conditions") or []
    return next((each for each in conditions if each["type"] == type_), {})


def running_reason(api: MemoryApi) -> str:
    return str(condition(api, "Running").get("reason"))


def wake(operator: Operator, seconds: float) -> None:
    """Let so much time pass for the job, which is then reconciled."""
    operator.late += timedelta(seconds=seconds)
    operator.reconciler.queue.add(key("tuned"))


@pytest.mark.parametrize("path", ["/rayjobs/", "/configmaps/"])
@pytest.mark.parametrize("status", [500, 504, 429])
def test_the_status_says_what_the_api_server_answers_and_who_can_help(
    path: str, status: int
) -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        api.fault = on_create(path, status)
        async with operated(api):
            await eventually(lambda: running_reason(api) == "ClusterUnavailable")
        assert WEBHOOK in condition(api, "Running")["message"]
        assert "Ask the platform team" in condition(api, "Running")["message"]
        assert (api.status("tuned")["phase"], api.names(RAY_JOBS)) == ("Pending", [])

    asyncio.run(run())


def test_an_error_that_passes_at_once_is_not_reported() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        refused = iter([True, True])
        fault = on_create("/rayjobs/", 500)
        api.fault = lambda request: fault(request) if fault(request) and next(refused, 0) else None
        async with operated(api):
            await eventually(lambda: api.names(RAY_JOBS))
            await eventually(lambda: not next(refused, 0))
        reasons = {
            each["reason"]
            for request in api.requests
            if request.path.endswith("/status")
            for each in request.body["status"].get("conditions", ())
        }
        assert "ClusterUnavailable" not in reasons

    asyncio.run(run())


def test_the_start_deadline_ends_the_job_with_the_answer_and_not_before() -> None:
    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned", startDeadlineSeconds=600))
        api.fault = on_create("/rayjobs/", 500)
        async with operated(api) as operator:
            await eventually(lambda: running_reason(api) == "ClusterUnavailable")
            wake(operator, 500)
            await asyncio.sleep(0.1)
            assert api.status("tuned")["phase"] == "Pending"
            wake(operator, 101)
            await eventually(lambda: api.status("tuned")["phase"] == "Failed")
        failure = api.status("tuned")["failure"]
        assert failure["reason"] == "ClusterUnavailable"
        assert WEBHOOK in failure["message"]
        assert [each["reason"] for each in api.status("tuned")["attempts"]] == [
            "ClusterUnavailable"
        ], "another attempt would wait as long for the same answer"

    asyncio.run(run())


def test_a_job_starts_by_itself_when_the_webhook_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconciler, "CREATE_SECONDS", 0.1)

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        api.fault = on_create("/rayjobs/", 500)
        async with operated(api):
            await eventually(lambda: running_reason(api) == "ClusterUnavailable")
            api.fault = lambda _: None
            await eventually(lambda: running_reason(api) == "Starting")
        assert api.names(RAY_JOBS) == ["tuned-1"]
        assert [each["number"] for each in api.status("tuned")["attempts"]] == [1]

    asyncio.run(run())


def test_an_answer_that_differs_each_time_is_not_asked_for_without_pause() -> None:
    """Messages of a broken connection contain its port."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned"))
        fault = on_create("/rayjobs/", 500)
        api.fault = lambda request: fault(request) and (500, f"port {len(api.requests)}")
        async with operated(api):
            await eventually(lambda: running_reason(api) == "ClusterUnavailable")
            num_requests = len(api.requests)
            await asyncio.sleep(1)
            assert len(api.requests) <= num_requests + 5

    asyncio.run(run())


def test_an_outage_longer_than_the_start_deadline_fails_no_job() -> None:
    """The error of a try before the outage is not the API server's answer after it."""

    async def run() -> None:
        api = MemoryApi()
        api.add(job("tuned", startDeadlineSeconds=600))
        fault = on_create("/rayjobs/", 500)

        def outage(request: Request) -> tuple[int, str] | None:
            num_tries = sum("/rayjobs/" in each.path for each in api.requests)
            return (500, "etcd") if num_tries >= reconciler.CREATE_TRIES else fault(request)

        api.fault = outage
        async with operated(api) as operator:
            cached = operator.reconciler.cache.job(key("tuned"))
            await eventually(lambda: cached.create_error)
            api.fault = lambda _: None
            cached.create_after = 0.0  # the last try is long ago
            wake(operator, 700)
            await eventually(
                lambda: api.status("tuned")["phase"] == "Failed" or api.names(RAY_JOBS)
            )
        assert (api.status("tuned")["phase"], api.names(RAY_JOBS)) == ("Pending", ["tuned-1"])

    asyncio.run(run())
