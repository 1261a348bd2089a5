"""The decisions of `observe` about attempts whose data a Job prepares before the RayJob exists."""

from __future__ import annotations

from typing import Any

import pytest

from tests.status.simulation import (
    GPU_PLAN,
    INTERRUPTED,
    SUCCESS,
    KilledError,
    Simulation,
    failed,
    new_job,
    pod,
    post,
    preparation,
)
from tuneyard.api.progress import Outcome
from tuneyard.api.status import StageStatus
from tuneyard.status.observe import Decision, Waiting, is_preparing
from tuneyard.status.observed import CreateError, PodProblem, Workload

ALREADY_PLANNED = Waiting("Planned", "the plan is in force")
"""What the controller gives for a job that has begun, which is not planned again."""
DONE = StageStatus(name="prepare", kind="prepare", state="Succeeded")


def simulation(**policy: Any) -> Simulation:
    job = new_job(**{f"runPolicy__{name}": value for name, value in policy.items()})
    return Simulation(job, planned=GPU_PLAN)


def preparing(**policy: Any) -> Simulation:
    """Return a simulation whose first attempt prepares its data: its pod runs."""
    sim = simulation(**policy)
    sim.reconcile()
    sim.prepare(suspended=False)
    sim.add_pods(pod(1, "prepare"))
    posts(sim)
    sim.reconcile()
    return sim


def posts(sim: Simulation, outcome: Outcome | None = None, **report: Any) -> None:
    """Let the driver of the Job post."""
    number = sim.attempt.number
    sim.post = post(number, stage="prepare", outcome=outcome, preparing=True, **report)


def finish(sim: Simulation) -> Decision:
    """Let the Job succeed; return the decision about it."""
    posts(sim, stages=[DONE.model_dump(by_alias=True)])
    sim.prepare(succeeded=True)
    for name, item in sim.pods.items():
        sim.pods[name] = item._replace(phase="Succeeded")
    return sim.reconcile()


class TestBeforeTheRayJob:
    def test_a_job_with_gpus_begins_with_a_job_and_no_ray_job_exists_meanwhile(self) -> None:
        sim = simulation()
        decision = sim.reconcile()
        assert decision.start == 1
        assert is_preparing(sim.attempt)
        assert sim.attempt.prepare_job == "minimal-1-prepare"
        assert (sim.phase, sim.why()) == ("Preparing", "False Preparing")
        for _ in range(5):
            sim.wait(60)
            sim.reconcile()
        assert (sim.created, sim.ray_jobs) == (["minimal-1-prepare"], {})

    def test_a_job_without_gpus_has_none(self) -> None:
        sim = Simulation()
        sim.reconcile()
        assert (sim.attempt.prepare_job, sim.created) == (None, ["minimal-1"])

    def test_its_posts_are_not_those_of_a_driver_that_trains(self) -> None:
        sim = preparing()
        assert (sim.attempt.preparing_at is None, sim.attempt.running_at) == (False, None)
        assert sim.phase == "Preparing"
        assert "Running" not in sim.event_reasons()

    def test_the_event_of_the_attempt_names_both_objects(self) -> None:
        sim = simulation()
        sim.reconcile()
        (event,) = [event for event in sim.events if event.reason == "AttemptStarted"]
        assert "Job minimal-1-prepare, then RayJob minimal-1" in event.message

    def test_when_it_has_succeeded_the_ray_job_is_created_and_the_job_deleted(self) -> None:
        sim = preparing()
        decision = finish(sim)
        assert (decision.start, decision.stop_preparing) == (1, ("minimal-1-prepare",))
        assert (sim.phase, sim.why()) == ("Pending", "False Starting")
        assert sim.created == ["minimal-1-prepare", "minimal-1"]
        sim.settle()
        assert sim.attempt.running_at is None, "its last post does not count for the RayJob"
        assert sim.preparations == {}
        sim.run()
        sim.end(SUCCESS)
        assert (sim.phase, len(sim.status.attempts)) == ("Succeeded", 1)

    def test_the_ray_job_does_not_wait_until_the_job_and_its_pod_are_removed(self) -> None:
        sim = preparing()
        sim.prepare(succeeded=True)
        sim.pods["minimal-1-prepare"] = sim.pods["minimal-1-prepare"]._replace(phase="Succeeded")
        sim.killed_at, sim.killed_after = sim.actions, True
        with pytest.raises(KilledError):  # its status is written, and nothing else
            sim.reconcile()
        assert sim.reconcile().start == 1
        assert "minimal-1" in sim.ray_jobs

    def test_the_time_of_a_long_preparation_is_no_wait_for_its_pod(self) -> None:
        sim = preparing()
        sim.wait(10_000)
        sim.prepare(succeeded=True)
        sim.killed_at, sim.killed_after = sim.actions, True
        with pytest.raises(KilledError):  # its status is written, and nothing else
            sim.reconcile()
        assert sim.reconcile().start is None, "the watch still reports that the pod runs"
        assert sim.why() == "False Starting"
        assert "PodsLeft" not in sim.event_reasons()

    def test_an_attempt_with_a_queue_is_preparing_and_then_queued(self) -> None:
        sim = preparing(queue="team-a")
        assert (sim.phase, sim.why("Admitted")) == ("Preparing", "False Preparing")
        finish(sim)
        assert (sim.phase, sim.why("Admitted")) == ("Queued", "False Queued")
        assert sim.event_reasons().count("Queued") == 1

    def test_a_success_that_a_pod_posts_is_not_that_of_the_job(self) -> None:
        sim = preparing()
        posts(sim, SUCCESS)
        sim.reconcile()
        assert sim.phase == "Preparing"


class TestSkipped:
    def test_an_attempt_whose_leading_stages_are_done_has_no_job(self) -> None:
        sim = preparing()
        finish(sim)
        sim.planned = ALREADY_PLANNED
        sim.run()
        sim.end(failed("WorkerLost", retryable=True))
        sim.next_attempt()
        assert sim.attempt.number == 2
        assert sim.attempt.prepare_job is None
        assert "minimal-2" in sim.created
        assert "minimal-2-prepare" not in sim.created

    def test_the_next_attempt_after_a_failed_one_has_a_job_again(self) -> None:
        sim = preparing()
        sim.planned = ALREADY_PLANNED
        posts(sim, failed("SourceUnavailable", retryable=True))
        sim.reconcile()
        sim.next_attempt()
        assert is_preparing(sim.attempt)
        assert sim.created == ["minimal-1-prepare", "minimal-2-prepare"]


class TestEnds:
    def test_bad_data_end_the_job_and_no_ray_job_was_created(self) -> None:
        sim = preparing()
        posts(sim, failed("InvalidData"))
        sim.reconcile()
        assert sim.phase == "Failed"
        assert sim.status.failure
        assert sim.status.failure.reason == "InvalidData"
        sim.settle()
        assert sim.created == ["minimal-1-prepare"]
        assert sim.preparations == {}

    def test_without_a_post_the_outcome_is_read_from_the_log_of_the_pod(self) -> None:
        sim = preparing()
        line = f"a line\n\nTUNEYARD-OUTCOME {failed('DoesNotFit').model_dump_json(by_alias=True)}\n"
        problem = PodProblem("Error", line, "prepare", 1)
        sim.pods["minimal-1-prepare"] = pod(1, "prepare", problem, phase="Failed")
        sim.prepare(failed=True, message="Job has reached the specified backoff limit")
        sim.reconcile()
        assert sim.status.failure
        assert sim.status.failure.reason == "DoesNotFit"

    @pytest.mark.parametrize(
        ("problem", "reason", "phase"),
        [
            (PodProblem("OOMKilled", "exit code 137", "prepare", 137), "OutOfMemory", "Failed"),
            (PodProblem("DisruptionTarget", "drained"), "Preempted", "Pending"),
            (PodProblem("Evicted", "disk"), "Evicted", "Pending"),
            (PodProblem("Error", "Segmentation fault", "prepare", 139), "DriverError", "Pending"),
        ],
    )
    def test_a_killed_pod_ends_the_attempt_with_the_reason_of_kubernetes(
        self, problem: PodProblem, reason: str, phase: str
    ) -> None:
        sim = preparing()
        sim.pods["minimal-1-prepare"] = pod(1, "prepare", problem, phase="Failed")
        sim.prepare(failed=True, message="Job has reached the specified backoff limit")
        sim.reconcile()
        assert (sim.attempt.reason, sim.phase) == (reason, phase)
        sim.settle()
        assert "minimal-1" not in sim.created

    def test_an_image_that_does_not_know_how_to_prepare_lets_its_workers_do_it(self) -> None:
        sim = preparing()
        sim.planned, sim.post = ALREADY_PLANNED, None
        problem = PodProblem("Error", "unrecognized arguments: --prepare", "prepare", 2)
        sim.pods["minimal-1-prepare"] = pod(1, "prepare", problem, phase="Failed")
        sim.prepare(failed=True)
        sim.settle()
        assert sim.created == ["minimal-1-prepare", "minimal-1"]
        assert (len(sim.status.attempts), sim.attempt.prepare_job) == (1, None)
        sim.run()
        sim.end(failed("WorkerLost", retryable=True))
        sim.next_attempt()
        assert sim.created[-1] == "minimal-2", "and so do those of the next attempts"
        assert sim.attempt.prepare_job is None

    def test_the_time_of_a_pod_that_could_not_prepare_counts_toward_no_deadline(self) -> None:
        sim = simulation(deadlineSeconds=100)
        sim.reconcile()
        sim.add_pods(pod(1, "prepare"))
        sim.reconcile()
        assert sim.attempt.preparing_at, "its pod was seen to run"
        sim.planned = ALREADY_PLANNED
        problem = PodProblem("Error", "unrecognized arguments: --prepare", "prepare", 2)
        sim.pods["minimal-1-prepare"] = pod(1, "prepare", problem, phase="Failed")
        sim.prepare(failed=True)
        sim.settle()
        sim.wait(500)  # the pods of the RayJob start
        sim.run()
        sim.wait(90)
        sim.reconcile()
        assert (sim.phase, sim.attempt.stopping_at) == ("Running", None)
        sim.wait(11)
        sim.reconcile()
        assert sim.attempt.stopping_at

    def test_the_end_of_another_container_does_not_mean_that_the_image_cannot_prepare(self) -> None:
        sim = preparing()
        problem = PodProblem("Error", "exit code 2", "mesh-init", 2)
        sim.pods["minimal-1-prepare"] = pod(1, "prepare", problem, phase="Failed")
        sim.prepare(failed=True, message="Job has reached the specified backoff limit")
        sim.reconcile()
        assert (sim.attempt.reason, sim.attempt.prepare_job) == ("DriverError", "minimal-1-prepare")
        sim.settle()
        assert sim.ray_jobs == {}

    def test_an_interrupted_preparation_does_not_count(self) -> None:
        sim = preparing(maxAttempts=1)
        posts(sim, INTERRUPTED)
        sim.reconcile()
        assert (sim.attempt.reason, sim.phase) == ("Preempted", "Pending")

    def test_failures_count_toward_the_limit(self) -> None:
        sim = preparing(maxAttempts=1)
        posts(sim, failed("SourceUnavailable", retryable=True))
        sim.reconcile()
        assert sim.phase == "Failed"

    def test_a_job_that_another_client_deletes_ends_the_attempt_after_a_while(self) -> None:
        sim = preparing()
        sim.preparations.clear()
        sim.reconcile()
        assert sim.attempt.finished_at is None, "the cache may lag behind"
        sim.wait(11)
        sim.reconcile()
        assert sim.attempt.reason == "PrepareJobDeleted"
        assert sim.phase == "Pending"

    def test_the_next_attempt_waits_for_the_pod_of_the_last_one(self) -> None:
        sim = preparing(backoffSeconds=0)
        posts(sim, failed("SourceUnavailable", retryable=True))
        sim.reconcile()
        del sim.preparations["minimal-1-prepare"]
        for _ in range(3):
            sim.wait(30)
            sim.reconcile()
        assert sim.attempt.number == 1
        sim.pods.clear()
        sim.wait(1)
        sim.reconcile()
        assert sim.attempt.number == 2

    def test_a_job_of_a_deleted_job_of_this_name_is_deleted_and_waited_for(self) -> None:
        sim = simulation()
        sim.preparations["minimal-1-prepare"] = preparation(1, owner="another")
        decision = sim.reconcile()
        assert decision.stop_preparing == ("minimal-1-prepare",)
        assert sim.status.attempts == []
        sim.collect()
        sim.reconcile()
        assert sim.created == ["minimal-1-prepare"]


class TestRequests:
    @pytest.mark.parametrize(
        ("request_", "reason", "phase"),
        [("suspend", "Suspended", "Suspended"), ("cancel", "Canceled", "Failed")],
    )
    def test_a_preparation_has_no_checkpoint_to_wait_for(
        self, request_: str, reason: str, phase: str
    ) -> None:
        sim = preparing()
        sim.edit(**{request_: True})
        decision = sim.reconcile()
        assert sim.attempt.reason == reason
        assert decision.stop_preparing == ("minimal-1-prepare",)
        sim.settle()
        assert (sim.phase, sim.created) == (phase, ["minimal-1-prepare"])

    def test_a_job_that_is_suspended_when_its_data_are_prepared_gets_no_ray_job(self) -> None:
        sim = preparing()
        sim.edit(suspend=True)
        finish(sim)
        sim.settle()
        assert (sim.phase, sim.created) == ("Suspended", ["minimal-1-prepare"])
        sim.edit(suspend=False)
        sim.planned = ALREADY_PLANNED
        sim.settle()
        assert sim.created == ["minimal-1-prepare", "minimal-2"], "they are prepared"

    def test_the_deadline_counts_the_time_of_the_preparation(self) -> None:
        sim = preparing(deadlineSeconds=100)
        sim.wait(101)
        sim.reconcile()
        assert (sim.phase, sim.attempt.reason) == ("Failed", "DeadlineExceeded")

    def test_the_time_of_the_preparation_and_of_the_training_is_added_up(self) -> None:
        sim = preparing(deadlineSeconds=100)
        sim.wait(50)
        finish(sim)
        sim.wait(500)  # the pods of the RayJob start
        sim.run()
        sim.wait(40)
        sim.reconcile()
        assert sim.phase == "Running"
        sim.wait(20)
        sim.reconcile()
        assert sim.attempt.stopping_at


class TestStart:
    def test_no_deadline_of_starting_counts_while_the_data_are_prepared(self) -> None:
        sim = preparing(startDeadlineSeconds=60)
        sim.wait(100_000)
        sim.reconcile()
        assert sim.phase == "Preparing"
        finish(sim)
        sim.ray(creation_time=sim.now.strftime("%Y-%m-%dT%H:%M:%SZ"))
        sim.wait(59)
        sim.reconcile()
        assert sim.phase == "Pending", "the RayJob has its whole time"
        sim.wait(2)
        sim.reconcile()
        assert (sim.phase, sim.attempt.reason) == ("Failed", "StartTimeout")

    def test_a_pod_that_cannot_post_has_started_when_it_runs(self) -> None:
        """The operator may serve no posts, or a policy of the network forbid them."""
        sim = simulation(startDeadlineSeconds=60)
        sim.reconcile()
        sim.add_pods(pod(1, "prepare"))
        sim.reconcile()
        sim.wait(1000)
        sim.reconcile()
        assert (sim.phase, sim.post) == ("Preparing", None)

    def test_a_create_error_of_the_ray_job_has_its_whole_time_too(self) -> None:
        sim = preparing(startDeadlineSeconds=60)
        sim.wait(1000)
        sim.create_error = CreateError(500, "InternalError", "a webhook failed")
        finish(sim)
        sim.reconcile()
        assert (sim.phase, sim.why()) == ("Pending", "False ClusterUnavailable")
        sim.wait(61)
        sim.reconcile()
        assert sim.phase == "Failed"

    def test_a_pod_of_the_job_that_never_starts_ends_the_job_as_any_pod_would(self) -> None:
        sim = simulation(startDeadlineSeconds=60)
        sim.reconcile()
        missing = 'persistentvolumeclaim "data" not found'
        problem = PodProblem("Unschedulable", missing)
        sim.add_pods(pod(1, "prepare", problem, phase="Pending", placed_at=None))
        sim.reconcile()
        assert (sim.phase, sim.why()) == ("Preparing", "False VolumeMissing")
        sim.wait(61)
        sim.reconcile()
        assert (sim.phase, sim.attempt.reason) == ("Failed", "VolumeMissing")
        assert sim.created == ["minimal-1-prepare"]

    def test_a_quota_that_refuses_the_pod_is_named(self) -> None:
        sim = simulation()
        sim.reconcile()
        sim.warnings = ('Error creating: pods "x" is forbidden: exceeded quota: team',)
        sim.reconcile()
        assert sim.why() == "False QuotaExceeded"

    def test_the_time_in_the_queue_of_the_job_does_not_count(self) -> None:
        sim = simulation(prepareQueue="cpus", startDeadlineSeconds=60)
        sim.reconcile()
        sim.workload = Workload(False, "couldn't assign flavors")
        sim.wait(1000)
        sim.reconcile()
        assert sim.phase == "Preparing"
        condition = sim.condition("Running")
        assert condition
        assert "couldn't assign flavors" in condition.message
        sim.prepare(suspended=False, start_time=sim.now.strftime("%Y-%m-%dT%H:%M:%SZ"))
        sim.wait(59)
        sim.reconcile()
        assert sim.phase == "Preparing"

    def test_a_queue_that_evicts_the_running_job_ends_an_attempt_that_does_not_count(self) -> None:
        sim = preparing(prepareQueue="cpus", maxAttempts=1)
        sim.prepare(suspended=True)
        sim.reconcile()
        assert (sim.attempt.reason, sim.phase) == ("Preempted", "Pending")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(8))
def test_killed_at_any_write_an_operator_goes_on_with_one_job_and_one_ray_job(
    number: int, after: bool
) -> None:
    sim = simulation()
    sim.killed_at, sim.killed_after = number, after
    kills = 0

    def reconcile() -> None:
        nonlocal kills
        try:
            sim.reconcile()
        except KilledError:
            kills += 1

    for _ in range(3):
        reconcile()
    sim.add_pods(pod(1, "prepare"))
    posts(sim)
    for _ in range(3):
        reconcile()
    posts(sim, stages=[DONE.model_dump(by_alias=True)])
    sim.prepare(succeeded=True)
    sim.pods["minimal-1-prepare"] = pod(1, "prepare", phase="Succeeded")
    for _ in range(5):
        reconcile()
        sim.collect()
    assert sim.created == ["minimal-1-prepare", "minimal-1"]
    assert (sim.preparations, len(sim.status.attempts)) == ({}, 1)
    assert sim.status.attempts[0].prepared_at
