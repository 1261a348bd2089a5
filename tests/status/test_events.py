"""A job's events: one for each transition, none for mere progress."""

from __future__ import annotations

from typing import Any

from tests.status.world import INTERRUPTED, SUCCESS, World, failed, new_job, pod, post
from tuneyard.api.status import JobStatus
from tuneyard.errors import Fault, PlanError
from tuneyard.status.events import MOST_BYTES, Event, told
from tuneyard.status.observe import Waiting
from tuneyard.status.observed import Trouble, Workload


def world(**policy: Any) -> World:
    return World(new_job(**{f"runPolicy__{name}": value for name, value in policy.items()}))


def story(played: World) -> list[str]:
    return [f"{event.type} {event.reason}" for event in played.events]


PREPARED = {"name": "prepare", "kind": "prepare", "state": "Succeeded", "metrics": {"rows": 500}}
TRAINED = {
    "name": "sft",
    "kind": "sft",
    "state": "Succeeded",
    "metrics": {"steps": 90, "finalLoss": 2.0, "validationLoss": 1.23456},
}


def test_a_life_from_the_manifest_to_the_model() -> None:
    played = world()
    played.run()
    for step in range(5):
        played.post = post(1, step, stages=[PREPARED])
        played.look()
    played.post = post(1, 100, stages=[PREPARED, TRAINED])
    played.look()
    played.end(SUCCESS)
    played.settle()
    assert [tuple(event) for event in played.events] == [
        ("Normal", "Planned", "3 stages"),
        ("Normal", "AttemptStarted", "attempt 1: RayJob minimal-1"),
        ("Normal", "Running", "attempt 1 runs"),
        ("Normal", "StageSucceeded", "prepare is done: rows 500"),
        ("Normal", "StageSucceeded", "sft is done: validationLoss 1.23456"),
        ("Normal", "StageSucceeded", "export is done"),
        ("Normal", "Succeeded", "the result lies at s3://models/minimal/result"),
    ]


def test_progress_alone_is_no_event() -> None:
    played = world()
    played.run()
    before = len(played.events)
    for step in range(10):
        played.post = post(1, step, metrics=[])
        played.look()
    assert len(played.events) == before


def test_a_status_that_did_not_change_tells_nothing() -> None:
    played = world(queue="team-a")
    played.run()
    assert told(played.status, played.status) == []
    assert told(None, JobStatus()) == []


def test_a_rejected_plan_is_one_warning_and_its_correction_another_story() -> None:
    played = world()
    for text in ("no", "still no"):
        played.planned = PlanError([Fault("spec.model.uri", text)])
        played.look()
        played.look()
        played.edit()
    played.planned = None
    played.look()
    assert story(played) == [
        "Warning PlanRejected",
        "Warning PlanRejected",
        "Normal Planned",
        "Normal AttemptStarted",
    ]
    assert "still no" in played.events[1].message


def test_waiting_for_a_model_is_told_once() -> None:
    played = world()
    for phase in ("Pending", "Running"):
        played.planned = Waiting("WaitingForModel", f"job base is not done yet: {phase}")
        played.look()
    assert story(played) == ["Normal WaitingForModel"]


def test_the_queue() -> None:
    played = world(queue="team-a")
    played.look()
    played.workload = Workload(admitted=False, message="insufficient quota")
    played.look()
    played.run()
    played.ray(suspended=True)
    played.look()
    played.settle(3)
    assert story(played) == [
        "Normal Planned",
        "Normal AttemptStarted",
        "Normal Queued",
        "Normal Admitted",
        "Normal Running",
        "Warning AttemptEnded",
        "Normal Queued",
        "Normal AttemptStarted",
    ]
    assert played.events[5].message.startswith("attempt 1: Preempted: the queue took over")


def test_why_an_attempt_does_not_start_is_one_warning_for_each_reason() -> None:
    played = world()
    played.start()
    full = Trouble("Unschedulable", "0/1 nodes: Insufficient cpu")
    fuller = Trouble("Unschedulable", "0/2 nodes: Insufficient cpu")
    for trouble in (full, fuller, Trouble("ErrImagePull", "x"), Trouble("ImagePullBackOff", "y")):
        played.add_pods(pod(1, "worker", trouble, phase="Pending"))
        played.look()
    assert story(played)[2:] == ["Warning Unschedulable", "Warning ImagePullFailed"]


def test_failure_and_retry() -> None:
    played = world(maxAttempts=2)
    played.run()
    played.end(failed("DiskFull", retryable=True))
    played.next_attempt()
    played.run()
    played.end(failed("LossNotFinite", advice="Lower training.learningRate."))
    played.settle()
    assert story(played)[3:] == [
        "Warning AttemptEnded",
        "Normal AttemptStarted",
        "Normal Running",
        "Warning AttemptEnded",
        "Warning Failed",
    ]
    assert played.events[3].message == "attempt 1: DiskFull: it was DiskFull"
    assert played.events[-1].message == (
        "LossNotFinite: it was LossNotFinite. Lower training.learningRate."
    )


def test_suspend_and_resume() -> None:
    played = world()
    played.run()
    played.edit(suspend=True)
    played.look()
    played.end(INTERRUPTED)
    played.settle()
    played.edit(suspend=False)
    played.look()
    assert story(played)[3:] == [
        "Normal Suspending",
        "Normal AttemptEnded",
        "Normal Suspended",
        "Normal Resumed",
        "Normal AttemptStarted",
    ]


def test_a_stage_that_a_later_attempt_skips_is_told_once() -> None:
    played = world()
    played.run()
    played.post = post(1, 5, stages=[PREPARED], outcome=failed("DiskFull", retryable=True))
    played.look()
    played.next_attempt()
    played.run()
    for state in ("Pending", "Skipped"):
        played.post = post(2, 5, stages=[{**PREPARED, "state": state}])
        played.look()
    assert story(played).count("Normal StageSucceeded") == 1


def test_messages_are_as_long_as_kubernetes_takes_them() -> None:
    played = world()
    played.planned = PlanError([Fault("spec.model.uri", "ü" * 3000)])
    played.look()
    (event,) = played.events
    assert isinstance(event, Event)
    assert MOST_BYTES - 2 <= len(event.message.encode()) <= MOST_BYTES
