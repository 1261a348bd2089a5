"""An API server that fails during a retried job: the job ends as without faults."""

from __future__ import annotations

import pytest

from tests.controller.faults import (
    Answer,
    Cut,
    Fault,
    Gone,
    Predicate,
    Request,
    Stale,
    anything,
    on,
)
from tests.controller.scene import SUCCEEDED, OperatedScene, eventually, outcome

pytestmark = pytest.mark.apiserver

RETRYABLE = outcome("Failed", "Flaky", retryable=True)
PARTS = "/(finetunejobs|rayjobs|configmaps)(/|$)"


def is_work(request: Request) -> bool:
    return request.is_write and not request.path.endswith("/events")


FAULTS: dict[str, list[tuple[Fault, Predicate, int]]] = {
    "every second write conflicts": [(Answer(409), on("PATCH", PARTS), 1)] * 3,
    "too many requests": [(Answer(429, retry_after=1), is_work, 4)],
    "server errors": [(Answer(500), is_work, 3), (Answer(503), on("GET"), 3)],
    "answers are lost": [(Cut("after"), is_work, 5)],
    "requests are lost": [(Cut("before"), is_work, 5)],
    "stale reads": [(Stale(3), on("GET", "/(finetunejobs|rayjobs|pods)"), 2)],
    "watches end": [(Gone(), on("WATCH"), 6)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_retried_job_under_faults_has_one_rayjob_for_each_attempt_and_succeeds(
    scene: OperatedScene, name: str
) -> None:
    rayjobs = f"/apis/ray.io/v1/namespaces/{scene.namespace}/rayjobs"
    since = scene.api("GET", f"{rayjobs}?limit=1")["metadata"]["resourceVersion"]

    def strike() -> None:
        for fault, when, times in FAULTS[name]:
            scene.proxy.add(fault, when, times)
        if name == "watches end":
            scene.proxy.drop_watches()

    strike()
    job = scene.create(name.replace(" ", "-"), policy={"backoffSeconds": 0})
    first = job.attempt(1).run()
    strike()
    first.end(RETRYABLE)
    second = job.attempt(2).run()
    strike()
    second.end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert job.reasons == ["Flaky", "Succeeded"]
    job.until(lambda job: not job.ray_jobs())
    strike()
    job.delete()
    job.until_gone()
    created = [
        event["object"]["metadata"]["name"]
        for event in scene.api.changes(rayjobs, since)
        if event["type"] == "ADDED"
    ]
    assert created == [f"{job.name}-1", f"{job.name}-2"]
    assert scene.operator.is_alive


def test_while_no_token_can_be_reviewed_posts_are_deferred(scene: OperatedScene) -> None:
    attempt = scene.create("unchecked").attempt(1).run()
    driver = attempt.driver()
    scene.proxy.add(Answer(500), on("POST", "/tokenreviews$"), times=None)
    answer = driver.post(1)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
    scene.proxy.heal()
    assert driver.post(1).status == 200


def test_refused_events_delay_nothing(scene: OperatedScene) -> None:
    scene.proxy.add(Answer(500), on("POST", "/events$"), times=None)
    job = scene.create("untold")
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")


def test_an_operator_without_its_api_server_exits_and_recovers_after_a_restart(
    scene: OperatedScene,
) -> None:
    """Another replica may be active by then, so the operator must exit."""
    job = scene.create("cut-off")
    attempt = job.attempt(1).run()
    scene.proxy.add(Cut("before"), anything, times=None)
    scene.proxy.drop_watches()
    attempt.end(SUCCEEDED)
    eventually(lambda: not scene.operator.is_alive, context=scene.operator.log[-2000:])
    assert scene.operator.end() != 0
    scene.proxy.heal()
    scene.operator.start()
    job.until_phase("Succeeded")
    assert job.reasons == ["Succeeded"]


def test_an_operator_that_cannot_read_its_certificate_exits_with_a_reason(
    scene: OperatedScene,
) -> None:
    scene.proxy.add(Answer(403), on("GET", "/secrets/tuneyard-tls$"), times=None)
    scene.operator.kill()
    scene.operator.start()
    eventually(lambda: not scene.operator.is_alive)
    assert scene.operator.end() != 0
    assert "403 Forbidden" in scene.operator.log.splitlines()[-1]
