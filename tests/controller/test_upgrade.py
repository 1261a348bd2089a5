"""An upgrade or a rollback of the operator while jobs run, on a real API server.

Other CRDs take effect, the operator is killed and started again, and the drivers post.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.controller.newer import newer_crds, of_a_newer_version
from tests.controller.scene import (
    CRDS,
    INTERRUPTED,
    SUCCEEDED,
    Attempt,
    Job,
    OperatedScene,
    consistently,
)

pytestmark = pytest.mark.apiserver

RELEASE_CRDS = Path(__file__).parents[1] / "releases" / "0.2.0" / "crds"


def goes_on(job: Job, attempt: Attempt) -> None:
    """Assert that a running job posts, is suspended, is resumed and succeeds."""
    driver = attempt.driver()
    for step in (20, 30):
        answer = driver.post(step)
        assert (answer.status, answer.body) == (200, {"stop": False})
    job.until(lambda job: job.status.get("progress", {}).get("step") == 30)
    job.set(suspend=True)
    job.until(lambda _: driver.post(31).body == {"stop": True})
    assert driver.end(INTERRUPTED, step=31).status == 200
    job.until_phase("Suspended")
    job.set(suspend=False)
    resumed = job.attempt(2).run()
    assert resumed.driver().end(SUCCEEDED).status == 200
    assert (job.phase, job.reasons) == ("Succeeded", ["Suspended", "Succeeded"])


def test_a_running_job_goes_on_after_a_rollback_and_keeps_the_newer_version_s_fields(
    scene: OperatedScene,
) -> None:
    job = scene.create("rolled-back", training={"epochs": 2})
    attempt = job.attempt(1).run()
    assert attempt.driver().post(10).status == 200
    with newer_crds(scene, lambda: job.body["spec"].get("ofANewerVersion") == 3):
        # A newer operator writes in its place. Beside it, a watch that is older than the CRDs would
        # report the new fields as absent.
        scene.operator.kill()
        written = of_a_newer_version(job)
        scene.restart()
        goes_on(job, attempt)
        assert job.body["spec"]["training"]["ofANewerVersion"] == 3
        assert (job.status["ofANewerVersion"], job.why("Throttled")) == ("x", "True R")
        assert job.attempts[0]["ofANewerVersion"] == "node-7"
        assert written["planDigest"] == job.status["planDigest"]


def test_a_job_that_the_operator_cannot_read_keeps_its_attempt_until_it_can(
    scene: OperatedScene,
) -> None:
    job = scene.create("unreadable")
    attempt = job.attempt(1).run()
    driver = attempt.driver()
    assert driver.post(10).status == 200
    job.until(lambda job: job.status.get("progress"))
    with newer_crds(scene, lambda: job.body["spec"].get("ofANewerVersion") == 3):
        scene.api.merge(job.path, {"spec": {"method": "distill"}})
        scene.restart()
        version = job.version
        for answer in (driver.post(20), driver.end(SUCCEEDED)):
            assert (answer.status, answer.headers["Retry-After"]) == (503, "30")
            assert answer.body["superseded"] is False
        consistently(lambda: (job.version, job.ray_jobs()) == (version, [attempt.name]))
        scene.api.merge(job.path, {"spec": {"method": "sft"}})
        job.until(lambda _: driver.end(SUCCEEDED).status == 200)
    assert (job.phase, job.reasons) == ("Succeeded", ["Succeeded"])


def test_a_running_job_goes_on_with_the_crds_of_the_release_0_2_0(scene: OperatedScene) -> None:
    """Helm upgrades the operator and leaves the CRDs as they are."""
    job = scene.create("of-0-2-0")
    attempt = job.attempt(1).run()
    scene.cluster.define(RELEASE_CRDS)
    try:
        scene.restart()
        goes_on(job, attempt)
    finally:
        scene.cluster.define(CRDS)


def test_a_job_that_was_suspended_before_its_first_attempt_starts_after_a_restart(
    scene: OperatedScene,
) -> None:
    """It starts with the plan of that moment: no attempt has stored another."""
    job = scene.create("asleep", policy={"suspend": True})
    job.until_phase("Suspended")
    planned_otherwise = {"planDigest": "sha256:" + "0" * 64}
    scene.api.merge(f"{job.path}/status", {"status": planned_otherwise})
    scene.restart()
    job.set(suspend=False)
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert job.status["planDigest"] != planned_otherwise["planDigest"]
