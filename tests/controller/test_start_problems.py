"""Problems that keep an attempt from starting: the status names them while the attempt waits, and
the failure names them after the deadline. Other jobs are not affected."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.controller.faults import Answer, creates
from tests.controller.scene import (
    SUCCEEDED,
    Attempt,
    Job,
    OperatedScene,
    RefusedError,
    consistently,
    eventually,
    outcome,
)
from tests.controller.webhook import failing_webhook

pytestmark = pytest.mark.apiserver

START_SECONDS = 10
IMPATIENT = {"startDeadlineSeconds": START_SECONDS}


def is_served(scene: OperatedScene, name: str) -> None:
    """Assert that another job runs from its creation to its success."""
    other = scene.create(name)
    other.attempt(1).run().end(SUCCEEDED)
    other.until_phase("Succeeded")


def unschedulable(attempt: Attempt) -> None:
    text = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    attempt.set_pod(attempt.worker, conditions=[{**condition, "message": text}])


def claim_missing(attempt: Attempt) -> None:
    text = 'persistentvolumeclaim "data" not found'
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    attempt.set_pod(attempt.worker, conditions=[{**condition, "message": text}])


def waiting(reason: str, text: str, container: str = "ray-worker") -> list[dict[str, object]]:
    state = {"waiting": {"reason": reason, "message": text}}
    status = {"name": container, "state": state, "ready": False, "restartCount": 0}
    return [{**status, "image": "i", "imageID": ""}]


def image_missing(attempt: Attempt) -> None:
    states = waiting("ImagePullBackOff", "Back-off pulling image")
    attempt.set_pod(attempt.worker, containerStatuses=states)


def secret_missing(attempt: Attempt) -> None:
    states = waiting("CreateContainerConfigError", 'secret "hub" not found')
    attempt.set_pod(attempt.worker, containerStatuses=states)


def refused_by_policy(attempt: Attempt) -> None:
    """Remove the pods, so that only the RayCluster's events report the refusal."""
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


PROBLEMS = {
    "Unschedulable": (unschedulable, "gpusPerWorker"),
    "VolumeMissing": (claim_missing, "data"),
    "ImagePullFailed": (image_missing, "compute.image"),
    "SecretMissing": (secret_missing, "tokenSecret"),
    "QuotaExceeded": (refused_by_policy, "compute.workers"),
    "StartTimeout": (lambda _: None, ""),
}


def test_an_elastic_job_goes_on_with_the_workers_that_have_a_node_and_grows_again(
    scene: OperatedScene,
) -> None:
    compute = {"workers": 2, "minWorkers": 1}
    policy = {"startDeadlineSeconds": 60, "maxAttempts": 2, "backoffSeconds": 0}
    job = scene.create("elastic", policy=policy, compute=compute)
    first = job.attempt(1)
    first.start()  # one worker's pod exists, as if a quota refused the other
    assert first.body["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()}
    first.set_pod(first.worker, conditions=[scheduled])
    job.until(lambda job: job.reasons == ["FewerWorkers", None])
    second = job.attempt(2)
    assert second.body["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 1
    second.run()
    assert second.environment["TUNEYARD_WORKERS"] == "1"
    assert [attempt["workers"] for attempt in job.attempts] == [1, 1]
    second.driver().end(outcome("Failed", "DiskFull", retryable=True))
    third = job.attempt(3)
    assert third.body["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2
    assert "TUNEYARD_WORKERS" not in third.environment
    job.delete()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_pods_that_do_not_start_are_explained_at_once_and_fail_the_job_in_time(
    scene: OperatedScene,
) -> None:
    jobs = {reason: scene.create(f"no-{reason.lower()}", policy=IMPATIENT) for reason in PROBLEMS}
    for reason, job in jobs.items():
        attempt = job.attempt(1)
        attempt.start()
        PROBLEMS[reason][0](attempt)
    for reason, job in jobs.items():
        known = {reason, "Starting"} if reason == "StartTimeout" else {reason}
        job.until(lambda job, known=known: known & {job.why("Running").split()[-1], job.failure})
    is_served(scene, "unimpressed")
    for reason, job in jobs.items():
        job.until_phase("Failed")
        assert job.failure == reason
        assert PROBLEMS[reason][1] in str(job.status["failure"])
        job.until(lambda job: not job.ray_jobs())
        assert len(job.attempts) == 1, "nothing would be different the next time"


def test_a_pod_problem_that_ends_is_removed_from_the_status(scene: OperatedScene) -> None:
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


def test_a_quota_that_forbids_rayjobs_is_reported_and_waited_for(scene: OperatedScene) -> None:
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


def test_a_job_reports_missing_kuberay_and_continues_once_it_is_installed(
    scene: OperatedScene,
) -> None:
    for name in ("early-1", "early-too-1"):
        scene.proxy.add(Answer(404), creates("rayjobs", name), times=None)
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


@pytest.mark.parametrize("silent", [False, True], ids=["answers 500", "answers nothing"])
def test_a_failing_webhook_is_named_ends_the_job_in_time_and_is_waited_for(
    scene: OperatedScene, tmp_path: Path, silent: bool
) -> None:
    name = f"unreviewed-{'silent' if silent else 'broken'}"
    with failing_webhook(scene, name, tmp_path, silent=silent) as webhook:
        # The API server needs a moment to call a new webhook.
        job = scene.create(name)
        job.until(lambda job: job.why("Running") == "False ClusterUnavailable")
        assert f'failed calling webhook "{webhook}"' in str(job.status["conditions"])
        assert "Ask the platform team" in str(job.status["conditions"])
        is_served(scene, f"reviewed-{silent}".lower())
        assert job.phase == "Pending"
        job.set(startDeadlineSeconds=START_SECONDS)
        job.until_phase("Failed")
        assert job.failure == "ClusterUnavailable"
        assert webhook in job.status["failure"]["message"]
        assert job.ray_jobs() == []
        job.delete()
        job.until_gone()
        job = scene.create(name)
        job.until(lambda job: job.why("Running") == "False ClusterUnavailable")
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert (job.reasons, job.event_reasons()["ClusterUnavailable"]) == (
        ["Succeeded"],
        2,
    )


def test_a_fault_that_the_schema_cannot_refuse_fails_with_the_remedy_and_may_be_corrected(
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


def test_a_local_path_is_refused(scene: OperatedScene) -> None:
    job = scene.create("local", output={"uri": "file://out"})
    job.until_phase("Failed")
    assert (job.failure, job.ray_jobs()) == ("PlanRejected", [])
    assert "file://" in job.status["failure"]["message"]


def test_an_invalid_rayjob_fails_the_job(scene: OperatedScene) -> None:
    scene.proxy.add(Answer(422), creates("rayjobs", "invalid-1"), times=None)
    job = scene.create("invalid")
    job.until_phase("Failed")
    assert job.failure == "RayJobRefused"
    is_served(scene, "valid")


def test_a_refusal_by_kuberay_is_final(scene: OperatedScene) -> None:
    job = scene.create("refused")
    status = {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed"}
    job.attempt(1).set(**status, message="the spec is not valid")
    job.until_phase("Failed")
    assert job.failure == "RayJobRefused"


# ---- objects changed by other clients -----------------------------------------------------------


def test_a_malformed_job_is_reported_and_does_not_delay_other_jobs(
    scene: OperatedScene,
) -> None:
    """An earlier version's schema may have admitted it."""
    with any_schema(scene):
        job = scene.create("nonsense", model=5, data={"train": "everything"}, surprise={})
        is_served(scene, "sensible")
        job.until_phase("Failed")
    assert (job.failure, job.ray_jobs()) == ("Malformed", [])
    assert scene.operator.is_alive


@contextmanager
def any_schema(scene: OperatedScene) -> Iterator[None]:
    """Admit any FineTuneJob while the context lasts."""
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

    # A changed schema takes effect after a moment.
    scene.api("PUT", path, lax)
    eventually(is_admitted)
    try:
        yield
    finally:
        version = scene.api("GET", path)["metadata"]["resourceVersion"]
        definition["metadata"]["resourceVersion"] = version
        scene.api("PUT", path, definition)
        eventually(lambda: not is_admitted())


def test_a_lost_plan_is_created_again(scene: OperatedScene) -> None:
    """Other clients may delete ConfigMaps."""
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


def test_after_the_status_was_cleared_the_old_cluster_is_removed_before_a_new_one_starts(
    scene: OperatedScene,
) -> None:
    job = scene.create("emptied")
    attempt = job.attempt(1).run()
    attempt.hold(attempt.worker)
    old = attempt.uid
    scene.api("PATCH", f"{job.path}/status", {"status": None}, "application/merge-patch+json")
    job.until(lambda job: job.pods() == [attempt.worker])
    consistently(lambda: attempt.uid in (None, old))
    attempt.let_go(attempt.worker)
    job.until(lambda _: attempt.uid not in (None, old))
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")


def is_active(job: Job) -> bool:
    return job.phase in ("Pending", "Running")


def test_a_removed_finalizer_is_added_again(scene: OperatedScene) -> None:
    output = {"uri": "pvc://models/unguarded", "deletionPolicy": "Delete"}
    job = scene.create("unguarded", output=output)
    job.attempt(1).run()
    scene.api.merge(job.path, {"metadata": {"finalizers": None}})
    job.until(lambda job: job.body["metadata"].get("finalizers"))
    assert is_active(job)
