"""The decisions of `observe`: every transition, in every order of arrival."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from tests.status.simulation import (
    INTERRUPTED,
    PLAN,
    SUCCESS,
    UID,
    KilledError,
    Simulation,
    failed,
    new_job,
    pod,
    post,
    ray_job,
)
from tuneyard.api.compute import Compute
from tuneyard.api.pods import GRACE_SECONDS
from tuneyard.api.progress import Outcome, Post
from tuneyard.api.status import MemoryEstimate, Result, StageCost, StageEstimate, StageStatus
from tuneyard.errors import Fault, PlanError
from tuneyard.rendering.names import plan_digest
from tuneyard.status.observe import (
    KEPT_ATTEMPTS,
    POD_REMOVAL_SECONDS,
    Decision,
    Waiting,
    is_finished,
    should_stop,
)
from tuneyard.status.observed import LOST_SECONDS, CreateError, PodProblem, Workload
from tuneyard.status.times import rfc3339


def simulation(**policy: Any) -> Simulation:
    return Simulation(new_job(**{f"runPolicy__{name}": value for name, value in policy.items()}))


def running(**policy: Any) -> Simulation:
    """Return a simulation whose first attempt runs."""
    sim = simulation(**policy)
    sim.run()
    return sim


def unchanged(sim: Simulation) -> None:
    """Assert that two more reconciles change nothing."""
    for seconds in (0.0, 1.0):
        sim.wait(seconds)
        assert sim.decide().status == sim.status


# ---- planning -----------------------------------------------------------------------------------


class TestPlanning:
    def test_the_first_attempt_is_in_the_status_before_it_is_started(self) -> None:
        sim = simulation()
        decision = sim.decide()
        assert decision.start == 1
        assert [a.number for a in decision.status.attempts] == [1]
        assert decision.status.attempts[0].ray_job == "minimal-1"
        assert decision.status.attempts[0].ray_job_uid is None
        assert decision.status.phase == "Pending"
        assert decision.status.plan_digest is not None
        assert [s.name for s in decision.status.stages] == ["prepare", "sft", "export"]

    def test_a_plan_that_cannot_be_carried_out_ends_the_job_with_the_faults(self) -> None:
        sim = simulation()
        sim.planned = PlanError([Fault("spec.model.uri", "job x failed")])
        decision = sim.reconcile()
        assert decision.start is None
        assert sim.phase == "Failed"
        assert sim.why("Planned") == "False PlanRejected"
        assert sim.why("Failed") == "True PlanRejected"
        assert sim.status.failure
        assert "job x failed" in sim.status.failure.message
        assert sim.status.attempts == []
        unchanged(sim)

    def test_a_corrected_spec_is_planned_again(self) -> None:
        sim = simulation()
        sim.planned = PlanError([Fault("spec.model.uri", "no")])
        sim.reconcile()
        sim.planned = None
        sim.edit()
        assert not is_finished(sim.job)
        assert sim.reconcile().start == 1
        assert (sim.phase, sim.status.failure) == ("Pending", None)
        assert sim.why("Failed") == "absent"
        assert sim.why() == "False Starting"
        assert sim.why("Planned") == "True Planned"

    def test_a_spec_that_is_rejected_again_failed_at_the_first_rejection(self) -> None:
        sim = simulation(ttlSecondsAfterFinished=60)
        sim.planned = PlanError([Fault("spec.model.uri", "no")])
        sim.reconcile()
        since = sim.condition("Failed")
        sim.wait(10)
        sim.edit()
        sim.reconcile()
        again = sim.condition("Failed")
        assert since
        assert again
        assert since.last_transition_time == again.last_transition_time
        assert sim.status.observed_generation == 2

    def test_a_job_waits_for_the_job_that_makes_its_model(self) -> None:
        sim = simulation()
        sim.planned = Waiting("WaitingForModel", "job base is not done yet: Running")
        decision = sim.reconcile()
        assert (decision.start, decision.wake_after) == (None, 15.0)
        assert (sim.phase, sim.why("Planned")) == ("Pending", "False WaitingForModel")
        assert sim.status.plan_digest is None
        unchanged(sim)
        sim.planned = None
        assert sim.reconcile().start == 1

    def test_a_rejected_job_that_waits_after_its_correction_is_not_called_failed(self) -> None:
        sim = simulation()
        sim.planned = PlanError([Fault("spec.model.uri", "no")])
        sim.reconcile()
        sim.edit()
        sim.planned = Waiting("WaitingForModel", "job base is not done yet")
        sim.reconcile()
        assert (sim.phase, sim.why("Failed")) == ("Pending", "absent")
        assert sim.status.failure is None

    def test_a_waiting_job_can_be_canceled(self) -> None:
        sim = simulation()
        sim.planned = Waiting("WaitingForModel", "job base is not done yet")
        sim.reconcile()
        sim.edit(cancel=True)
        sim.reconcile()
        assert sim.why("Failed") == "True Canceled"
        sim.edit(cancel=False)
        assert is_finished(sim.job), "canceled is for good"

    def test_a_job_created_suspended_is_planned_and_starts_nothing(self) -> None:
        sim = simulation(suspend=True)
        sim.settle()
        assert (sim.phase, sim.why("Suspended")) == ("Suspended", "True Suspended")
        assert sim.created == []
        assert sim.status.plan_digest is not None
        unchanged(sim)

    def test_a_job_created_suspended_is_planned_again_when_it_is_resumed(self) -> None:
        """A profile may have changed meanwhile, and no attempt has stored the first plan."""
        sim = simulation(suspend=True)
        sim.settle()
        first = sim.status.plan_digest
        sim.planned = PLAN.model_copy(
            update={"stages": PLAN.stages[:2], "compute": Compute(workers=2)}
        )
        sim.settle()
        assert sim.status.plan_digest == first, "nothing is written while it is suspended"
        sim.edit(suspend=False)
        assert sim.reconcile().start == 1
        assert sim.status.plan_digest == plan_digest(sim.planned) != first
        assert [stage.name for stage in sim.status.stages] == ["prepare", "sft"]
        assert sim.why("Suspended") == "False Resumed"

    def test_a_plan_stays_as_it_is_once_an_attempt_has_begun(self) -> None:
        sim = simulation()
        sim.run()
        first = sim.status.plan_digest
        sim.planned = PLAN.model_copy(update={"compute": Compute(workers=2)})
        sim.end(failed("Flaky", retryable=True))
        sim.next_attempt()
        assert (sim.status.plan_digest, sim.attempt.number) == (first, 2)

    def test_a_resumed_job_whose_plan_is_rejected_now_may_be_corrected(self) -> None:
        sim = simulation(suspend=True)
        sim.settle()
        sim.planned = PlanError([Fault("spec.compute.profile", "no profile a100")])
        sim.edit(suspend=False)
        sim.reconcile()
        assert (sim.phase, sim.why("Planned")) == ("Failed", "False PlanRejected")
        assert (sim.status.plan_digest, sim.status.stages) == (None, [])
        sim.planned = None
        sim.edit()
        assert not is_finished(sim.job)
        assert sim.reconcile().start == 1

    def test_a_resumed_job_whose_model_is_made_again_waits_for_it(self) -> None:
        sim = simulation(suspend=True)
        sim.settle()
        sim.planned = Waiting("WaitingForModel", "the namespace has no job base yet")
        sim.edit(suspend=False)
        assert sim.reconcile().start is None
        assert (sim.phase, sim.why("Planned")) == ("Pending", "False WaitingForModel")
        assert sim.why("Suspended") == "False Resumed"
        unchanged(sim)

    def test_an_attempt_whose_plan_another_version_wrote_waits_and_then_fails(self) -> None:
        sim = simulation(startDeadlineSeconds=600)
        sim.reconcile()
        sim.ray_jobs.clear()
        sim.create_error = CreateError(0, "PlanUnreadable", "stages.1: unknown kind 'distill'")
        sim.reconcile()
        assert (sim.phase, sim.why()) == ("Pending", "False PlanUnreadable")
        assert sim.event_reasons().count("PlanUnreadable") == 1
        sim.wait(601)
        sim.reconcile()
        assert sim.phase == "Failed"
        assert sim.status.failure
        assert sim.status.failure.reason == "PlanUnreadable"
        assert "version" in sim.status.failure.advice

    def test_objects_of_a_deleted_job_of_the_same_name_are_removed_first(self) -> None:
        sim = simulation()
        old = ray_job(1, owner="another-uid", uid="old", job_status="RUNNING")
        sim.ray_jobs[old.name] = old
        sim.add_pods(pod(1))
        decision = sim.reconcile()
        assert (decision.start, decision.stop) == (None, ("minimal-1",))
        sim.collect()
        assert sim.reconcile().start is None, "its pods are still there"
        sim.collect()
        assert sim.reconcile().start == 1

    def test_a_ray_job_of_a_deleted_job_is_never_taken_for_the_attempt(self) -> None:
        sim = simulation()
        sim.killed_at = 0
        sim.killed_after = True
        with pytest.raises(KilledError):
            sim.reconcile()
        sim.ray_jobs["minimal-1"] = ray_job(
            1, owner="another-uid", uid="old", job_status="SUCCEEDED"
        )
        decision = sim.reconcile()
        assert (decision.start, decision.stop) == (None, ("minimal-1",))
        assert (sim.phase, sim.attempt.ray_job_uid) == ("Pending", None)


# ---- an attempt that starts ---------------------------------------------------------------------


class TestStarting:
    def test_the_ray_jobs_uid_is_stored(self) -> None:
        sim = simulation()
        sim.reconcile()
        sim.reconcile()
        assert sim.attempt.ray_job_uid == "ray-1-0"
        assert (sim.phase, sim.why()) == ("Pending", "False Starting")
        unchanged(sim)

    @pytest.mark.parametrize(
        ("trouble", "reason"),
        [
            (
                PodProblem("Unschedulable", "0/1 nodes: Insufficient nvidia.com/gpu"),
                "Unschedulable",
            ),
            (PodProblem("ImagePullBackOff", "Back-off", "ray-worker"), "ImagePullFailed"),
            (
                PodProblem("Unschedulable", '0/1: persistentvolumeclaim "models" not found.'),
                "VolumeMissing",
            ),
            (
                PodProblem("CreateContainerConfigError", 'secret "hf" not found', "ray-worker"),
                "SecretMissing",
            ),
        ],
    )
    def test_a_pod_that_cannot_start_is_reported_and_fails_the_job_after_the_deadline(
        self, trouble: PodProblem, reason: str
    ) -> None:
        sim = simulation(startDeadlineSeconds=600)
        sim.start()
        sim.add_pods(pod(1, "worker", trouble, phase="Pending"))
        sim.reconcile()
        assert (sim.phase, sim.why()) == ("Pending", f"False {reason}")
        assert sim.attempt.running_at is None
        unchanged(sim)
        sim.wait(598)
        assert sim.reconcile().wake_after == 1
        assert sim.phase == "Pending"
        sim.wait(2)
        sim.reconcile()
        assert (sim.phase, sim.why("Failed")) == ("Failed", f"True {reason}")
        assert sim.status.failure
        assert sim.status.failure.advice

    def test_a_worker_that_runs_out_of_memory_at_its_start_fails_the_job_at_once(self) -> None:
        """KubeRay would replace the pod again and again."""
        sim = simulation()
        sim.start()
        killed = PodProblem("OOMKilled", "exit code 137", "ray-worker")
        sim.add_pods(pod(1, "worker", killed, phase="Failed"))
        sim.reconcile()
        assert (sim.phase, sim.why("Failed")) == ("Failed", "True OutOfMemory")
        assert sim.status.failure
        assert "compute.memory" in sim.status.failure.advice

    def test_a_quota_that_forbids_pods_is_reported(self) -> None:
        sim = simulation()
        sim.start()
        sim.pods.clear()
        sim.warnings = ('pods "x" is forbidden: exceeded quota: team, requested: cpu=4',)
        sim.reconcile()
        assert sim.why() == "False QuotaExceeded"

    def test_a_pod_problem_that_ends_is_removed_from_the_status(self) -> None:
        sim = simulation()
        sim.start()
        sim.add_pods(pod(1, "worker", PodProblem("Unschedulable", "full"), phase="Pending"))
        sim.reconcile()
        sim.add_pods(pod(1, "worker"))
        sim.reconcile()
        assert sim.why() == "False Starting"

    def test_the_driver_runs_when_kuberay_says_so(self) -> None:
        sim = running()
        assert (sim.phase, sim.why()) == ("Running", "True Running")
        assert sim.attempt.running_at
        unchanged(sim)

    def test_the_driver_runs_when_it_posts_before_kuberay_says_so(self) -> None:
        sim = simulation()
        sim.start()
        sim.post = post(1, 3)
        sim.reconcile()
        assert sim.phase == "Running"

    def test_the_start_deadline_does_not_count_the_time_in_the_queue(self) -> None:
        sim = simulation(queue="team-a", startDeadlineSeconds=600)
        sim.reconcile()
        sim.reconcile()
        sim.wait(7200)
        sim.reconcile()
        assert (sim.phase, sim.why("Admitted")) == ("Queued", "False Queued")
        sim.ray(suspended=False)
        sim.reconcile()
        assert (sim.phase, sim.why("Admitted")) == ("Pending", "True Admitted")
        sim.wait(599)
        sim.reconcile()
        assert sim.phase == "Pending"
        sim.wait(2)
        sim.reconcile()
        assert sim.why("Failed") == "True StartTimeout"


class TestCreateErrors:
    @pytest.mark.parametrize(
        ("create_error", "reason"),
        [
            (CreateError(404, "NotFound", "404 page not found"), "KubeRayMissing"),
            (CreateError(403, "Forbidden", "exceeded quota: team, used: 1"), "QuotaExceeded"),
            (CreateError(500, "InternalError", "failed calling webhook"), "ClusterUnavailable"),
        ],
    )
    def test_a_temporary_create_error_is_retried_until_the_start_deadline(
        self, create_error: CreateError, reason: str
    ) -> None:
        sim = simulation(startDeadlineSeconds=60)
        sim.create_error = create_error
        sim.reconcile()
        decision = sim.reconcile()
        assert (decision.start, decision.wake_after) == (1, 15.0)
        assert (sim.phase, sim.why()) == ("Pending", f"False {reason}")
        unchanged(sim)
        sim.wait(61)
        assert sim.reconcile().start is None
        assert sim.why("Failed") == f"True {reason}"
        assert sim.created == []

    def test_a_create_error_that_ends_is_removed_from_the_status(self) -> None:
        sim = simulation()
        sim.create_error = CreateError(404, "NotFound", "404 page not found")
        sim.reconcile()
        sim.reconcile()
        sim.create_error = None
        sim.reconcile()
        sim.reconcile()
        assert (sim.created, sim.why()) == (["minimal-1"], "False Starting")

    def test_an_invalid_ray_job_fails_the_job_at_once(self) -> None:
        sim = simulation()
        sim.create_error = CreateError(422, "Invalid", 'RayJob "x" is invalid: spec.y')
        sim.reconcile()
        sim.reconcile()
        assert sim.why("Failed") == "True RayJobRefused"


# ---- progress -----------------------------------------------------------------------------------


class TestProgress:
    def test_the_newest_post_is_in_the_status(self) -> None:
        sim = running()
        stages = [
            StageStatus(name="prepare", kind="prepare", state="Succeeded", metrics={"rows": 9}),
            StageStatus(name="sft", kind="sft", state="Running"),
        ]
        sim.post = post(1, 7, stages=[s.model_dump() for s in stages])
        sim.reconcile()
        progress = sim.status.progress
        assert progress
        assert (progress.step, progress.total_steps, progress.percentage) == (
            7,
            100,
            7,
        )
        assert progress.metrics == {"loss": 2.0}
        assert [s.state for s in sim.status.stages] == ["Succeeded", "Running", "Pending"]
        assert (sim.attempt.stage, sim.attempt.last_step) == ("sft", 7)
        unchanged(sim)

    def test_posts_of_other_attempts_are_ignored(self) -> None:
        sim = running()
        for attempt in (2, 7):
            sim.post = post(attempt, 9, outcome=SUCCESS)
            before = sim.status
            sim.reconcile()
            assert sim.status == before

    def test_a_stage_that_is_not_in_the_plan_is_ignored(self) -> None:
        sim = running()
        strange = [{"name": "mine", "kind": "sft"}, {"name": "sft", "kind": "export"}]
        sim.post = post(1, 1, stages=strange)
        sim.reconcile()
        assert [s.name for s in sim.status.stages] == ["prepare", "sft", "export"]
        assert [s.kind for s in sim.status.stages] == ["prepare", "sft", "export"]

    def test_a_done_stage_stays_done_until_it_runs_again(self) -> None:
        sim = running()
        done = {"name": "prepare", "kind": "prepare", "state": "Succeeded", "startedAt": "then"}
        sim.post = post(1, 1, stages=[done])
        sim.reconcile()
        for state, expected in (
            ("Pending", "Succeeded"),
            ("Skipped", "Succeeded"),
            ("Running", "Running"),
        ):
            sim.post = post(1, 2, stages=[{**done, "state": state}])
            sim.reconcile()
            assert sim.status.stages[0].state == expected

    def test_a_post_in_kubeflows_protocol_sets_percentage_and_metrics(self) -> None:
        sim = running()
        sim.post = Post.model_validate(
            {
                "trainerStatus": {
                    "progressPercentage": 12,
                    "metrics": [{"name": "loss", "value": "1.5"}, {"name": "x", "value": "NaN"}],
                }
            }
        )
        sim.wait(5)
        sim.reconcile()
        progress = sim.status.progress
        assert progress
        assert (progress.percentage, progress.metrics) == (12, {"loss": 1.5})
        assert progress.last_updated_time == "2030-01-01T00:00:05Z"
        unchanged(sim)

    def test_a_post_that_names_no_attempt_starts_none(self) -> None:
        sim = simulation()
        sim.start()
        sim.post = Post.model_validate({"trainerStatus": {"progressPercentage": 12}})
        sim.reconcile()
        assert sim.attempt.running_at is None

    def test_the_number_of_metrics_is_bounded(self) -> None:
        sim = running()
        for number in range(6):
            metrics = [{"name": f"m{number}.{i}", "value": 1.0} for i in range(100)]
            sim.post = Post.model_validate({"trainerStatus": {"metrics": metrics}})
            sim.reconcile()
        assert sim.status.progress
        assert len(sim.status.progress.metrics) <= 256

    def test_the_last_post_is_in_the_attempt_before_it_is_closed(self) -> None:
        sim = running()
        sim.post = post(1, 5)
        sim.reconcile()
        sim.post = post(1, 61)
        sim.ray(job_status="FAILED", deployment_status="Failed", reason="AppFailed")
        sim.reconcile()
        assert (sim.attempt.last_step, sim.attempt.stage) == (61, "sft")

    def test_the_last_post_is_in_an_attempt_whose_ray_job_is_lost(self) -> None:
        sim = running()
        sim.post = post(1, 61)
        sim.ray_jobs.clear()
        sim.reconcile()
        assert sim.attempt.last_step == 61

    def test_lost_steps_are_counted_when_the_stage_is_resumed(self) -> None:
        sim = running()
        sim.end(failed("WorkerDied", retryable=True), step=57)
        sim.next_attempt()
        sim.run()
        sim.post = post(2, 50, resumedStep=50)
        sim.reconcile()
        assert [a.steps_lost for a in sim.status.attempts] == [7, None]
        unchanged(sim)

    def test_lost_steps_are_counted_across_an_attempt_that_never_trained(self) -> None:
        sim = running()
        sim.end(failed("WorkerDied", retryable=True), step=57)
        sim.next_attempt()
        sim.run()
        sim.ray(job_status="FAILED", deployment_status="Failed", reason="AppFailed")
        sim.reconcile()
        sim.next_attempt()
        sim.run()
        sim.post = post(3, 50, resumedStep=50)
        sim.reconcile()
        assert [a.steps_lost for a in sim.status.attempts] == [7, None, None]

    def test_a_resumed_stage_counts_no_steps_of_another_stage(self) -> None:
        sim = running()
        sim.end(failed("WorkerDied", retryable=True), step=57)
        sim.next_attempt()
        sim.run()
        sim.post = post(2, 5, stage="export", resumedStep=0)
        sim.reconcile()
        assert sim.status.attempts[0].steps_lost is None


class TestCost:
    def test_time_and_price_of_the_running_stage_are_those_of_the_newest_post(self) -> None:
        sim = running()
        sim.post = post(1, 5, cost={"totalSeconds": 7200, "gpuHours": 16.0, "price": 40.0})
        progress = sim.reconcile().status.progress
        assert progress is not None
        assert progress.cost == StageCost(total_seconds=7200, gpu_hours=16.0, price=40.0)
        sim.post = post(1, 0, stage="export")
        progress = sim.reconcile().status.progress
        assert progress is not None
        assert progress.cost is None


class TestMemory:
    def test_the_estimate_stays_in_the_status_though_later_posts_ask_nothing(self) -> None:
        sim = running()
        sim.memory = MemoryEstimate(device="NVIDIA H100", capacity_bytes=80)
        sim.post = post(1, 1)
        assert sim.reconcile().status.memory == sim.memory
        unchanged(sim)
        sim.memory = None  # the operator has restarted
        sim.post = post(1, 2)
        assert sim.reconcile().status.memory is not None
        unchanged(sim)

    def test_the_measured_peak_of_a_finished_stage_stands_beside_its_estimate(self) -> None:
        sim = running()
        stages = [StageEstimate(name=name, moment="m", total_bytes=9) for name in ("sft", "dpo")]
        sim.memory = MemoryEstimate(device="CPU", stages=stages)
        sim.post = post(1, 1)
        sim.reconcile()
        done = {"name": "sft", "kind": "sft", "state": "Succeeded"}
        for peak, expected in ((7.0, 7), (-1.0, None), (1e300, None)):
            stage = {**done, "metrics": {"peakMemoryBytes": peak}}
            sim.post = post(1, 2, stages=[stage])
            memory = sim.reconcile().status.memory
            assert memory is not None
            assert [stage.measured_bytes for stage in memory.stages] == [expected, None]

    def test_a_job_that_does_not_fit_ends_without_another_attempt(self) -> None:
        sim = running()
        sim.post = post(1, 0, stage="", outcome=failed("DoesNotFit", advice="Set this; or that."))
        sim.reconcile()
        assert sim.phase == "Failed"
        assert sim.status.failure is not None
        assert sim.status.failure.reason == "DoesNotFit"
        assert sim.status.failure.advice == "Set this; or that."
        assert [attempt.number for attempt in sim.status.attempts] == [1]


class TestQueueOfTheJobsLabel:
    def test_the_label_of_the_job_names_its_queue_unless_the_run_policy_does(self) -> None:
        for policy, queue in (({}, "labeled"), ({"queue": "team-a"}, "team-a")):
            sim = simulation(**policy)
            labels = {"kueue.x-k8s.io/queue-name": "labeled"}
            metadata = sim.job.metadata.model_copy(update={"labels": labels})
            sim.job = sim.job.model_copy(update={"metadata": metadata})
            sim.reconcile()
            assert sim.phase == "Queued"
            admitted = sim.condition("Admitted")
            assert admitted
            assert admitted.message == f"attempt 1 waits for queue {queue}"
            sim.run()
            admitted = sim.condition("Admitted")
            assert admitted
            assert (admitted.status, admitted.message) == ("True", f"admitted by queue {queue}")

    def test_a_job_in_the_default_queue_of_its_namespace_waits_for_admission(self) -> None:
        sim = simulation()
        sim.default_queue = "default"
        sim.reconcile()
        sim.reconcile()
        sim.workload = Workload(False, "insufficient quota")
        sim.reconcile()
        assert (sim.phase, sim.why("Admitted")) == ("Queued", "False Queued")
        admitted = sim.condition("Admitted")
        assert admitted
        assert admitted.message == "insufficient quota"
        unchanged(sim)
        sim.run()
        assert sim.why("Admitted") == "True Admitted"


RUN_SECONDS = 7


def preempted_often(**policy: Any) -> Simulation:
    """Return a job with one failure and more preemptions than a status lists attempts."""
    sim = simulation(backoffSeconds=0, **policy)
    for number in range(KEPT_ATTEMPTS + 4):
        sim.run()
        sim.wait(RUN_SECONDS)
        sim.end(failed("DiskFull", retryable=True) if number == 0 else INTERRUPTED)
        sim.settle(4)
    return sim


# ---- elastic jobs -------------------------------------------------------------------------------


PATIENCE = 300
"""A sixth of the start deadline: how long an elastic attempt waits for workers without a node."""


def elastic(placed: int, **policy: Any) -> Simulation:
    """Return a job of 2 to 4 workers whose first attempt starts and has nodes for `placed`."""
    sim = simulation(startDeadlineSeconds=6 * PATIENCE, **policy)
    sim.workers, sim.min_workers = 4, 2
    start_with(sim, placed)
    return sim


def start_with(sim: Simulation, placed: int) -> None:
    """Proceed to an attempt that starts and has nodes for `placed` of its workers."""
    sim.start()
    sim.pods = {name: item for name, item in sim.pods.items() if item.role == "head"}
    place(sim, *range(placed))
    number = sim.attempt.number
    full = PodProblem("Unschedulable", "0/3 nodes are available")
    for index in range(placed, sim.attempt.workers or sim.workers):
        name = f"minimal-{number}-worker-{index}"
        sim.add_pods(pod(number, "worker", full, name=name, phase="Pending", placed_at=None))
    sim.reconcile()


def place(sim: Simulation, *indices: int) -> None:
    """Give these workers of the newest attempt a node."""
    number, at = sim.attempt.number, sim.now.strftime("%Y-%m-%dT%H:%M:%SZ")
    for index in indices:
        sim.add_pods(pod(number, name=f"minimal-{number}-worker-{index}", placed_at=at))


class TestElastic:
    def test_an_attempt_without_all_its_workers_gives_way_to_one_with_those_that_fit(self) -> None:
        sim = elastic(placed=3)
        sim.wait(PATIENCE - 1)
        decision = sim.reconcile()
        assert (sim.why(), decision.wake_after) == ("False Unschedulable", 1)
        sim.wait(1)
        sim.reconcile()
        first = sim.attempt
        assert (first.reason, first.workers) == ("FewerWorkers", 3)
        assert first.message == (
            "3 of 4 workers have a node, and no other got one for 300 s: "
            "no node can take the worker pod: 0/3 nodes are available"
        )
        sim.settle()
        assert sim.created == ["minimal-1", "minimal-2"], "without a back-off"
        assert (sim.attempt.number, sim.attempt.workers) == (2, 3)
        start_with(sim, placed=3)
        sim.wait(2 * PATIENCE)
        sim.ray(job_status="RUNNING", deployment_status="Running")
        sim.reconcile()
        assert sim.phase == "Running"

    def test_a_quota_that_takes_workers_away_shrinks_the_job_too(self) -> None:
        sim = elastic(placed=3)
        sim.pods = {name: item for name, item in sim.pods.items() if item.placed_at}
        sim.ray(cluster_failure="pods is forbidden: exceeded quota: team")
        sim.wait(PATIENCE)
        sim.reconcile()
        assert (sim.attempt.reason, sim.attempt.workers) == ("FewerWorkers", 3)
        assert "exceeded quota: team" in (sim.attempt.message or "")

    def test_a_shrunk_job_grows_again_with_the_next_attempt(self) -> None:
        sim = elastic(placed=2)
        sim.wait(PATIENCE)
        sim.settle()
        start_with(sim, placed=2)
        sim.ray(job_status="RUNNING", deployment_status="Running")
        sim.reconcile()
        sim.end(failed("WorkerDied", retryable=True))
        sim.next_attempt()
        assert (sim.attempt.number, sim.attempt.workers) == (3, None)

    def test_a_shrunk_attempt_shrinks_again_but_never_below_min_workers(self) -> None:
        sim = elastic(placed=3)
        sim.wait(PATIENCE)
        sim.settle()
        start_with(sim, placed=2)
        sim.wait(PATIENCE)
        sim.settle()
        assert [a.workers for a in sim.status.attempts] == [3, 2, 2]
        start_with(sim, placed=1)
        sim.wait(6 * PATIENCE)
        sim.reconcile()
        assert sim.phase == "Failed"
        assert sim.status.failure
        assert sim.status.failure.reason == "Unschedulable"

    def test_an_attempt_for_fewer_workers_counts_toward_no_limit(self) -> None:
        sim = elastic(placed=3, maxAttempts=1, deadlineSeconds=60)
        sim.wait(PATIENCE)
        sim.settle()
        assert (sim.phase, sim.attempt.number) == ("Pending", 2)
        start_with(sim, placed=3)
        sim.ray(job_status="RUNNING", deployment_status="Running")
        sim.reconcile()
        sim.end(failed("DiskFull", retryable=True))
        assert sim.phase == "Failed", "the failure counts"

    def test_the_wait_begins_again_with_each_worker_that_gets_a_node(self) -> None:
        """A cluster that adds nodes adds them one after another."""
        sim = elastic(placed=1)
        sim.wait(PATIENCE + 5)
        sim.reconcile()
        place(sim, 1)
        assert sim.reconcile().wake_after == PATIENCE
        place(sim, 2, 3)
        sim.wait(PATIENCE)
        sim.reconcile()
        assert sim.attempt.finished_at is None, "all are placed: their images may take long"

    def test_workers_that_end_or_are_removed_do_not_count(self) -> None:
        for change in ({"deleting": True}, {"phase": "Failed"}):
            sim = elastic(placed=3)
            sim.add_pods(sim.pods["minimal-1-worker-0"]._replace(**change))
            sim.wait(PATIENCE)
            sim.reconcile()
            assert sim.attempt.workers == 2

    def test_a_job_that_needs_all_its_workers_never_shrinks(self) -> None:
        sim = simulation(startDeadlineSeconds=6 * PATIENCE)
        sim.workers = sim.min_workers = 4
        start_with(sim, placed=3)
        sim.wait(6 * PATIENCE - 1)
        sim.reconcile()
        assert sim.attempt.finished_at is None
        sim.wait(1)
        sim.reconcile()
        assert sim.phase == "Failed"


# ---- success ------------------------------------------------------------------------------------


class TestSuccess:
    def test_a_successful_outcome_sets_the_result_and_deletes_the_cluster(self) -> None:
        sim = running()
        sim.post = post(1, 100, outcome=SUCCESS)
        decision = sim.reconcile()
        assert (sim.phase, sim.why("Succeeded")) == ("Succeeded", "True Succeeded")
        assert sim.why() == "False Succeeded"
        assert sim.status.result == SUCCESS.result
        assert sim.attempt.reason == "Succeeded"
        assert decision.stop == ("minimal-1",)
        assert is_finished(sim.job)

    def test_a_driver_that_could_not_post_its_outcome_succeeds(self) -> None:
        sim = running()
        sim.post = post(1, 80)
        sim.ray(job_status="SUCCEEDED")  # its submitter has not ended yet
        sim.reconcile()
        assert sim.phase == "Succeeded"
        assert sim.status.result == Result(uri="s3://models/minimal/result")
        assert {s.state for s in sim.status.stages} == {"Succeeded"}
        assert sim.status.progress
        assert sim.status.progress.percentage == 100

    def test_an_outcome_counts_even_if_the_ray_job_is_deleted(self) -> None:
        sim = running()
        sim.ray_jobs.clear()
        sim.post = post(1, 100, outcome=SUCCESS)
        sim.reconcile()
        assert sim.phase == "Succeeded"

    def test_success_takes_precedence_over_a_stop_request(self) -> None:
        for request in ({"cancel": True}, {"suspend": True}):
            sim = running()
            sim.edit(**request)
            sim.post = post(1, 100, outcome=SUCCESS)
            sim.reconcile()
            assert sim.phase == "Succeeded"

    def test_a_finished_status_never_changes(self) -> None:
        sim = running()
        sim.end(SUCCESS)
        status = sim.status
        sim.edit(cancel=True, suspend=True, max_attempts=9)
        sim.post = post(1, 3, outcome=failed("Late"))
        sim.ray_jobs["minimal-2"] = ray_job(2)
        sim.wait(99999)
        decision = sim.reconcile()
        assert (decision.status, decision.start) == (status, None)
        assert decision.stop == ("minimal-2",)

    def test_the_job_is_deleted_when_its_time_to_live_expires(self) -> None:
        sim = running(ttlSecondsAfterFinished=60)
        sim.end(SUCCESS)
        sim.wait(40)
        decision = sim.reconcile()
        assert (decision.delete, decision.wake_after) == (False, 20)
        sim.wait(20)
        assert sim.reconcile().delete


# ---- failure and what follows -------------------------------------------------------------------


class TestFailure:
    def test_a_permanent_failure_ends_the_job_with_its_advice(self) -> None:
        sim = running()
        done = [
            {"name": "prepare", "kind": "prepare", "state": "Succeeded"},
            {"name": "sft", "kind": "sft", "state": "Running"},
        ]
        sim.post = post(1, 5, stages=done, outcome=failed("LossNotFinite", advice="Lower it."))
        sim.reconcile()
        assert (sim.phase, sim.why("Failed")) == ("Failed", "True LossNotFinite")
        assert sim.status.failure
        assert sim.status.failure.advice == "Lower it."
        assert [s.state for s in sim.status.stages] == ["Succeeded", "Failed", "Pending"]
        assert sim.why("Succeeded") == "absent"
        sim.wait(9999)
        assert sim.reconcile().start is None

    def test_the_logged_outcome_counts_if_no_post_arrived(self) -> None:
        sim = running()
        words = failed("RowUnreadable", advice="Mend it.").model_dump_json(by_alias=True)
        log = f"Job entrypoint command failed with exit code 1\nTUNEYARD-OUTCOME {words}\nbye"
        sim.ray(job_status="FAILED", deployment_status="Failed", reason="AppFailed", message=log)
        sim.reconcile()
        assert sim.why("Failed") == "True RowUnreadable"

    def test_the_next_attempt_waits_for_the_pods_and_the_back_off(self) -> None:
        sim = running(backoffSeconds=30)
        decision = sim.reconcile()
        sim.end(failed("WorkerDied", retryable=True))
        assert (sim.phase, sim.why()) == ("Pending", "False Retrying")
        assert [s.state for s in sim.status.stages] == ["Pending"] * 3
        assert sim.attempt.reason == "WorkerDied"
        sim.wait(100)
        for _ in range(3):
            assert sim.reconcile().start is None, "the RayJob is still there"
        sim.collect()
        decision = sim.reconcile()
        assert (decision.start, decision.wake_after) == (None, 15.0), "its pods are still there"
        sim.collect()
        assert sim.reconcile().start == 2
        assert [a.number for a in sim.status.attempts] == [1, 2]

    def test_pods_that_are_not_removed_are_reported_and_waited_for(self) -> None:
        sim = running()
        sim.end(failed("DiskFull", retryable=True))
        sim.ray_jobs.clear()
        sim.wait(POD_REMOVAL_SECONDS)
        sim.reconcile()
        assert sim.why() == "False Retrying"
        sim.wait(1)
        assert sim.reconcile().start is None
        assert (sim.phase, sim.why()) == ("Pending", "False PodsLeft")
        assert sim.event_reasons()[-1] == "PodsLeft"
        unchanged(sim)
        sim.pods.clear()
        assert sim.reconcile().start == 2

    def test_the_message_names_the_node_and_the_time_since_when_a_pod_is_waited_for(self) -> None:
        sim = running()
        sim.end(failed("DiskFull", retryable=True))
        sim.ray_jobs.clear()
        sim.pods = {"w": pod(1, node="node-7", deletion_time=rfc3339(sim.now))}
        sim.wait(POD_REMOVAL_SECONDS + 1)
        sim.reconcile()
        condition = sim.condition("Running")
        assert condition
        assert condition.message.startswith(
            "waiting since 2030-01-01T00:00:00Z for minimal-1-worker on node node-7 of an "
            "earlier attempt to be removed. Check whether a node was lost"
        )

    def test_the_next_attempt_starts_although_the_pods_of_a_lost_node_stay(self) -> None:
        sim = running()
        sim.end(failed("DiskFull", retryable=True))
        ends = rfc3339(sim.now + timedelta(seconds=GRACE_SECONDS))
        sim.ray(deleting=True, deletion_time=rfc3339(sim.now))
        sim.pods = {name: one._replace(deletion_time=ends) for name, one in sim.pods.items()}
        sim.wait(GRACE_SECONDS + LOST_SECONDS)
        assert sim.reconcile().start is None, "a kubelet may still end them"
        sim.wait(1)
        assert sim.reconcile().start == 2
        sim.reconcile()
        assert sim.created == ["minimal-1", "minimal-2"]
        assert sim.why() == "False Starting"

    def test_a_pod_that_nobody_deletes_is_waited_for_without_end(self) -> None:
        sim = running()
        sim.end(failed("DiskFull", retryable=True))
        sim.ray_jobs.clear()
        sim.wait(100 * LOST_SECONDS)
        assert sim.reconcile().start is None
        assert sim.why() == "False PodsLeft"

    def test_the_first_attempt_waits_for_a_lost_rayjob_that_has_its_name(self) -> None:
        sim = simulation()
        since = rfc3339(sim.now)
        sim.ray_jobs["minimal-1"] = ray_job(
            1, owner="another-uid", deleting=True, deletion_time=since
        )
        sim.wait(10 * LOST_SECONDS)
        assert sim.reconcile().start is None
        condition = sim.condition("Running")
        assert condition
        assert f"since {since} for minimal-1 of a deleted job of this name" in condition.message
        sim.ray_jobs.clear()
        assert sim.reconcile().start == 1

    def test_the_back_off_doubles(self) -> None:
        sim = running(backoffSeconds=30, maxAttempts=4)
        for number, wait in ((1, 30), (2, 60), (3, 120)):
            sim.end(failed("WorkerDied", retryable=True))
            closed = sim.now
            for _ in range(3):
                sim.reconcile()
                sim.collect()
            decision = sim.reconcile()
            assert (decision.start, decision.wake_after) == (None, wait)
            sim.now = closed
            sim.wait(wait)
            assert sim.reconcile().start == number + 1
            sim.run()

    def test_after_the_last_attempt_the_job_fails_with_the_last_reason(self) -> None:
        sim = running(maxAttempts=2)
        sim.end(failed("DiskFull", retryable=True))
        sim.next_attempt()
        sim.run()
        sim.end(failed("Unreachable", retryable=True, advice="Open it."))
        assert (sim.phase, sim.why("Failed")) == ("Failed", "True Unreachable")
        assert sim.status.failure
        assert sim.status.failure.advice == "Open it."
        found = sim.condition("Failed")
        assert found
        assert found.message == "it was Unreachable. Open it."
        assert [a.reason for a in sim.status.attempts] == ["DiskFull", "Unreachable"]

    def test_a_lost_worker_is_explained_by_a_later_report_of_kubernetes(self) -> None:
        """The driver's post can arrive before the kubelet's report, also in the last attempt."""
        for policy in ({}, {"maxAttempts": 1}):
            sim = running(**policy)
            sim.end(failed("WorkerDied", retryable=True))
            assert sim.phase == "Pending"
            sim.add_pods(pod(1, "worker", PodProblem("OOMKilled", "exit code 137", "ray-worker")))
            sim.reconcile()
            assert (sim.attempt.reason, sim.phase) == ("OutOfMemory", "Failed")
            assert sim.status.failure
            assert "compute.memory" in sim.status.failure.advice

    def test_a_lost_worker_of_the_last_attempt_fails_the_job_once_no_pod_is_left(
        self,
    ) -> None:
        sim = running(maxAttempts=1)
        sim.end(failed("WorkerDied", retryable=True))
        assert sim.phase == "Pending"
        sim.settle()
        assert sim.why("Failed") == "True WorkerDied"
        assert sim.created == ["minimal-1"]

    def test_preemption_does_not_count_and_causes_no_back_off(self) -> None:
        sim = running(maxAttempts=1, backoffSeconds=3600)
        for _ in range(3):
            sim.add_pods(
                pod(sim.attempt.number, "worker", PodProblem("DisruptionTarget", "preempted"))
            )
            sim.end(failed("WorkerDied", retryable=True))
            assert (sim.attempt.reason, sim.phase) == ("Preempted", "Pending")
            sim.settle(4)
            sim.run()
        assert [a.reason for a in sim.status.attempts] == ["Preempted"] * 3 + [None]

    def test_interruption_without_a_stop_request_is_preemption(self) -> None:
        sim = running()
        sim.end(INTERRUPTED)
        assert (sim.attempt.reason, sim.phase) == ("Preempted", "Pending")

    def test_a_ray_job_deleted_by_another_client_is_followed_by_the_next_attempt(self) -> None:
        sim = running()
        sim.ray(deleting=True)
        sim.reconcile()
        assert (sim.attempt.reason, sim.phase) == ("RayJobDeleted", "Pending")
        sim.next_attempt()
        assert sim.created == ["minimal-1", "minimal-2"]

    def test_a_ray_job_is_missing_only_after_ten_seconds(self) -> None:
        sim = running()
        sim.hidden = True
        decision = sim.reconcile()
        assert decision.wake_after == 10
        sim.wait(9)
        sim.reconcile()
        assert sim.attempt.finished_at is None
        sim.hidden = False
        sim.reconcile()
        sim.hidden = True
        sim.wait(9)
        sim.reconcile()
        assert (sim.attempt.finished_at, sim.phase) == (None, "Running")
        sim.wait(10)
        sim.reconcile()
        assert sim.attempt.reason == "RayJobDeleted"

    def test_a_ray_job_created_again_by_another_client_is_not_the_attempts(self) -> None:
        sim = running()
        sim.ray(uid="created-again", job_status="")
        decision = sim.reconcile()
        assert sim.attempt.reason == "RayJobDeleted"
        assert decision.stop == ("minimal-1",)

    def test_a_driver_that_fails_without_a_reason_counts(self) -> None:
        sim = running()
        sim.end(Outcome(state="Failed", retryable=True))
        assert sim.attempt.reason == "DriverError"

    def test_a_reason_that_no_condition_can_carry_does_not_stop_the_job(self) -> None:
        sim = running()
        sim.end(failed("out of luck!\n" * 9, retryable=False))
        assert sim.why("Failed") == "True DriverError"
        assert sim.status.failure
        assert "out of luck!" in sim.status.failure.message

    def test_a_closed_attempt_is_not_changed_by_a_late_post(self) -> None:
        sim = running()
        sim.ray(job_status="FAILED", deployment_status="Failed", reason="AppFailed")
        sim.reconcile()
        closed = sim.attempt
        sim.post = post(1, 99, outcome=failed("Late"))
        sim.reconcile()
        assert sim.attempt == closed
        assert should_stop(sim.job), "its driver shall end"

    def test_a_job_that_is_preempted_again_and_again_goes_on_and_its_status_stays_small(
        self,
    ) -> None:
        sim = preempted_often(maxAttempts=2)
        assert sim.phase != "Failed"
        numbers = [a.number for a in sim.status.attempts]
        assert len(numbers) == KEPT_ATTEMPTS
        assert numbers[0] == 1, "the attempt that counts is kept"
        assert numbers[-1] == len(sim.created) == KEPT_ATTEMPTS + 5
        sim.run()
        sim.end(failed("DiskFull", retryable=True))
        assert sim.phase == "Failed", "it is the second failure"

    def test_the_run_time_of_attempts_that_are_not_listed_counts_toward_the_deadline(self) -> None:
        sim = preempted_often()
        sim.run()
        total = sum(RUN_SECONDS for _ in sim.created[:-1])
        sim.edit(deadline_seconds=total + 60)
        sim.reconcile()
        assert sim.phase == "Running"
        sim.wait(60)
        sim.reconcile()
        assert sim.attempt.stopping_at, "the attempt is asked to stop"

    def test_clocks_that_differ_make_no_run_time_negative(self) -> None:
        """The CRD refuses a negative number, and with it every later status."""
        sim = simulation(backoffSeconds=0)
        for _ in range(KEPT_ATTEMPTS + 2):
            sim.run()
            sim.wait(-60)  # another replica, whose clock is a minute behind, closes the attempt
            sim.end(INTERRUPTED)
            sim.settle(4)
        assert sim.status.attempts[0].number > 1, "attempts were dropped"
        assert sim.status.dropped_seconds == 0.0

    def test_a_status_with_the_longest_texts_stays_small(self) -> None:
        sim = running(maxAttempts=100)
        long = "x" * 60_000
        for _ in range(100):
            outcome = failed("DiskFull", retryable=True)
            failure = outcome.failure and outcome.failure.model_copy(
                update={"message": long, "advice": long}
            )
            sim.end(outcome.model_copy(update={"failure": failure}))
            if sim.phase == "Failed":
                break
            sim.next_attempt()
            sim.run()
        assert len(sim.status.attempts) == 100
        assert len(sim.status.model_dump_json()) < 300_000


# ---- suspend, cancel, deadline ------------------------------------------------------------------


class TestSuspend:
    def test_the_driver_is_asked_to_stop_and_waited_for(self) -> None:
        sim = running()
        assert not should_stop(sim.job)
        sim.edit(suspend=True)
        assert should_stop(sim.job)
        decision = sim.reconcile()
        assert (decision.stop, decision.wake_after) == ((), GRACE_SECONDS)
        assert sim.attempt.stopping_at
        assert (sim.phase, sim.why("Suspended")) == ("Running", "Unknown Stopping")
        unchanged(sim)
        sim.wait(20)
        sim.end(INTERRUPTED)
        assert sim.attempt.reason == "Suspended"
        assert sim.phase == "Pending", "its pods are still there"
        sim.settle()
        assert (sim.phase, sim.why("Suspended")) == ("Suspended", "True Suspended")
        assert sim.why() == "False Suspended"
        assert sim.created == ["minimal-1"]
        unchanged(sim)

    def test_a_driver_that_does_not_stop_is_waited_for_no_longer_than_the_grace_period(
        self,
    ) -> None:
        sim = running()
        sim.edit(suspend=True)
        sim.reconcile()
        sim.wait(GRACE_SECONDS - 1)
        sim.reconcile()
        assert sim.attempt.finished_at is None
        sim.wait(1)
        decision = sim.reconcile()
        assert (sim.attempt.reason, decision.stop) == ("Suspended", ("minimal-1",))

    def test_an_attempt_that_does_not_run_yet_is_closed_at_once(self) -> None:
        sim = simulation()
        sim.start()
        sim.edit(suspend=True)
        decision = sim.reconcile()
        assert (sim.attempt.reason, decision.stop) == ("Suspended", ("minimal-1",))

    def test_an_attempt_that_is_not_created_yet_is_closed_at_once(self) -> None:
        sim = simulation()
        sim.create_error = CreateError(404, "NotFound", "404 page not found")
        sim.reconcile()
        sim.edit(suspend=True)
        assert sim.reconcile().start is None
        sim.settle()
        assert (sim.phase, sim.created) == ("Suspended", [])

    def test_a_resumed_job_starts_another_attempt_and_the_suspended_one_does_not_count(
        self,
    ) -> None:
        sim = running(maxAttempts=1, backoffSeconds=3600)
        sim.edit(suspend=True)
        sim.reconcile()
        sim.end(INTERRUPTED)
        sim.settle()
        sim.edit(suspend=False)
        decision = sim.reconcile()
        assert decision.start == 2
        assert (sim.phase, sim.why("Suspended")) == ("Pending", "False Resumed")
        sim.run()
        sim.end(SUCCESS)
        assert sim.phase == "Succeeded"
        assert sim.why("Suspended") == "absent"

    def test_a_stop_request_that_is_withdrawn_while_the_driver_stops_costs_one_attempt(
        self,
    ) -> None:
        sim = running(maxAttempts=1)
        sim.edit(suspend=True)
        sim.reconcile()
        sim.edit(suspend=False)
        assert should_stop(sim.job), "the driver was asked to stop already"
        sim.reconcile()
        sim.end(INTERRUPTED)
        assert sim.attempt.reason == "Suspended"
        sim.settle(3)
        assert sim.created == ["minimal-1", "minimal-2"]
        assert sim.why("Suspended") == "False Resumed"

    def test_a_permanent_failure_while_stopping_is_reported(self) -> None:
        sim = running()
        sim.edit(suspend=True)
        sim.reconcile()
        sim.end(failed("LossNotFinite"))
        assert sim.why("Failed") == "True LossNotFinite"

    def test_a_retryable_failure_while_stopping_counts_as_the_stop(self) -> None:
        sim = running(maxAttempts=1)
        sim.edit(suspend=True)
        sim.reconcile()
        sim.end(failed("WorkerDied", retryable=True))
        assert sim.attempt.reason == "Suspended"

    def test_a_ray_job_that_is_deleted_while_stopping_counts_as_suspended(self) -> None:
        for change in ("deleting", "missing"):
            sim = running()
            sim.edit(suspend=True)
            sim.reconcile()
            if change == "deleting":
                sim.ray(deleting=True)
            else:
                sim.ray_jobs.clear()
                sim.reconcile()
                sim.wait(11)
            sim.reconcile()
            assert sim.attempt.reason == "Suspended"


class TestCancel:
    def canceled(self, sim: Simulation) -> None:
        sim.edit(cancel=True)
        for _ in range(3):
            sim.settle()
            sim.wait(GRACE_SECONDS)
        sim.reconcile()
        assert (sim.phase, sim.why("Failed")) == ("Failed", "True Canceled")
        assert sim.why("Suspended") == "absent"
        assert sim.ray_jobs == {}
        assert sim.pods == {}
        assert not [s for s in sim.status.stages if s.state == "Failed"]
        unchanged(sim)

    def test_before_planning(self) -> None:
        sim = simulation()
        self.canceled(sim)
        assert sim.created == []

    def test_before_the_ray_job_exists(self) -> None:
        sim = simulation()
        sim.create_error = CreateError(403, "Forbidden", "exceeded quota")
        sim.reconcile()
        self.canceled(sim)

    def test_while_queued(self) -> None:
        sim = simulation(queue="team-a")
        sim.reconcile()
        sim.reconcile()
        self.canceled(sim)

    def test_while_pending(self) -> None:
        sim = simulation()
        sim.start()
        self.canceled(sim)

    def test_while_running_after_a_checkpoint(self) -> None:
        sim = running()
        sim.edit(cancel=True)
        decision = sim.reconcile()
        assert (decision.stop, sim.phase) == ((), "Running")
        sim.end(INTERRUPTED)
        assert sim.attempt.reason == "Canceled"
        self.canceled(sim)

    def test_while_running_a_driver_that_does_not_stop(self) -> None:
        self.canceled(running())

    def test_between_attempts(self) -> None:
        sim = running(backoffSeconds=3000)
        sim.end(failed("DiskFull", retryable=True))
        self.canceled(sim)
        assert sim.created == ["minimal-1"]

    def test_while_suspending_and_when_suspended(self) -> None:
        sim = running()
        sim.edit(suspend=True)
        sim.reconcile()
        self.canceled(sim)
        sim = simulation(suspend=True)
        sim.settle()
        self.canceled(sim)


class TestDeadline:
    def test_the_driver_is_asked_to_stop_and_the_job_fails(self) -> None:
        sim = running(deadlineSeconds=1000)
        assert sim.reconcile().wake_after == 1000
        sim.wait(1000)
        sim.reconcile()
        assert should_stop(sim.job)
        sim.end(INTERRUPTED)
        assert sim.why("Failed") == "True DeadlineExceeded"
        assert sim.status.failure
        assert "deadlineSeconds" in sim.status.failure.advice

    def test_the_time_of_attempts_counts_and_the_time_between_them_does_not(self) -> None:
        sim = running(deadlineSeconds=1000, maxAttempts=5)
        for _ in range(3):
            sim.wait(300)
            sim.end(failed("DiskFull", retryable=True))
            assert sim.phase == "Pending"
            sim.next_attempt()
            sim.run()
        sim.wait(99)
        assert sim.reconcile().wake_after == 1
        sim.wait(1)
        sim.reconcile()
        assert sim.attempt.stopping_at
        sim.end(INTERRUPTED)
        assert sim.why("Failed") == "True DeadlineExceeded"

    def test_no_attempt_starts_after_the_deadline(self) -> None:
        sim = running(deadlineSeconds=1000)
        sim.wait(1000)
        sim.end(failed("DiskFull", retryable=True))
        assert sim.why("Failed") == "True DeadlineExceeded"
        sim.settle()
        assert sim.created == ["minimal-1"]

    def test_the_time_in_the_queue_does_not_count(self) -> None:
        sim = simulation(queue="team-a", deadlineSeconds=1000)
        sim.reconcile()
        sim.reconcile()
        sim.wait(99999)
        sim.reconcile()
        assert sim.phase == "Queued"


# ---- the queue ----------------------------------------------------------------------------------


class TestQueue:
    def test_queued_admitted_running(self) -> None:
        sim = simulation(queue="team-a")
        sim.reconcile()
        sim.reconcile()
        sim.workload = Workload(admitted=False, message="insufficient quota for cpu")
        sim.reconcile()
        assert (sim.phase, sim.why("Admitted")) == ("Queued", "False Queued")
        found = sim.condition("Admitted")
        assert found
        assert found.message == "insufficient quota for cpu"
        unchanged(sim)
        sim.ray(suspended=False)
        sim.reconcile()
        assert (sim.phase, sim.why("Admitted")) == ("Pending", "True Admitted")
        sim.run()
        assert sim.phase == "Running"

    def test_eviction_while_running_is_followed_by_a_queued_attempt(self) -> None:
        for change in ({"suspended": True}, {"deployment_status": "Suspending"}):
            sim = running(queue="team-a", maxAttempts=1)
            sim.workload = Workload(admitted=False, message="Preempted to accommodate x")
            sim.ray(**change)
            decision = sim.reconcile()
            assert sim.attempt.reason == "Preempted"
            assert "accommodate" in (sim.attempt.message or "")
            assert sim.why("Admitted") == "False Queued"
            assert (decision.stop, decision.start) == ((), None)
            sim.pods.clear()
            assert sim.reconcile().stop == ("minimal-1",)
            sim.settle(3)
            assert sim.created == ["minimal-1", "minimal-2"]
            assert (sim.phase, sim.why("Admitted")) == ("Queued", "False Queued")

    def test_an_evicted_ray_job_is_not_deleted_while_its_pods_save_a_checkpoint(
        self,
    ) -> None:
        """KubeRay kills the driver of a RayJob that is deleted."""
        sim = running(queue="team-a")
        sim.ray(suspended=True, deployment_status="Suspending")
        for _ in range(3):
            decision = sim.reconcile()
            assert (decision.stop, decision.start) == ((), None)
            assert decision.wake_after
            sim.wait(60)
        assert sim.reconcile().stop == ("minimal-1",), "a lost node's pods are not waited for"

    def test_a_ray_job_that_a_queue_admits_again_after_its_attempt_ended_is_deleted(self) -> None:
        sim = running(queue="team-a")
        sim.ray(suspended=True, deployment_status="Suspended")
        assert sim.reconcile().stop == ()
        sim.ray(suspended=False, deployment_status="Initializing")
        assert sim.reconcile().stop == ("minimal-1",)
        assert sim.created == ["minimal-1"]

    def test_eviction_before_running_keeps_the_attempt(self) -> None:
        sim = simulation(queue="team-a")
        sim.start()
        assert sim.why("Admitted") == "True Admitted"
        sim.ray(suspended=True, deployment_status="Suspended")
        sim.reconcile()
        assert (sim.phase, sim.why("Admitted")) == ("Queued", "False Queued")
        assert sim.attempt.finished_at is None
        sim.run()
        assert (sim.phase, sim.created) == ("Running", ["minimal-1"])


# ---- one at a time ------------------------------------------------------------------------------


class TestOneAtATime:
    def test_nothing_is_created_while_pods_exist(self) -> None:
        """The watch of RayJobs may lag behind the watch of pods."""
        sim = simulation()
        sim.killed_at, sim.killed_after = 0, True
        with pytest.raises(KilledError):
            sim.reconcile()
        sim.add_pods(pod(1))
        assert sim.reconcile().start is None
        sim.pods.clear()
        assert sim.reconcile().start == 1

    def test_a_second_ray_job_is_always_deleted(self) -> None:
        sim = running()
        sim.ray_jobs["minimal-9"] = ray_job(9)
        assert sim.reconcile().stop == ("minimal-9",)
        assert (sim.phase, sim.attempt.number) == ("Running", 1)

    def test_a_job_whose_status_was_cleared_starts_again_without_a_second_cluster(self) -> None:
        sim = running()
        sim.job = sim.job.model_copy(update={"status": None})
        decision = sim.reconcile()
        assert (decision.start, decision.stop) == (None, ("minimal-1",))
        sim.settle(3)
        assert sim.created == ["minimal-1", "minimal-1"]

    def test_nothing_of_another_owner_is_adopted(self) -> None:
        sim = running()
        assert [r.owner for r in sim.ray_jobs.values()] == [UID]


class TestConditions:
    def test_a_transition_time_changes_with_the_conditions_status_alone(self) -> None:
        sim = simulation()
        sim.start()
        since = sim.condition("Running")
        sim.wait(60)
        sim.add_pods(pod(1, "worker", PodProblem("Unschedulable", "full"), phase="Pending"))
        sim.reconcile()
        later = sim.condition("Running")
        assert since
        assert later
        assert since.reason != later.reason
        assert since.last_transition_time == later.last_transition_time
        sim.ray(job_status="RUNNING", deployment_status="Running")
        sim.reconcile()
        runs = sim.condition("Running")
        assert runs
        assert runs.last_transition_time == "2030-01-01T00:01:00Z"

    def test_a_status_survives_json(self) -> None:
        sim = running()
        sim.end(failed("WorkerDied", retryable=True))
        text = sim.status.model_dump_json(by_alias=True, exclude_none=True)
        assert type(sim.status).model_validate(json.loads(text)) == sim.status


def test_a_decision_is_plain_data() -> None:
    assert isinstance(simulation().decide(), Decision)
