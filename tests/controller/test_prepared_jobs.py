"""Jobs with GPUs on a real API server: a Job prepares their data before their RayJob exists."""

from __future__ import annotations

from typing import Any

import pytest

from tests.controller.scene import (
    SUCCEEDED,
    Job,
    OperatedScene,
    Preparation,
    consistently,
    eventually,
    outcome,
)

pytestmark = pytest.mark.apiserver

GPUS = {"workers": 2, "gpusPerWorker": 1}
DONE = [{"name": "prepare", "kind": "prepare", "state": "Succeeded"}]


def preparing(scene: OperatedScene, name: str, **more: Any) -> tuple[Job, Preparation]:
    """Return a job whose data are being prepared: the driver of its Job has posted."""
    job = scene.create(name, compute=GPUS, **more)
    preparation = job.preparation(1)
    preparation.set_pod(phase="Running")
    assert preparation.driver().post(stage="prepare", preparing=True).body == {"stop": False}
    job.until(lambda job: job.attempts[-1].get("preparingAt"))
    return job, preparation


def test_no_gpu_pod_exists_while_the_data_are_prepared(scene: OperatedScene) -> None:
    job, preparation = preparing(scene, "first")
    (pod,) = job.pods()
    assert pod == preparation.pod["metadata"]["name"]
    assert "nvidia.com/gpu" not in str(preparation.pod["spec"])
    consistently(lambda: (job.phase, job.ray_jobs(), job.pods()) == ("Preparing", [], [pod]))
    scene.restart()
    consistently(lambda: (job.phase, job.ray_jobs(), job.pods()) == ("Preparing", [], [pod]))
    assert preparation.driver().post(stage="", preparing=True, stages=DONE).status == 200
    preparation.set_pod(phase="Succeeded")
    attempt = job.attempt(1)
    job.until(lambda job: not preparation.exists and job.pods() == [])
    assert (job.phase, job.attempts[-1].get("runningAt")) == ("Pending", None)
    attempt.run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert job.reasons == ["Succeeded"]
    assert "ERROR" not in scene.operator.log


def test_bad_data_end_the_job_and_no_ray_job_was_created(scene: OperatedScene) -> None:
    since = scene.api("GET", _ray_jobs(scene))["metadata"]["resourceVersion"]
    job, preparation = preparing(scene, "bad")
    ended = outcome("Failed", "InvalidData")
    assert preparation.driver().post(preparing=True, outcome=ended).status == 200
    job.until_phase("Failed")
    assert job.failure == "InvalidData"
    job.until(lambda job: not preparation.exists and job.pods() == [])
    assert [e for e in scene.api.changes(_ray_jobs(scene), since) if e["type"] == "ADDED"] == []


def test_an_image_of_an_earlier_release_prepares_the_data_in_its_workers(
    scene: OperatedScene,
) -> None:
    job = scene.create("earlier", compute=GPUS)
    preparation = job.preparation(1)
    ended = {"exitCode": 2, "reason": "Error", "message": "unrecognized arguments: --prepare"}
    container = {
        "name": "prepare",
        "image": "x",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"terminated": ended},
    }
    preparation.set_pod(phase="Failed", containerStatuses=[container])
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert job.reasons == ["Succeeded"]


def test_a_job_that_is_deleted_takes_its_preparation_with_it(scene: OperatedScene) -> None:
    job, preparation = preparing(scene, "deleted")
    job.delete()
    job.until_gone()
    eventually(lambda: not preparation.exists and job.pods() == [])


def _ray_jobs(scene: OperatedScene) -> str:
    return f"/apis/ray.io/v1/namespaces/{scene.namespace}/rayjobs"
