"""Jobs on a real API server, from creation to deletion."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.controller.faults import on
from tests.controller.scene import (
    INTERRUPTED,
    SUCCEEDED,
    Job,
    OperatedScene,
    Scene,
    consistently,
    eventually,
    operated,
    outcome,
)
from tuneyard.api.meta import FINALIZER

pytestmark = pytest.mark.apiserver

RETRYABLE = outcome("Failed", "DataUnreadable", retryable=True)
FATAL = outcome("Failed", "ModelNotFound")


def is_left_alone(job: Job) -> None:
    """Assert that nothing writes to the job and no RayJob of it is created."""
    version, names = job.version, job.ray_jobs()
    consistently(lambda: (job.version, job.ray_jobs()) == (version, names))


def test_a_job_succeeds_and_its_status_and_events_show_each_step(
    scene: OperatedScene,
) -> None:
    job = scene.create("happy")
    attempt = job.attempt(1)
    job.until(lambda job: job.why("Planned") == "True Planned")
    assert job.phase == "Pending"
    attempt.run()
    assert (job.phase, job.why("Running")) == ("Running", "True Running")
    is_left_alone(job)
    driver = attempt.driver()
    assert driver.post(40).body == {"stop": False}
    job.until(lambda job: job.status.get("progress", {}).get("step") == 40)
    assert driver.end(SUCCEEDED).status == 200
    status = job.status
    assert status["phase"] == "Succeeded"
    assert status["result"]["digest"] == "sha256:d"
    assert status["progress"]["percentage"] == 100
    assert {stage["state"] for stage in status["stages"]} == {"Succeeded"}
    assert job.reasons == ["Succeeded"]
    assert job.why("Succeeded") == "True Succeeded"
    job.until(lambda job: not job.ray_jobs() and not job.pods())
    is_left_alone(job)
    job.until(lambda job: "Succeeded" in job.event_reasons())
    assert job.event_reasons() == {
        "AttemptStarted": 1,
        "Running": 1,
        "StageSucceeded": len(status["stages"]),
        "Succeeded": 1,
    }


def test_a_job_gets_one_network_policy_which_its_attempts_share_and_which_is_deleted_with_it(
    new_scene: Callable[[str], Scene], tmp_path: Path
) -> None:
    quiet = new_scene("policies")
    path = f"/apis/networking.k8s.io/v1/namespaces/{quiet.namespace}/networkpolicies"
    with operated(quiet, tmp_path, job_network_policies="") as scene:
        job = scene.create("fenced", policy={"backoffSeconds": 0})
        first = job.attempt(1)
        (policy,) = scene.api.list(path)
        first.run().end(RETRYABLE)
        job.attempt(2)
        (shared,) = scene.api.list(path)
        assert shared["metadata"]["uid"] == policy["metadata"]["uid"], "it was not created again"
        (owner,) = shared["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"]) == ("FineTuneJob", "fenced")
        job.delete()
        job.until_gone()
        eventually(lambda: not scene.api.list(path))


def test_an_operator_without_the_setting_writes_no_network_policy(scene: OperatedScene) -> None:
    scene.create("open").attempt(1)
    path = f"/apis/networking.k8s.io/v1/namespaces/{scene.namespace}/networkpolicies"
    assert scene.api.list(path) == []


def test_every_status_write_changes_something(scene: OperatedScene) -> None:
    """A change of KubeRay's own fields or a new label on the job causes no status write."""
    job = scene.create("steady")
    attempt = job.attempt(1).run()
    before = len(scene.status_writes(job))
    for number in range(3):
        attempt.set(dashboardURL=f"http://nowhere:{number}")
        scene.api.merge(job.path, {"metadata": {"labels": {"touched": str(number)}}})
        attempt.set_pod(attempt.worker, message=f"note {number}")
    consistently(lambda: len(scene.status_writes(job)) == before)
    assert all(write["status"] for write in scene.status_writes(job))
    attempt.end(SUCCEEDED)
    job.until_phase("Succeeded")


def test_a_retryable_failure_is_retried_once_the_old_pods_are_removed(
    scene: OperatedScene,
) -> None:
    job = scene.create("retried", policy={"backoffSeconds": 0})
    first = job.attempt(1).run()
    first.hold(first.worker)
    assert first.driver().end(RETRYABLE, step=30).status == 200
    job.until(lambda job: job.reasons == ["DataUnreadable"])
    job.until(lambda job: job.pods() == [first.worker])
    consistently(lambda: job.reasons == ["DataUnreadable"] and "retried-2" not in job.ray_jobs())
    first.let_go(first.worker)
    second = job.attempt(2).run()
    assert job.reasons == ["DataUnreadable", None]
    assert job.ray_jobs() == ["retried-2"]
    second.end(SUCCEEDED)
    job.until_phase("Succeeded")
    job.until(lambda job: "Succeeded" in job.event_reasons())
    events = job.event_reasons()
    assert (events["AttemptStarted"], events["AttemptEnded"], events["Running"]) == (2, 1, 2)


def test_after_max_attempts_a_retryable_failure_is_final(scene: OperatedScene) -> None:
    job = scene.create("exhausted", policy={"backoffSeconds": 0, "maxAttempts": 2})
    for number in (1, 2):
        job.attempt(number).run().end(RETRYABLE)
    job.until_phase("Failed")
    assert (job.failure, job.reasons) == ("DataUnreadable", ["DataUnreadable"] * 2)
    job.until(lambda job: not job.ray_jobs())
    is_left_alone(job)


def test_a_permanent_failure_is_not_retried(scene: OperatedScene) -> None:
    job = scene.create("fatal", policy={"backoffSeconds": 0})
    job.attempt(1).run().end(FATAL)
    job.until_phase("Failed")
    assert (job.failure, len(job.attempts)) == ("ModelNotFound", 1)
    job.until(lambda job: not job.ray_jobs())
    is_left_alone(job)


def test_the_next_attempt_starts_after_the_back_off(scene: OperatedScene) -> None:
    job = scene.create("patient", policy={"backoffSeconds": 3600})
    job.attempt(1).run().end(RETRYABLE)
    job.until(lambda job: job.reasons == ["DataUnreadable"] and not job.ray_jobs())
    is_left_alone(job)
    assert job.phase == "Pending"


def test_preempted_pods_do_not_count_as_an_attempt(scene: OperatedScene) -> None:
    job = scene.create("preempted", policy={"maxAttempts": 1, "backoffSeconds": 0})
    first = job.attempt(1).run()
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    # Kubernetes removes such a condition after two minutes if the pod still exists.
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    first.set_pod(first.worker, conditions=[{**condition, "lastTransitionTime": now}])
    first.remove_pod(first.worker)
    first.end(outcome("Failed", "WorkerDied", retryable=True))
    job.attempt(2).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert job.reasons == ["Preempted", "Succeeded"]


def test_a_worker_that_ran_out_of_memory_is_named_even_after_its_deletion(
    scene: OperatedScene,
) -> None:
    job = scene.create("greedy")
    first = job.attempt(1).run()
    killed = {"exitCode": 137, "reason": "OOMKilled"}
    container = {
        "name": "ray-worker",
        "state": {"terminated": killed},
        "ready": False,
        "restartCount": 0,
        "image": "i",
        "imageID": "i",
    }
    first.set_pod(first.worker, phase="Failed", containerStatuses=[container])
    first.remove_pod(first.worker)
    first.end(outcome("Failed", "WorkerDied", retryable=True))
    job.until_phase("Failed")
    assert job.failure == "OutOfMemory"
    assert "ray-worker" in job.status["failure"]["message"]
    assert "compute.memory" in job.status["failure"]["advice"]


def test_an_attempt_ends_when_another_client_deletes_its_rayjob(scene: OperatedScene) -> None:
    job = scene.create("robbed", policy={"backoffSeconds": 0})
    first = job.attempt(1).run()
    scene.api("DELETE", first.path, {"propagationPolicy": "Background"})
    job.attempt(2).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert job.reasons == ["RayJobDeleted", "Succeeded"]


# ---- suspend, cancel, deadline ------------------------------------------------------------------


def test_a_suspended_job_saves_a_checkpoint_deletes_its_cluster_and_continues_when_resumed(
    scene: OperatedScene,
) -> None:
    job = scene.create("paused", policy={"maxAttempts": 1})
    first = job.attempt(1).run()
    driver = first.driver()
    assert driver.post(10).body == {"stop": False}
    job.set(suspend=True)
    job.until(lambda job: job.why("Suspended") == "Unknown Stopping")
    assert driver.post(11).body == {"stop": True}
    assert first.exists, "it may take its time for a checkpoint"
    assert driver.end(INTERRUPTED, step=11).status == 200
    job.until_phase("Suspended")
    job.until(lambda job: not job.ray_jobs() and not job.pods())
    is_left_alone(job)
    job.set(suspend=False)
    job.attempt(2).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    assert job.reasons == ["Suspended", "Succeeded"]
    job.until(lambda job: "Succeeded" in job.event_reasons())
    events = job.event_reasons()
    assert [events[name] for name in ("Suspending", "Suspended", "Resumed")] == [1, 1, 1]


def test_a_job_that_is_created_suspended_waits_without_a_cluster(scene: OperatedScene) -> None:
    job = scene.create("asleep", policy={"suspend": True})
    job.until_phase("Suspended")
    is_left_alone(job)
    assert (job.ray_jobs(), job.attempts) == ([], [])
    job.set(suspend=False)
    job.attempt(1)


def test_a_canceled_job_ends_permanently(scene: OperatedScene) -> None:
    job = scene.create("unwanted")
    first = job.attempt(1).run()
    job.set(cancel=True)
    job.until(lambda job: job.attempts[-1].get("stoppingAt"))
    assert first.driver().end(INTERRUPTED).status == 200
    job.until_phase("Failed")
    assert (job.failure, job.reasons) == ("Canceled", ["Canceled"])
    job.until(lambda job: not job.ray_jobs())
    is_left_alone(job)


def test_a_job_that_is_canceled_before_it_runs_ends_at_once(scene: OperatedScene) -> None:
    job = scene.create("regretted")
    job.attempt(1).start()
    job.set(cancel=True)
    job.until_phase("Failed")
    assert job.failure == "Canceled"
    job.until(lambda job: not job.ray_jobs() and not job.pods())


def test_a_job_that_takes_too_long_is_asked_to_stop_and_fails(scene: OperatedScene) -> None:
    job = scene.create("slow", policy={"deadlineSeconds": 2})
    first = job.attempt(1).run()
    job.until(lambda job: job.attempts[-1].get("stoppingAt"))
    driver = first.driver()
    assert driver.post(20).body == {"stop": True}
    assert driver.end(INTERRUPTED, step=20).status == 200
    job.until_phase("Failed")
    assert job.failure == "DeadlineExceeded"
    assert "deadlineSeconds" in job.status["failure"]["advice"]
    job.until(lambda job: not job.ray_jobs())
    is_left_alone(job)


# ---- deletion -----------------------------------------------------------------------------------


def test_a_deleted_job_goes_at_once_and_its_objects_follow_but_not_its_output(
    scene: OperatedScene,
) -> None:
    job = scene.create("left")
    attempt = job.attempt(1).run()
    attempt.hold(attempt.worker)
    job.delete()
    job.until_gone()
    job.until(lambda job: job.pods() == [attempt.worker])
    job.until(lambda job: not job.ray_jobs())
    attempt.let_go(attempt.worker)
    job.until(lambda job: not job.pods() and not job.config_maps())
    assert scene.proxy.requests(on("PATCH", f"/jobs/{job.name}-erase$")) == []


def test_a_foreground_deletion_waits_for_the_pods_without_the_operator(
    scene: OperatedScene,
) -> None:
    job = scene.create("watched")
    attempt = job.attempt(1).run()
    attempt.hold(attempt.worker)
    scene.operator.kill()
    job.delete("Foreground")
    job.until(lambda job: job.pods() == [attempt.worker])
    consistently(lambda: job.exists)
    attempt.let_go(attempt.worker)
    job.until_gone()


def test_a_finished_job_can_be_deleted_without_the_operator(scene: OperatedScene) -> None:
    """Otherwise nobody could delete a namespace once the operator is uninstalled."""
    job = scene.create("orphan")
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    job.until(lambda job: not job.ray_jobs())
    scene.operator.kill()
    job.delete()
    job.until_gone()


def test_the_finalizer_of_an_earlier_release_is_removed_from_a_finished_job(
    scene: OperatedScene,
) -> None:
    job = scene.create("upgraded")
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    job.until(lambda job: not job.ray_jobs())
    scene.operator.kill()
    scene.api.merge(job.path, {"metadata": {"finalizers": [FINALIZER]}})
    scene.operator.start()
    job.until(lambda job: "finalizers" not in job.body["metadata"])
    is_left_alone(job)


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
@pytest.mark.parametrize("end", ["Complete", "Failed"])
def test_deleting_a_job_erases_its_output_if_its_policy_says_so(
    scene: OperatedScene, propagation: str, end: str
) -> None:
    name = f"erased-{propagation}-{end}".lower()
    output = {"uri": f"pvc://models/{name}", "deletionPolicy": "Delete"}
    job = scene.create(name, output=output)
    attempt = job.attempt(1).run()
    attempt.hold(attempt.head)
    job.delete(propagation)
    path = f"/apis/batch/v1/namespaces/{scene.namespace}/jobs/{name}-erase"
    job.until(lambda job: job.pods() == [attempt.head])
    consistently(lambda: scene.api.find(path) is None)
    assert job.why("Running") == "False Deleting"
    attempt.let_go(attempt.head)
    job.until(lambda _: scene.api.find(path))
    consistently(lambda: job.exists)
    _finish(scene, path, end)
    job.until_gone()
    # No deletion waits for events: the job may be removed first.
    eventually(lambda: job.event_reasons()["OutputLeft"] == (end == "Failed"))


def _finish(scene: OperatedScene, path: str, end: str) -> None:
    """End the erasing Job as Complete or Failed, as Kubernetes' own controller does."""
    name = path.rpartition("/")[2]
    if end == "Failed":
        scene.api.merge(path, {"spec": {"activeDeadlineSeconds": 1}})
        return
    pods = f"/api/v1/namespaces/{scene.namespace}/pods"
    chosen = f"batch.kubernetes.io/job-name={name}"
    (pod,) = eventually(lambda: scene.api.list(pods, labelSelector=chosen))
    succeeded = {"status": {"phase": "Succeeded"}}
    scene.api.merge(f"{pods}/{pod['metadata']['name']}/status", succeeded)


def test_deleting_a_job_without_attempts_erases_nothing(scene: OperatedScene) -> None:
    output = {"uri": "pvc://models/other", "deletionPolicy": "Delete"}
    job = scene.create("idle", output=output, policy={"suspend": True})
    job.until_phase("Suspended")
    job.delete()
    job.until_gone()
    assert scene.proxy.requests(on("PATCH", "/jobs/idle-erase$")) == []


def test_a_job_created_again_with_a_deleted_jobs_name_starts_with_attempt_one(
    scene: OperatedScene,
) -> None:
    first = scene.create("phoenix")
    old = first.attempt(1).run().body["metadata"]["uid"]
    first.delete()
    first.until_gone()
    second = scene.create("phoenix")
    attempt = second.attempt(1)
    second.until(lambda _: attempt.uid not in (None, old))
    attempt.run().end(SUCCEEDED)
    second.until_phase("Succeeded")
    assert second.reasons == ["Succeeded"]


def test_a_finished_job_is_deleted_when_its_time_to_live_expires(scene: OperatedScene) -> None:
    job = scene.create("brief", policy={"ttlSecondsAfterFinished": 2})
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    job.until_gone()


# ---- several jobs -------------------------------------------------------------------------------


def test_jobs_of_two_kinds_may_share_a_name(scene: OperatedScene) -> None:
    tuned, aligned = scene.create("twin"), scene.create("twin", "AlignmentJob")
    assert {tuned.attempt(1).run().name, aligned.attempt(1).run().name} == {"twin-1", "twin-a1"}
    tuned.attempt(1).end(SUCCEEDED)
    tuned.until_phase("Succeeded")
    tuned.until(lambda job: not job.ray_jobs())
    assert (aligned.phase, aligned.ray_jobs()) == ("Running", ["twin-a1"])
    tuned.delete()
    tuned.until_gone()
    consistently(lambda: (aligned.phase, len(aligned.pods())) == ("Running", 2))
    aligned.attempt(1).end(SUCCEEDED)
    aligned.until_phase("Succeeded")
    assert aligned.reasons == ["Succeeded"]


def test_a_job_waits_for_the_job_whose_model_it_names(scene: OperatedScene) -> None:
    later = scene.create("later", model={"uri": "job://earlier"})
    later.until(lambda job: job.why("Planned") == "False WaitingForModel")
    consistently(lambda: later.ray_jobs() == [])
    earlier = scene.create("earlier")
    earlier.attempt(1).run().end(SUCCEEDED)
    earlier.until_phase("Succeeded")
    later.attempt(1)
    later.until(lambda job: job.why("Planned") == "True Planned")
    assert later.event_reasons()["WaitingForModel"] == 1


def test_a_job_that_needs_the_model_of_a_failed_job_fails(scene: OperatedScene) -> None:
    parent = scene.create("hopeless")
    parent.attempt(1).run().end(FATAL)
    parent.until_phase("Failed")
    child = scene.create("heir", model={"uri": "job://hopeless"})
    child.until_phase("Failed")
    assert child.failure == "PlanRejected"
    assert "job hopeless failed" in child.status["failure"]["message"]


# ---- the operator is killed ---------------------------------------------------------------------


def test_an_operator_that_is_killed_repeatedly_loses_nothing_and_repeats_nothing(
    scene: OperatedScene,
) -> None:
    job = scene.create("survivor", policy={"backoffSeconds": 0})
    first = job.attempt(1)
    scene.restart()
    first.start()
    scene.operator.kill()
    first.set(jobDeploymentStatus="Running", jobStatus="RUNNING")
    scene.operator.start()
    job.until(lambda job: job.attempts[-1].get("runningAt"))
    assert first.driver().post(50).status == 200
    job.until(lambda job: job.status.get("progress", {}).get("step") == 50)
    scene.operator.kill()
    first.end(RETRYABLE)
    scene.operator.start()
    second = job.attempt(2).run()
    scene.operator.kill()
    second.end(SUCCEEDED)
    scene.operator.start()
    job.until_phase("Succeeded")
    assert job.reasons == ["DataUnreadable", "Succeeded"]
    scene.restart()
    job.until(lambda job: not job.ray_jobs())
    is_left_alone(job)
    assert max(job.event_reasons()[name] for name in ("AttemptEnded", "Succeeded")) == 1
    assert max(job.event_reasons()[name] for name in ("AttemptStarted", "Running")) <= 2


def test_a_restarted_operator_handles_what_happened_while_it_was_down(scene: OperatedScene) -> None:
    running, doomed = scene.create("away-running"), scene.create("away-doomed")
    running.attempt(1).run()
    doomed.attempt(1).run()
    scene.operator.kill()
    late = scene.create("away-late")
    running.attempt(1).end(SUCCEEDED)
    doomed.delete()
    scene.operator.start()
    running.until_phase("Succeeded")
    doomed.until_gone()
    doomed.until(lambda job: not job.ray_jobs() and not job.pods())
    late.attempt(1)
    assert "ERROR" not in scene.operator.log
