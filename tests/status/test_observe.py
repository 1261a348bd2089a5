"""A job's life as `observe` tells it: every transition, every order of arrival, every death."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.status.world import (
    INTERRUPTED,
    SUCCESS,
    UID,
    Died,
    World,
    failed,
    new_job,
    pod,
    post,
    ray_job,
)
from tuneyard.api.pods import GRACE_SECONDS
from tuneyard.api.progress import Outcome, Post
from tuneyard.api.status import Result, StageStatus
from tuneyard.errors import Fault, PlanError
from tuneyard.status.observe import (
    MAX_ATTEMPTS,
    PODS_SECONDS,
    Decision,
    Waiting,
    is_finished,
    wants_stop,
)
from tuneyard.status.observed import Obstacle, Trouble, Workload


def world(**policy: Any) -> World:
    return World(new_job(**{f"runPolicy__{name}": value for name, value in policy.items()}))


def running(**policy: Any) -> World:
    """A world whose first attempt runs."""
    made = world(**policy)
    made.run()
    return made


def unchanged(played: World) -> None:
    """Looking twice more changes nothing, whatever the time."""
    for seconds in (0.0, 1.0):
        played.wait(seconds)
        assert played.decide().status == played.status


# ---- planning -----------------------------------------------------------------------------------


class TestPlanning:
    def test_the_first_attempt_stands_in_the_status_before_it_is_started(self) -> None:
        played = world()
        decision = played.decide()
        assert decision.start == 1
        assert [a.number for a in decision.status.attempts] == [1]
        assert decision.status.attempts[0].ray_job == "minimal-1"
        assert decision.status.attempts[0].ray_job_uid is None
        assert decision.status.phase == "Pending"
        assert decision.status.plan_digest is not None
        assert [s.name for s in decision.status.stages] == ["prepare", "sft", "export"]

    def test_a_plan_that_cannot_be_carried_out_ends_the_job_with_the_faults(self) -> None:
        played = world()
        played.planned = PlanError([Fault("spec.model.uri", "job x failed")])
        decision = played.look()
        assert decision.start is None
        assert played.phase == "Failed"
        assert played.why("Planned") == "False PlanRejected"
        assert played.why("Failed") == "True PlanRejected"
        assert played.status.failure
        assert "job x failed" in played.status.failure.message
        assert played.status.attempts == []
        unchanged(played)

    def test_a_corrected_spec_gets_a_second_chance(self) -> None:
        played = world()
        played.planned = PlanError([Fault("spec.model.uri", "no")])
        played.look()
        played.planned = None
        played.edit()
        assert not is_finished(played.job)
        assert played.look().start == 1
        assert (played.phase, played.status.failure) == ("Pending", None)
        assert played.why("Failed") == "absent"
        assert played.why() == "False Starting"
        assert played.why("Planned") == "True Planned"

    def test_a_spec_that_is_rejected_again_failed_at_the_first_rejection(self) -> None:
        played = world(ttlSecondsAfterFinished=60)
        played.planned = PlanError([Fault("spec.model.uri", "no")])
        played.look()
        since = played.condition("Failed")
        played.wait(10)
        played.edit()
        played.look()
        again = played.condition("Failed")
        assert since
        assert again
        assert since.last_transition_time == again.last_transition_time
        assert played.status.observed_generation == 2

    def test_a_job_waits_for_the_job_that_makes_its_model(self) -> None:
        played = world()
        played.planned = Waiting("WaitingForModel", "job base is not done yet: Running")
        decision = played.look()
        assert (decision.start, decision.wake_after) == (None, 15.0)
        assert (played.phase, played.why("Planned")) == ("Pending", "False WaitingForModel")
        assert played.status.plan_digest is None
        unchanged(played)
        played.planned = None
        assert played.look().start == 1

    def test_a_rejected_job_that_waits_after_its_correction_is_not_called_failed(self) -> None:
        played = world()
        played.planned = PlanError([Fault("spec.model.uri", "no")])
        played.look()
        played.edit()
        played.planned = Waiting("WaitingForModel", "job base is not done yet")
        played.look()
        assert (played.phase, played.why("Failed")) == ("Pending", "absent")
        assert played.status.failure is None

    def test_a_waiting_job_can_be_cancelled(self) -> None:
        played = world()
        played.planned = Waiting("WaitingForModel", "job base is not done yet")
        played.look()
        played.edit(cancel=True)
        played.look()
        assert played.why("Failed") == "True Cancelled"
        played.edit(cancel=False)
        assert is_finished(played.job), "cancelled is for good"

    def test_a_job_created_suspended_is_planned_and_starts_nothing(self) -> None:
        played = world(suspend=True)
        played.settle()
        assert (played.phase, played.why("Suspended")) == ("Suspended", "True Suspended")
        assert played.created == []
        assert played.status.plan_digest is not None
        unchanged(played)

    def test_leftovers_of_a_deleted_job_of_this_name_go_first(self) -> None:
        played = world()
        old = ray_job(1, owner="another-uid", uid="old", job_status="RUNNING")
        played.ray_jobs[old.name] = old
        played.add_pods(pod(1))
        decision = played.look()
        assert (decision.start, decision.stop) == (None, ("minimal-1",))
        played.collect()
        assert played.look().start is None, "its pods are still there"
        played.collect()
        assert played.look().start == 1

    def test_a_namesake_that_shows_up_late_is_never_taken_for_the_attempt(self) -> None:
        played = world()
        played.dies_at = 0
        played.dies_after = True
        with pytest.raises(Died):
            played.look()
        played.ray_jobs["minimal-1"] = ray_job(
            1, owner="another-uid", uid="old", job_status="SUCCEEDED"
        )
        decision = played.look()
        assert (decision.start, decision.stop) == (None, ("minimal-1",))
        assert (played.phase, played.attempt.ray_job_uid) == ("Pending", None)


# ---- an attempt that starts ---------------------------------------------------------------------


class TestStarting:
    def test_the_ray_jobs_identity_is_kept(self) -> None:
        played = world()
        played.look()
        played.look()
        assert played.attempt.ray_job_uid == "ray-1-0"
        assert (played.phase, played.why()) == ("Pending", "False Starting")
        unchanged(played)

    @pytest.mark.parametrize(
        ("trouble", "reason"),
        [
            (Trouble("Unschedulable", "0/1 nodes: Insufficient nvidia.com/gpu"), "Unschedulable"),
            (Trouble("ImagePullBackOff", "Back-off", "ray-worker"), "ImagePullFailed"),
            (
                Trouble("Unschedulable", '0/1: persistentvolumeclaim "models" not found.'),
                "VolumeMissing",
            ),
            (
                Trouble("CreateContainerConfigError", 'secret "hf" not found', "ray-worker"),
                "SecretMissing",
            ),
        ],
    )
    def test_a_pod_that_cannot_start_is_named_and_after_the_deadline_fails_the_job(
        self, trouble: Trouble, reason: str
    ) -> None:
        played = world(startDeadlineSeconds=600)
        played.start()
        played.add_pods(pod(1, "worker", trouble, phase="Pending"))
        played.look()
        assert (played.phase, played.why()) == ("Pending", f"False {reason}")
        assert played.attempt.running_at is None
        unchanged(played)
        played.wait(598)
        assert played.look().wake_after == 1
        assert played.phase == "Pending"
        played.wait(2)
        played.look()
        assert (played.phase, played.why("Failed")) == ("Failed", f"True {reason}")
        assert played.status.failure
        assert played.status.failure.advice

    def test_a_worker_without_the_memory_to_start_fails_the_job_at_once(self) -> None:
        """KubeRay would put one doomed pod after the other in its place."""
        played = world()
        played.start()
        killed = Trouble("OOMKilled", "exit code 137", "ray-worker")
        played.add_pods(pod(1, "worker", killed, phase="Failed"))
        played.look()
        assert (played.phase, played.why("Failed")) == ("Failed", "True OutOfMemory")
        assert played.status.failure
        assert "compute.memory" in played.status.failure.advice

    def test_quota_that_keeps_pods_from_being_made_is_named(self) -> None:
        played = world()
        played.start()
        played.pods.clear()
        played.warnings = ('pods "x" is forbidden: exceeded quota: team, requested: cpu=4',)
        played.look()
        assert played.why() == "False QuotaExceeded"

    def test_trouble_that_passes_is_forgotten(self) -> None:
        played = world()
        played.start()
        played.add_pods(pod(1, "worker", Trouble("Unschedulable", "full"), phase="Pending"))
        played.look()
        played.add_pods(pod(1, "worker"))
        played.look()
        assert played.why() == "False Starting"

    def test_the_driver_runs_when_kuberay_says_so(self) -> None:
        played = running()
        assert (played.phase, played.why()) == ("Running", "True Running")
        assert played.attempt.running_at
        unchanged(played)

    def test_the_driver_runs_when_it_posts_before_kuberay_says_so(self) -> None:
        played = world()
        played.start()
        played.post = post(1, 3)
        played.look()
        assert played.phase == "Running"

    def test_the_start_deadline_does_not_count_the_time_in_the_queue(self) -> None:
        played = world(queue="team-a", startDeadlineSeconds=600)
        played.look()
        played.look()
        played.wait(7200)
        played.look()
        assert (played.phase, played.why("Admitted")) == ("Queued", "False Queued")
        played.ray(suspended=False)
        played.look()
        assert (played.phase, played.why("Admitted")) == ("Pending", "True Admitted")
        played.wait(599)
        played.look()
        assert played.phase == "Pending"
        played.wait(2)
        played.look()
        assert played.why("Failed") == "True StartTimeout"


class TestObstacles:
    @pytest.mark.parametrize(
        ("obstacle", "reason"),
        [
            (Obstacle(404, "NotFound", "404 page not found"), "KubeRayMissing"),
            (Obstacle(403, "Forbidden", "exceeded quota: team, used: 1"), "QuotaExceeded"),
            (Obstacle(500, "InternalError", "failed calling webhook"), "ClusterUnavailable"),
        ],
    )
    def test_what_may_pass_is_tried_again_until_the_start_deadline(
        self, obstacle: Obstacle, reason: str
    ) -> None:
        played = world(startDeadlineSeconds=60)
        played.obstacle = obstacle
        played.look()
        decision = played.look()
        assert (decision.start, decision.wake_after) == (1, 15.0)
        assert (played.phase, played.why()) == ("Pending", f"False {reason}")
        unchanged(played)
        played.wait(61)
        assert played.look().start is None
        assert played.why("Failed") == f"True {reason}"
        assert played.created == []

    def test_an_obstacle_that_passes_leaves_no_trace(self) -> None:
        played = world()
        played.obstacle = Obstacle(404, "NotFound", "404 page not found")
        played.look()
        played.look()
        played.obstacle = None
        played.look()
        played.look()
        assert (played.created, played.why()) == (["minimal-1"], "False Starting")

    def test_what_is_invalid_fails_at_once(self) -> None:
        played = world()
        played.obstacle = Obstacle(422, "Invalid", 'RayJob "x" is invalid: spec.y')
        played.look()
        played.look()
        assert played.why("Failed") == "True RayJobRefused"


# ---- progress -----------------------------------------------------------------------------------


class TestProgress:
    def test_the_newest_post_stands_in_the_status(self) -> None:
        played = running()
        stages = [
            StageStatus(name="prepare", kind="prepare", state="Succeeded", metrics={"rows": 9}),
            StageStatus(name="sft", kind="sft", state="Running"),
        ]
        played.post = post(1, 7, stages=[s.model_dump() for s in stages])
        played.look()
        progress = played.status.progress
        assert progress
        assert (progress.step, progress.total_steps, progress.percentage) == (
            7,
            100,
            7,
        )
        assert progress.metrics == {"loss": 2.0}
        assert [s.state for s in played.status.stages] == ["Succeeded", "Running", "Pending"]
        assert (played.attempt.stage, played.attempt.last_step) == ("sft", 7)
        unchanged(played)

    def test_posts_of_other_attempts_are_not_taken(self) -> None:
        played = running()
        for attempt in (2, 7):
            played.post = post(attempt, 9, outcome=SUCCESS)
            before = played.status
            played.look()
            assert played.status == before

    def test_a_stage_that_is_not_in_the_plan_is_not_taken(self) -> None:
        played = running()
        strange = [{"name": "mine", "kind": "sft"}, {"name": "sft", "kind": "export"}]
        played.post = post(1, 1, stages=strange)
        played.look()
        assert [s.name for s in played.status.stages] == ["prepare", "sft", "export"]
        assert [s.kind for s in played.status.stages] == ["prepare", "sft", "export"]

    def test_a_done_stage_stays_done_until_it_really_runs_again(self) -> None:
        played = running()
        done = {"name": "prepare", "kind": "prepare", "state": "Succeeded", "startedAt": "then"}
        played.post = post(1, 1, stages=[done])
        played.look()
        for state, expected in (
            ("Pending", "Succeeded"),
            ("Skipped", "Succeeded"),
            ("Running", "Running"),
        ):
            played.post = post(1, 2, stages=[{**done, "state": state}])
            played.look()
            assert played.status.stages[0].state == expected

    def test_kubeflows_own_protocol_is_enough_for_percentage_and_metrics(self) -> None:
        played = running()
        played.post = Post.model_validate(
            {
                "trainerStatus": {
                    "progressPercentage": 12,
                    "metrics": [{"name": "loss", "value": "1.5"}, {"name": "x", "value": "NaN"}],
                }
            }
        )
        played.wait(5)
        played.look()
        progress = played.status.progress
        assert progress
        assert (progress.percentage, progress.metrics) == (12, {"loss": 1.5})
        assert progress.last_updated_time == "2030-01-01T00:00:05Z"
        unchanged(played)

    def test_a_post_without_an_attempt_starts_none(self) -> None:
        played = world()
        played.start()
        played.post = Post.model_validate({"trainerStatus": {"progressPercentage": 12}})
        played.look()
        assert played.attempt.running_at is None

    def test_names_of_metrics_do_not_pile_up(self) -> None:
        played = running()
        for number in range(6):
            metrics = [{"name": f"m{number}.{i}", "value": 1.0} for i in range(100)]
            played.post = Post.model_validate({"trainerStatus": {"metrics": metrics}})
            played.look()
        assert played.status.progress
        assert len(played.status.progress.metrics) <= 256

    def test_the_last_post_is_in_the_attempt_before_it_is_closed(self) -> None:
        played = running()
        played.post = post(1, 5)
        played.look()
        played.post = post(1, 61)
        played.ray(job_status="FAILED", deployment_status="Failed", reason="AppFailed")
        played.look()
        assert (played.attempt.last_step, played.attempt.stage) == (61, "sft")

    def test_the_last_post_is_in_an_attempt_whose_ray_job_is_lost(self) -> None:
        played = running()
        played.post = post(1, 61)
        played.ray_jobs.clear()
        played.look()
        assert played.attempt.last_step == 61

    def test_steps_lost_are_counted_when_the_stage_is_taken_up_again(self) -> None:
        played = running()
        played.end(failed("WorkerDied", retryable=True), step=57)
        played.next_attempt()
        played.run()
        played.post = post(2, 50, resumedStep=50)
        played.look()
        assert [a.steps_lost for a in played.status.attempts] == [7, None]
        unchanged(played)

    def test_steps_lost_are_counted_over_an_attempt_that_never_trained(self) -> None:
        played = running()
        played.end(failed("WorkerDied", retryable=True), step=57)
        played.next_attempt()
        played.run()
        played.ray(job_status="FAILED", deployment_status="Failed", reason="AppFailed")
        played.look()
        played.next_attempt()
        played.run()
        played.post = post(3, 50, resumedStep=50)
        played.look()
        assert [a.steps_lost for a in played.status.attempts] == [7, None, None]

    def test_another_stage_lost_nothing_of_this_one(self) -> None:
        played = running()
        played.end(failed("WorkerDied", retryable=True), step=57)
        played.next_attempt()
        played.run()
        played.post = post(2, 5, stage="export", resumedStep=0)
        played.look()
        assert played.status.attempts[0].steps_lost is None


# ---- success ------------------------------------------------------------------------------------


class TestSuccess:
    def test_the_ending_brings_the_result_and_the_cluster_goes(self) -> None:
        played = running()
        played.post = post(1, 100, outcome=SUCCESS)
        decision = played.look()
        assert (played.phase, played.why("Succeeded")) == ("Succeeded", "True Succeeded")
        assert played.why() == "False Succeeded"
        assert played.status.result == SUCCESS.result
        assert played.attempt.reason == "Succeeded"
        assert decision.stop == ("minimal-1",)
        assert is_finished(played.job)

    def test_a_driver_that_could_not_report_succeeds_all_the_same(self) -> None:
        played = running()
        played.post = post(1, 80)
        played.ray(job_status="SUCCEEDED")  # its submitter has not ended yet
        played.look()
        assert played.phase == "Succeeded"
        assert played.status.result == Result(uri="s3://models/minimal/result")
        assert {s.state for s in played.status.stages} == {"Succeeded"}
        assert played.status.progress
        assert played.status.progress.percentage == 100

    def test_an_ending_counts_even_if_the_ray_job_is_gone(self) -> None:
        played = running()
        played.ray_jobs.clear()
        played.post = post(1, 100, outcome=SUCCESS)
        played.look()
        assert played.phase == "Succeeded"

    def test_success_wins_over_a_wish_to_stop(self) -> None:
        for wish in ({"cancel": True}, {"suspend": True}):
            played = running()
            played.edit(**wish)
            played.post = post(1, 100, outcome=SUCCESS)
            played.look()
            assert played.phase == "Succeeded"

    def test_a_finished_status_never_changes(self) -> None:
        played = running()
        played.end(SUCCESS)
        status = played.status
        played.edit(cancel=True, suspend=True, max_attempts=9)
        played.post = post(1, 3, outcome=failed("Late"))
        played.ray_jobs["minimal-2"] = ray_job(2)
        played.wait(99999)
        decision = played.look()
        assert (decision.status, decision.start) == (status, None)
        assert decision.stop == ("minimal-2",)

    def test_the_job_is_deleted_when_its_time_is_over(self) -> None:
        played = running(ttlSecondsAfterFinished=60)
        played.end(SUCCESS)
        played.wait(40)
        decision = played.look()
        assert (decision.delete, decision.wake_after) == (False, 20)
        played.wait(20)
        assert played.look().delete


# ---- failure and what follows -------------------------------------------------------------------


class TestFailure:
    def test_a_permanent_failure_ends_the_job_with_its_advice(self) -> None:
        played = running()
        done = [
            {"name": "prepare", "kind": "prepare", "state": "Succeeded"},
            {"name": "sft", "kind": "sft", "state": "Running"},
        ]
        played.post = post(1, 5, stages=done, outcome=failed("LossNotFinite", advice="Lower it."))
        played.look()
        assert (played.phase, played.why("Failed")) == ("Failed", "True LossNotFinite")
        assert played.status.failure
        assert played.status.failure.advice == "Lower it."
        assert [s.state for s in played.status.stages] == ["Succeeded", "Failed", "Pending"]
        assert played.why("Succeeded") == "absent"
        played.wait(9999)
        assert played.look().start is None

    def test_the_drivers_last_words_count_if_no_post_got_through(self) -> None:
        played = running()
        words = failed("RowUnreadable", advice="Mend it.").model_dump_json(by_alias=True)
        log = f"Job entrypoint command failed with exit code 1\nTUNEYARD-OUTCOME {words}\nbye"
        played.ray(job_status="FAILED", deployment_status="Failed", reason="AppFailed", message=log)
        played.look()
        assert played.why("Failed") == "True RowUnreadable"

    def test_the_next_attempt_waits_for_the_pods_and_the_back_off(self) -> None:
        played = running(backoffSeconds=30)
        decision = played.look()
        played.end(failed("WorkerDied", retryable=True))
        assert (played.phase, played.why()) == ("Pending", "False Retrying")
        assert [s.state for s in played.status.stages] == ["Pending"] * 3
        assert played.attempt.reason == "WorkerDied"
        played.wait(100)
        for _ in range(3):
            assert played.look().start is None, "the RayJob is still there"
        played.collect()
        decision = played.look()
        assert (decision.start, decision.wake_after) == (None, 15.0), "its pods are still there"
        played.collect()
        assert played.look().start == 2
        assert [a.number for a in played.status.attempts] == [1, 2]

    def test_pods_that_do_not_go_are_named_and_waited_for(self) -> None:
        played = running()
        played.end(failed("DiskFull", retryable=True))
        played.ray_jobs.clear()
        played.wait(PODS_SECONDS)
        played.look()
        assert played.why() == "False Retrying"
        played.wait(1)
        assert played.look().start is None
        assert (played.phase, played.why()) == ("Pending", "False PodsLeft")
        assert played.told()[-1] == "PodsLeft"
        unchanged(played)
        played.pods.clear()
        assert played.look().start == 2

    def test_the_back_off_doubles(self) -> None:
        played = running(backoffSeconds=30, maxAttempts=4)
        for number, wait in ((1, 30), (2, 60), (3, 120)):
            played.end(failed("WorkerDied", retryable=True))
            closed = played.now
            for _ in range(3):
                played.look()
                played.collect()
            decision = played.look()
            assert (decision.start, decision.wake_after) == (None, wait)
            played.now = closed
            played.wait(wait)
            assert played.look().start == number + 1
            played.run()

    def test_after_the_last_attempt_the_job_fails_with_the_last_reason(self) -> None:
        played = running(maxAttempts=2)
        played.end(failed("DiskFull", retryable=True))
        played.next_attempt()
        played.run()
        played.end(failed("Unreachable", retryable=True, advice="Open it."))
        assert (played.phase, played.why("Failed")) == ("Failed", "True Unreachable")
        assert played.status.failure
        assert played.status.failure.advice == "Open it."
        found = played.condition("Failed")
        assert found
        assert found.message == "it was Unreachable. Open it."
        assert [a.reason for a in played.status.attempts] == ["DiskFull", "Unreachable"]

    def test_a_vanished_worker_is_explained_by_evidence_that_comes_later(self) -> None:
        """The driver's post is quicker than the kubelet's word, also at the last attempt."""
        for policy in ({}, {"maxAttempts": 1}):
            played = running(**policy)
            played.end(failed("WorkerDied", retryable=True))
            assert played.phase == "Pending"
            played.add_pods(pod(1, "worker", Trouble("OOMKilled", "exit code 137", "ray-worker")))
            played.look()
            assert (played.attempt.reason, played.phase) == ("OutOfMemory", "Failed")
            assert played.status.failure
            assert "compute.memory" in played.status.failure.advice

    def test_a_vanished_worker_of_the_last_attempt_fails_the_job_once_no_evidence_can_come(
        self,
    ) -> None:
        played = running(maxAttempts=1)
        played.end(failed("WorkerDied", retryable=True))
        assert played.phase == "Pending"
        played.settle()
        assert played.why("Failed") == "True WorkerDied"
        assert played.created == ["minimal-1"]

    def test_preemption_does_not_count_and_is_not_waited_for(self) -> None:
        played = running(maxAttempts=1, backoffSeconds=3600)
        for _ in range(3):
            played.add_pods(
                pod(played.attempt.number, "worker", Trouble("DisruptionTarget", "preempted"))
            )
            played.end(failed("WorkerDied", retryable=True))
            assert (played.attempt.reason, played.phase) == ("Preempted", "Pending")
            played.settle(4)
            played.run()
        assert [a.reason for a in played.status.attempts] == ["Preempted"] * 3 + [None]

    def test_interruption_without_a_wish_is_preemption(self) -> None:
        played = running()
        played.end(INTERRUPTED)
        assert (played.attempt.reason, played.phase) == ("Preempted", "Pending")

    def test_a_ray_job_that_somebody_deletes_is_followed_by_the_next_attempt(self) -> None:
        played = running()
        played.ray(deleting=True)
        played.look()
        assert (played.attempt.reason, played.phase) == ("RayJobDeleted", "Pending")
        played.next_attempt()
        assert played.created == ["minimal-1", "minimal-2"]

    def test_a_ray_job_is_missing_only_after_ten_seconds(self) -> None:
        played = running()
        played.hidden = True
        decision = played.look()
        assert decision.wake_after == 10
        played.wait(9)
        played.look()
        assert played.attempt.finished_at is None
        played.hidden = False
        played.look()
        played.hidden = True
        played.wait(9)
        played.look()
        assert (played.attempt.finished_at, played.phase) == (None, "Running")
        played.wait(10)
        played.look()
        assert played.attempt.reason == "RayJobDeleted"

    def test_a_ray_job_that_somebody_made_anew_is_not_the_attempts(self) -> None:
        played = running()
        played.ray(uid="made-anew", job_status="")
        decision = played.look()
        assert played.attempt.reason == "RayJobDeleted"
        assert decision.stop == ("minimal-1",)

    def test_a_driver_that_fails_without_a_word_counts(self) -> None:
        played = running()
        played.end(Outcome(state="Failed", retryable=True))
        assert played.attempt.reason == "DriverError"

    def test_a_reason_that_no_condition_can_carry_does_not_stop_the_job(self) -> None:
        played = running()
        played.end(failed("out of luck!\n" * 9, retryable=False))
        assert played.why("Failed") == "True DriverError"
        assert played.status.failure
        assert "out of luck!" in played.status.failure.message

    def test_a_closed_attempt_is_not_changed_by_a_late_post(self) -> None:
        played = running()
        played.ray(job_status="FAILED", deployment_status="Failed", reason="AppFailed")
        played.look()
        closed = played.attempt
        played.post = post(1, 99, outcome=failed("Late"))
        played.look()
        assert played.attempt == closed
        assert wants_stop(played.job), "its driver shall end"

    def test_attempts_that_do_not_count_are_bounded_too(self) -> None:
        played = running()
        attempts = [
            played.attempt.model_copy(
                update={"number": n, "reason": "Preempted", "finished_at": "2030-01-01T00:00:00Z"}
            )
            for n in range(1, MAX_ATTEMPTS + 1)
        ]
        status = played.status.model_copy(update={"attempts": attempts})
        played = World(played.job.model_copy(update={"status": status}))
        played.settle()
        assert played.why("Failed") == "True TooManyAttempts"
        assert len(played.status.attempts) == MAX_ATTEMPTS
        assert played.created == []

    def test_a_status_with_the_longest_texts_stays_small(self) -> None:
        played = running(maxAttempts=100)
        long = "x" * 60_000
        for _ in range(100):
            outcome = failed("DiskFull", retryable=True)
            failure = outcome.failure and outcome.failure.model_copy(
                update={"message": long, "advice": long}
            )
            played.end(outcome.model_copy(update={"failure": failure}))
            if played.phase == "Failed":
                break
            played.next_attempt()
            played.run()
        assert len(played.status.attempts) == 100
        assert len(played.status.model_dump_json()) < 300_000


# ---- suspend, cancel, deadline ------------------------------------------------------------------


class TestSuspend:
    def test_the_driver_is_asked_and_waited_for(self) -> None:
        played = running()
        assert not wants_stop(played.job)
        played.edit(suspend=True)
        assert wants_stop(played.job)
        decision = played.look()
        assert (decision.stop, decision.wake_after) == ((), GRACE_SECONDS)
        assert played.attempt.stopping_at
        assert (played.phase, played.why("Suspended")) == ("Running", "Unknown Stopping")
        unchanged(played)
        played.wait(20)
        played.end(INTERRUPTED)
        assert played.attempt.reason == "Suspended"
        assert played.phase == "Pending", "its pods are still there"
        played.settle()
        assert (played.phase, played.why("Suspended")) == ("Suspended", "True Suspended")
        assert played.why() == "False Suspended"
        assert played.created == ["minimal-1"]
        unchanged(played)

    def test_a_driver_that_does_not_answer_is_waited_for_no_longer_than_the_grace_period(
        self,
    ) -> None:
        played = running()
        played.edit(suspend=True)
        played.look()
        played.wait(GRACE_SECONDS - 1)
        played.look()
        assert played.attempt.finished_at is None
        played.wait(1)
        decision = played.look()
        assert (played.attempt.reason, decision.stop) == ("Suspended", ("minimal-1",))

    def test_an_attempt_that_does_not_run_yet_is_closed_at_once(self) -> None:
        played = world()
        played.start()
        played.edit(suspend=True)
        decision = played.look()
        assert (played.attempt.reason, decision.stop) == ("Suspended", ("minimal-1",))

    def test_an_attempt_that_is_not_created_yet_is_closed_at_once(self) -> None:
        played = world()
        played.obstacle = Obstacle(404, "NotFound", "404 page not found")
        played.look()
        played.edit(suspend=True)
        assert played.look().start is None
        played.settle()
        assert (played.phase, played.created) == ("Suspended", [])

    def test_a_resumed_job_goes_on_with_the_next_attempt_which_does_not_count(self) -> None:
        played = running(maxAttempts=1, backoffSeconds=3600)
        played.edit(suspend=True)
        played.look()
        played.end(INTERRUPTED)
        played.settle()
        played.edit(suspend=False)
        decision = played.look()
        assert decision.start == 2
        assert (played.phase, played.why("Suspended")) == ("Pending", "False Resumed")
        played.run()
        played.end(SUCCESS)
        assert played.phase == "Succeeded"
        assert played.why("Suspended") == "absent"

    def test_a_wish_that_is_taken_back_while_the_driver_stops_costs_one_attempt(self) -> None:
        played = running(maxAttempts=1)
        played.edit(suspend=True)
        played.look()
        played.edit(suspend=False)
        assert wants_stop(played.job), "the driver was told already"
        played.look()
        played.end(INTERRUPTED)
        assert played.attempt.reason == "Suspended"
        played.settle(3)
        assert played.created == ["minimal-1", "minimal-2"]
        assert played.why("Suspended") == "False Resumed"

    def test_a_failure_for_good_while_stopping_is_not_hidden(self) -> None:
        played = running()
        played.edit(suspend=True)
        played.look()
        played.end(failed("LossNotFinite"))
        assert played.why("Failed") == "True LossNotFinite"

    def test_a_retryable_failure_while_stopping_is_the_stopping(self) -> None:
        played = running(maxAttempts=1)
        played.edit(suspend=True)
        played.look()
        played.end(failed("WorkerDied", retryable=True))
        assert played.attempt.reason == "Suspended"

    def test_a_ray_job_that_is_deleted_while_stopping_was_suspended(self) -> None:
        for change in ("deleting", "gone"):
            played = running()
            played.edit(suspend=True)
            played.look()
            if change == "deleting":
                played.ray(deleting=True)
            else:
                played.ray_jobs.clear()
                played.look()
                played.wait(11)
            played.look()
            assert played.attempt.reason == "Suspended"


class TestCancel:
    def cancelled(self, played: World) -> None:
        played.edit(cancel=True)
        for _ in range(3):
            played.settle()
            played.wait(GRACE_SECONDS)
        played.look()
        assert (played.phase, played.why("Failed")) == ("Failed", "True Cancelled")
        assert played.why("Suspended") == "absent"
        assert played.ray_jobs == {}
        assert played.pods == {}
        assert not [s for s in played.status.stages if s.state == "Failed"]
        unchanged(played)

    def test_before_planning(self) -> None:
        played = world()
        self.cancelled(played)
        assert played.created == []

    def test_before_the_ray_job_is_there(self) -> None:
        played = world()
        played.obstacle = Obstacle(403, "Forbidden", "exceeded quota")
        played.look()
        self.cancelled(played)

    def test_while_queued(self) -> None:
        played = world(queue="team-a")
        played.look()
        played.look()
        self.cancelled(played)

    def test_while_pending(self) -> None:
        played = world()
        played.start()
        self.cancelled(played)

    def test_while_running_after_a_checkpoint(self) -> None:
        played = running()
        played.edit(cancel=True)
        decision = played.look()
        assert (decision.stop, played.phase) == ((), "Running")
        played.end(INTERRUPTED)
        assert played.attempt.reason == "Cancelled"
        self.cancelled(played)

    def test_while_running_without_an_answer(self) -> None:
        self.cancelled(running())

    def test_between_attempts(self) -> None:
        played = running(backoffSeconds=3000)
        played.end(failed("DiskFull", retryable=True))
        self.cancelled(played)
        assert played.created == ["minimal-1"]

    def test_while_suspending_and_when_suspended(self) -> None:
        played = running()
        played.edit(suspend=True)
        played.look()
        self.cancelled(played)
        played = world(suspend=True)
        played.settle()
        self.cancelled(played)


class TestDeadline:
    def test_the_driver_is_asked_to_stop_and_the_job_fails(self) -> None:
        played = running(deadlineSeconds=1000)
        assert played.look().wake_after == 1000
        played.wait(1000)
        played.look()
        assert wants_stop(played.job)
        played.end(INTERRUPTED)
        assert played.why("Failed") == "True DeadlineExceeded"
        assert played.status.failure
        assert "deadlineSeconds" in played.status.failure.advice

    def test_attempts_are_added_up_and_the_time_between_them_is_not(self) -> None:
        played = running(deadlineSeconds=1000, maxAttempts=5)
        for _ in range(3):
            played.wait(300)
            played.end(failed("DiskFull", retryable=True))
            assert played.phase == "Pending"
            played.next_attempt()
            played.run()
        played.wait(99)
        assert played.look().wake_after == 1
        played.wait(1)
        played.look()
        assert played.attempt.stopping_at
        played.end(INTERRUPTED)
        assert played.why("Failed") == "True DeadlineExceeded"

    def test_no_attempt_starts_when_the_time_is_used_up(self) -> None:
        played = running(deadlineSeconds=1000)
        played.wait(1000)
        played.end(failed("DiskFull", retryable=True))
        assert played.why("Failed") == "True DeadlineExceeded"
        played.settle()
        assert played.created == ["minimal-1"]

    def test_waiting_in_the_queue_is_not_counted(self) -> None:
        played = world(queue="team-a", deadlineSeconds=1000)
        played.look()
        played.look()
        played.wait(99999)
        played.look()
        assert played.phase == "Queued"


# ---- the queue ----------------------------------------------------------------------------------


class TestQueue:
    def test_queued_admitted_running(self) -> None:
        played = world(queue="team-a")
        played.look()
        played.look()
        played.workload = Workload(admitted=False, message="insufficient quota for cpu")
        played.look()
        assert (played.phase, played.why("Admitted")) == ("Queued", "False Queued")
        found = played.condition("Admitted")
        assert found
        assert found.message == "insufficient quota for cpu"
        unchanged(played)
        played.ray(suspended=False)
        played.look()
        assert (played.phase, played.why("Admitted")) == ("Pending", "True Admitted")
        played.run()
        assert played.phase == "Running"

    def test_eviction_while_running_is_followed_by_an_attempt_that_queues(self) -> None:
        for change in ({"suspended": True}, {"deployment_status": "Suspending"}):
            played = running(queue="team-a", maxAttempts=1)
            played.workload = Workload(admitted=False, message="Preempted to accommodate x")
            played.ray(**change)
            decision = played.look()
            assert played.attempt.reason == "Preempted"
            assert "accommodate" in (played.attempt.message or "")
            assert played.why("Admitted") == "False Queued"
            assert (decision.stop, decision.start) == ((), None)
            played.pods.clear()
            assert played.look().stop == ("minimal-1",)
            played.settle(3)
            assert played.created == ["minimal-1", "minimal-2"]
            assert (played.phase, played.why("Admitted")) == ("Queued", "False Queued")

    def test_a_ray_job_that_gives_way_is_left_to_kuberay_while_its_pods_save_a_checkpoint(
        self,
    ) -> None:
        """Deleted while its driver runs, KubeRay has Ray kill the driver."""
        played = running(queue="team-a")
        played.ray(suspended=True, deployment_status="Suspending")
        for _ in range(3):
            decision = played.look()
            assert (decision.stop, decision.start) == ((), None)
            assert decision.wake_after
            played.wait(60)
        assert played.look().stop == ("minimal-1",), "a lost node's pods are not waited for"

    def test_a_ray_job_that_a_queue_takes_back_up_after_its_attempt_is_deleted(self) -> None:
        played = running(queue="team-a")
        played.ray(suspended=True, deployment_status="Suspended")
        assert played.look().stop == ()
        played.ray(suspended=False, deployment_status="Initializing")
        assert played.look().stop == ("minimal-1",)
        assert played.created == ["minimal-1"]

    def test_eviction_before_running_keeps_the_attempt(self) -> None:
        played = world(queue="team-a")
        played.start()
        assert played.why("Admitted") == "True Admitted"
        played.ray(suspended=True, deployment_status="Suspended")
        played.look()
        assert (played.phase, played.why("Admitted")) == ("Queued", "False Queued")
        assert played.attempt.finished_at is None
        played.run()
        assert (played.phase, played.created) == ("Running", ["minimal-1"])


# ---- one at a time ------------------------------------------------------------------------------


class TestOneAtATime:
    def test_nothing_is_created_while_only_pods_are_seen(self) -> None:
        """The watch of RayJobs may lag behind that of pods."""
        played = world()
        played.dies_at, played.dies_after = 0, True
        with pytest.raises(Died):
            played.look()
        played.add_pods(pod(1))
        assert played.look().start is None
        played.pods.clear()
        assert played.look().start == 1

    def test_a_second_ray_job_is_stopped_wherever_it_came_from(self) -> None:
        played = running()
        played.ray_jobs["minimal-9"] = ray_job(9)
        assert played.look().stop == ("minimal-9",)
        assert (played.phase, played.attempt.number) == ("Running", 1)

    def test_a_status_that_was_wiped_begins_anew_without_a_second_cluster(self) -> None:
        played = running()
        played.job = played.job.model_copy(update={"status": None})
        decision = played.look()
        assert (decision.start, decision.stop) == (None, ("minimal-1",))
        played.settle(3)
        assert played.created == ["minimal-1", "minimal-1"]

    def test_nothing_of_another_owner_is_adopted(self) -> None:
        played = running()
        assert [r.owner for r in played.ray_jobs.values()] == [UID]


class TestConditions:
    def test_a_transition_time_changes_with_the_answer_alone(self) -> None:
        played = world()
        played.start()
        since = played.condition("Running")
        played.wait(60)
        played.add_pods(pod(1, "worker", Trouble("Unschedulable", "full"), phase="Pending"))
        played.look()
        later = played.condition("Running")
        assert since
        assert later
        assert since.reason != later.reason
        assert since.last_transition_time == later.last_transition_time
        played.ray(job_status="RUNNING", deployment_status="Running")
        played.look()
        runs = played.condition("Running")
        assert runs
        assert runs.last_transition_time == "2030-01-01T00:01:00Z"

    def test_a_status_survives_json(self) -> None:
        played = running()
        played.end(failed("WorkerDied", retryable=True))
        text = played.status.model_dump_json(by_alias=True, exclude_none=True)
        assert type(played.status).model_validate(json.loads(text)) == played.status


def test_a_decision_is_plain_data() -> None:
    assert isinstance(world().decide(), Decision)
