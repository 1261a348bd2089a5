"""What stands in an attempt's way is named in the status while it waits, and in the failure if it
does not go away in time; other jobs go on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.controller.faults import Answer, on
from tests.controller.scene import (
    SUCCEEDED,
    Attempt,
    Job,
    OperatedScene,
    RefusedError,
    consistently,
    eventually,
)

pytestmark = pytest.mark.apiserver

START_SECONDS = 10
IMPATIENT = {"startDeadlineSeconds": START_SECONDS}


def is_served(scene: OperatedScene, name: str) -> None:
    """Another job, beside the one in trouble, from its creation to its success."""
    other = scene.create(name)
    other.attempt(1).run().end(SUCCEEDED)
    other.until_phase("Succeeded")


def unschedulable(attempt: Attempt) -> None:
    text = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    attempt.set_pod(attempt.worker, conditions=[{**condition, "message": text}])


def without_claim(attempt: Attempt) -> None:
    text = 'persistentvolumeclaim "data" not found'
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    attempt.set_pod(attempt.worker, conditions=[{**condition, "message": text}])


def waiting(reason: str, text: str, container: str = "ray-worker") -> list[dict[str, object]]:
    state = {"waiting": {"reason": reason, "message": text}}
    status = {"name": container, "state": state, "ready": False, "restartCount": 0}
    return [{**status, "image": "i", "imageID": ""}]


def without_image(attempt: Attempt) -> None:
    told = waiting("ImagePullBackOff", "Back-off pulling image")
    attempt.set_pod(attempt.worker, containerStatuses=told)


def without_secret(attempt: Attempt) -> None:
    told = waiting("CreateContainerConfigError", 'secret "hub" not found')
    attempt.set_pod(attempt.worker, containerStatuses=told)


def refused_by_policy(attempt: Attempt) -> None:
    """Without pods, the RayCluster's events alone tell."""
    for pod in (attempt.head, attempt.worker):
        attempt.remove_pod(pod)
    scene = attempt.job.scene
    regarding = {"kind": "RayCluster", "name": f"{attempt.name}-x", "namespace": scene.namespace}
    event = {
        "metadata": {"name": f"{attempt.name}.1"},
        "involvedObject": regarding,
        "type": "Warning",
        "reason": "FailedToCreateHeadPod",
        "message": "pods is forbidden: exceeded quota: gpus, requested: 4, limited: 2",
    }
    scene.create_object("events", event)


TROUBLES = {
    "Unschedulable": (unschedulable, "gpusPerWorker"),
    "VolumeMissing": (without_claim, "data"),
    "ImagePullFailed": (without_image, "compute.image"),
    "SecretMissing": (without_secret, "tokenSecret"),
    "QuotaExceeded": (refused_by_policy, "compute.workers"),
    "StartTimeout": (lambda _: None, ""),
}


def test_pods_that_do_not_start_are_explained_at_once_and_given_up_in_time(
    scene: OperatedScene,
) -> None:
    jobs = {reason: scene.create(f"no-{reason.lower()}", policy=IMPATIENT) for reason in TROUBLES}
    for reason, job in jobs.items():
        attempt = job.attempt(1)
        attempt.start()
        TROUBLES[reason][0](attempt)
    for reason, job in jobs.items():
        known = "Starting" if reason == "StartTimeout" else reason
        job.until(lambda job, known=known: known in (job.why("Running").split()[-1], job.failure))
    is_served(scene, "unimpressed")
    for reason, job in jobs.items():
        job.until_phase("Failed")
        assert job.failure == reason
        assert TROUBLES[reason][1] in str(job.status["failure"])
        job.until(lambda job: not job.ray_jobs())
        assert len(job.attempts) == 1, "nothing would be different the next time"


def test_a_trouble_that_goes_away_is_forgotten(scene: OperatedScene) -> None:
    job = scene.create("lucky")
    attempt = job.attempt(1)
    attempt.start()
    unschedulable(attempt)
    job.until(lambda job: job.why("Running") == "False Unschedulable")
    consistently(lambda: job.attempts[-1].get("finishedAt") is None, 1)
    scheduled = {"type": "PodScheduled", "status": "True"}
    attempt.set_pod(attempt.worker, conditions=[scheduled])
    job.until(lambda job: job.why("Running") == "False Starting")
    attempt.set(jobDeploymentStatus="Running", jobStatus="RUNNING")
    job.until_phase("Running")
    assert job.event_reasons()["Unschedulable"] == 1


def test_a_quota_that_takes_no_rayjob_is_named_and_waited_for(scene: OperatedScene) -> None:
    quota = f"/api/v1/namespaces/{scene.namespace}/resourcequotas"
    body = {"metadata": {"name": "none"}, "spec": {"hard": {"count/rayjobs.ray.io": "0"}}}
    scene.api("POST", quota, body)
    try:
        job = scene.create("poor")
        job.until(lambda job: job.why("Running") == "False QuotaExceeded")
        assert "count/rayjobs.ray.io" in str(job.status["conditions"])
        assert job.ray_jobs() == []
    finally:
        scene.api("DELETE", f"{quota}/none")
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert (len(job.attempts), job.event_reasons()["QuotaExceeded"]) == (1, 1)


def test_without_kuberay_a_job_says_so_and_goes_on_once_it_is_there(scene: OperatedScene) -> None:
    missing = on("PATCH", f"/namespaces/{scene.namespace}/rayjobs/early")
    scene.proxy.add(Answer(404), missing, times=None)
    early = scene.create("early")
    given_up = scene.create("early-too", policy=IMPATIENT)
    early.until(lambda job: job.why("Running") == "False KubeRayMissing")
    given_up.until_phase("Failed")
    assert given_up.failure == "KubeRayMissing"
    assert "install KubeRay" in given_up.status["failure"]["advice"]
    is_served(scene, "not-touched")
    scene.proxy.heal()
    early.attempt(1).run().end(SUCCEEDED)
    early.until_phase("Succeeded")
    assert len(early.attempts) == 1


def test_what_the_schema_cannot_refuse_fails_with_the_remedy_and_may_be_corrected(
    scene: OperatedScene,
) -> None:
    job = scene.create("typo", compute={"profile": "a1000"})
    job.until_phase("Failed")
    assert job.failure == "PlanRejected"
    assert "a1000" in job.status["failure"]["message"]
    assert (job.ray_jobs(), job.attempts) == ([], [])
    scene.api.merge(job.path, {"spec": {"compute": {"profile": None}}})
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert (job.failure, job.why("Failed")) == (None, "absent")


def test_a_path_of_the_users_own_machine_is_no_place_for_pods(scene: OperatedScene) -> None:
    job = scene.create("local", output={"uri": "file://out"})
    job.until_phase("Failed")
    assert (job.failure, job.ray_jobs()) == ("PlanRejected", [])
    assert "file://" in job.status["failure"]["message"]


def test_an_invalid_rayjob_is_refused_for_good(scene: OperatedScene) -> None:
    scene.proxy.add(Answer(422), on("PATCH", "/rayjobs/invalid-1$"), times=None)
    job = scene.create("invalid")
    job.until_phase("Failed")
    assert job.failure == "RayJobRefused"
    is_served(scene, "valid")


def test_kuberays_refusal_is_final(scene: OperatedScene) -> None:
    job = scene.create("refused")
    status = {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed"}
    job.attempt(1).set(**status, message="the spec is not valid")
    job.until_phase("Failed")
    assert job.failure == "RayJobRefused"


# ---- what others broke --------------------------------------------------------------------------


def test_a_malformed_object_is_told_so_and_does_not_keep_others_from_being_served(
    scene: OperatedScene,
) -> None:
    """One that a laxer schema of an earlier version let in."""
    with any_schema(scene):
        job = scene.create("nonsense", model=5, data={"train": "everything"}, surprise={})
        is_served(scene, "sensible")
        job.until_phase("Failed")
    assert (job.failure, job.ray_jobs()) == ("Malformed", [])
    assert scene.operator.is_alive


@contextmanager
def any_schema(scene: OperatedScene) -> Iterator[None]:
    """Admission takes any FineTuneJob meanwhile."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.tuneyard.io"
    definition = scene.api("GET", path)
    lax, anything = copy.deepcopy(definition), {"x-kubernetes-preserve-unknown-fields": True}
    for version in lax["spec"]["versions"]:
        fields = {name: {"type": "object", **anything} for name in ("spec", "status")}
        version["schema"]["openAPIV3Schema"] = {"type": "object", "properties": fields}
    probe = Job(scene, "FineTuneJob", "probe")
    collection = probe.path.removesuffix("/probe")

    def is_admitted() -> bool:
        try:
            scene.api("POST", f"{collection}?dryRun=All", probe.manifest({"model": 5}))
        except RefusedError:
            return False
        return True

    # A changed schema takes a moment to come into force.
    scene.api("PUT", path, lax)
    eventually(is_admitted)
    try:
        yield
    finally:
        version = scene.api("GET", path)["metadata"]["resourceVersion"]
        definition["metadata"]["resourceVersion"] = version
        scene.api("PUT", path, definition)
        eventually(lambda: not is_admitted())


def test_a_lost_plan_is_made_again(scene: OperatedScene) -> None:
    """ConfigMaps can be deleted by whoever may."""
    job = scene.create("planless", policy={"backoffSeconds": 0})
    job.attempt(1).run()
    digest = job.status["planDigest"].removeprefix("sha256:")[:10]
    path = f"/api/v1/namespaces/{scene.namespace}/configmaps/planless-plan-{digest}"
    uid = scene.api("GET", path)["metadata"]["uid"]
    scene.api("DELETE", path)
    job.attempt(1).end()
    job.attempt(2).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert scene.api("GET", path)["metadata"]["uid"] != uid


def test_after_somebody_emptied_the_status_the_old_cluster_is_gone_before_a_new_one_begins(
    scene: OperatedScene,
) -> None:
    job = scene.create("emptied")
    attempt = job.attempt(1).run()
    attempt.hold(attempt.worker)
    old = attempt.body["metadata"]["uid"]
    scene.api("PATCH", f"{job.path}/status", {"status": None}, "application/merge-patch+json")
    job.until(lambda job: job.pods() == [attempt.worker])
    consistently(lambda: not attempt.exists or attempt.body["metadata"]["uid"] == old)
    attempt.let_go(attempt.worker)
    job.until(lambda _: attempt.exists and attempt.body["metadata"]["uid"] != old)
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")


def is_well(job: Job) -> bool:
    return job.phase in ("Pending", "Running")


def test_a_finalizer_that_somebody_took_off_comes_back(scene: OperatedScene) -> None:
    job = scene.create("unguarded")
    job.attempt(1).run()
    scene.api.merge(job.path, {"metadata": {"finalizers": None}})
    job.until(lambda job: job.body["metadata"].get("finalizers"))
    assert is_well(job)
