"""A job's events: one for each transition, none for progress alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.status.simulation import INTERRUPTED, SUCCESS, Simulation, failed, new_job, pod, post
from tuneyard.api.status import JobStatus
from tuneyard.errors import Fault, PlanError
from tuneyard.status.events import MAX_MESSAGE_BYTES, Event, transition_events
from tuneyard.status.observe import Waiting
from tuneyard.status.observed import PodProblem, Workload


def simulation(**policy: Any) -> Simulation:
    return Simulation(new_job(**{f"runPolicy__{name}": value for name, value in policy.items()}))


def descriptions(sim: Simulation) -> list[str]:
    return [f"{event.type} {event.reason}" for event in sim.events]


PREPARED = {"name": "prepare", "kind": "prepare", "state": "Succeeded", "metrics": {"rows": 500}}
TRAINED = {
    "name": "sft",
    "kind": "sft",
    "state": "Succeeded",
    "metrics": {"steps": 90, "finalLoss": 2.0, "validationLoss": 1.23456},
}


def test_a_job_from_the_manifest_to_the_model() -> None:
    sim = simulation()
    sim.run()
    for step in range(5):
        sim.post = post(1, step, stages=[PREPARED])
        sim.reconcile()
    sim.post = post(1, 100, stages=[PREPARED, TRAINED])
    sim.reconcile()
    sim.end(SUCCESS)
    sim.settle()
    assert [tuple(event) for event in sim.events] == [
        ("Normal", "AttemptStarted", "attempt 1: RayJob minimal-1, 3 stages"),
        ("Normal", "Running", "attempt 1 runs"),
        ("Normal", "StageSucceeded", "prepare is done: rows 500"),
        ("Normal", "StageSucceeded", "sft is done: validationLoss 1.23456"),
        ("Normal", "StageSucceeded", "export is done"),
        ("Normal", "Succeeded", "the result is at s3://models/minimal/result"),
    ]


def test_held_out_rows_in_the_training_data_are_a_condition_and_one_warning() -> None:
    sim = simulation()
    sim.run()
    prepared = PREPARED | {"metrics": {"rows": 500, "leakedRows": 3}}
    for step in range(3):
        sim.post = post(1, step, stages=[prepared])
        sim.reconcile()
    (condition,) = [c for c in sim.status.conditions if c.type == "DataLeaked"]
    assert (condition.status, condition.reason) == ("True", "RowsInTraining")
    assert "3 held-out rows have text" in condition.message
    assert "spec.data.leaks: error" in condition.message
    assert descriptions(sim).count("Warning DataLeaked") == 1


def test_items_of_suites_in_the_training_data_are_the_same_condition() -> None:
    sim = simulation()
    sim.run()
    found = {"rows": 500, "leakedRows": 0, "leakedItems": 7, "searchedItems": 40}
    sim.post = post(1, 1, stages=[PREPARED | {"metrics": found}])
    sim.reconcile()
    (condition,) = [c for c in sim.status.conditions if c.type == "DataLeaked"]
    assert condition.status == "True"
    assert condition.message.startswith("7 items of suites have text that is also in the training")
    assert "spec.data.leaks: error" in condition.message


@pytest.mark.parametrize(
    ("metrics", "field"),
    [
        ({"leakedRows": 2, "leakedItems": 7}, "spec.leaks: error"),
        ({"leakedRows": 2, "leakedItems": 0}, "spec.sft.data.leaks: error"),
    ],
)
def test_the_leaks_of_an_alignment_name_its_own_fields(
    metrics: dict[str, float], field: str
) -> None:
    sim = simulation()
    sim.run()
    sim.job = sim.job.model_copy(update={"kind": "AlignmentJob"})
    sim.post = post(1, 1, stages=[PREPARED | {"metrics": metrics}])
    sim.reconcile()
    (condition,) = [c for c in sim.status.conditions if c.type == "DataLeaked"]
    assert condition.message.endswith(field)


@pytest.mark.parametrize("metrics", [{"rows": 500}, {"rows": 500, "leakedRows": 0}])
def test_without_leaks_there_is_no_warning(metrics: dict[str, float]) -> None:
    sim = simulation()
    sim.run()
    sim.post = post(1, 1, stages=[PREPARED | {"metrics": metrics}])
    sim.reconcile()
    leaked = [c.status for c in sim.status.conditions if c.type == "DataLeaked"]
    assert leaked == (["False"] if "leakedRows" in metrics else [])
    assert "Warning DataLeaked" not in descriptions(sim)


def test_a_plan_whose_first_attempt_waits_has_an_event_of_its_own() -> None:
    sim = simulation(suspend=True)
    sim.reconcile()
    assert descriptions(sim) == ["Normal Planned", "Normal Suspended"]
    sim.edit(suspend=False)
    sim.reconcile()
    assert descriptions(sim)[2:] == ["Normal Resumed", "Normal AttemptStarted"]


def test_progress_alone_is_no_event() -> None:
    sim = simulation()
    sim.run()
    before = len(sim.events)
    for step in range(10):
        sim.post = post(1, step, metrics=[])
        sim.reconcile()
    assert len(sim.events) == before


def test_an_unchanged_status_has_no_events() -> None:
    sim = simulation(queue="team-a")
    sim.run()
    assert transition_events(sim.status, sim.status) == []
    assert transition_events(None, JobStatus()) == []


def test_a_rejected_plan_is_one_warning_and_its_correction_starts_the_first_attempt() -> None:
    sim = simulation()
    for text in ("no", "still no"):
        sim.planned = PlanError([Fault("spec.model.uri", text)])
        sim.reconcile()
        sim.reconcile()
        sim.edit()
    sim.planned = None
    sim.reconcile()
    assert descriptions(sim) == [
        "Warning PlanRejected",
        "Warning PlanRejected",
        "Normal AttemptStarted",
    ]
    assert "still no" in sim.events[1].message


def test_waiting_for_a_model_is_one_event() -> None:
    sim = simulation()
    for phase in ("Pending", "Running"):
        sim.planned = Waiting("WaitingForModel", f"job base is not done yet: {phase}")
        sim.reconcile()
    assert descriptions(sim) == ["Normal WaitingForModel"]


def test_the_queue() -> None:
    sim = simulation(queue="team-a")
    sim.reconcile()
    sim.workload = Workload(admitted=False, message="insufficient quota")
    sim.reconcile()
    sim.run()
    sim.ray(suspended=True)
    sim.reconcile()
    sim.settle(3)
    assert descriptions(sim) == [
        "Normal AttemptStarted",
        "Normal Queued",
        "Normal Admitted",
        "Normal Running",
        "Warning AttemptEnded",
        "Normal Queued",
        "Normal AttemptStarted",
    ]
    assert sim.events[4].message.startswith("attempt 1: Preempted: the queue evicted the attempt")


def test_why_an_attempt_does_not_start_is_one_warning_for_each_reason() -> None:
    sim = simulation()
    sim.start()
    full = PodProblem("Unschedulable", "0/1 nodes: Insufficient cpu")
    fuller = PodProblem("Unschedulable", "0/2 nodes: Insufficient cpu")
    for trouble in (
        full,
        fuller,
        PodProblem("ErrImagePull", "x"),
        PodProblem("ImagePullBackOff", "y"),
    ):
        sim.add_pods(pod(1, "worker", trouble, phase="Pending"))
        sim.reconcile()
    assert descriptions(sim)[1:] == ["Warning Unschedulable", "Warning ImagePullFailed"]


def test_failure_and_retry() -> None:
    sim = simulation(maxAttempts=2)
    sim.run()
    sim.end(failed("DiskFull", retryable=True))
    sim.next_attempt()
    sim.run()
    sim.end(failed("LossNotFinite", advice="Lower training.learningRate."))
    sim.settle()
    assert descriptions(sim)[2:] == [
        "Warning AttemptEnded",
        "Normal AttemptStarted",
        "Normal Running",
        "Warning AttemptEnded",
        "Warning Failed",
    ]
    assert sim.events[2].message == "attempt 1: DiskFull: it was DiskFull"
    assert sim.events[-1].message == (
        "LossNotFinite: it was LossNotFinite. Lower training.learningRate."
    )


def test_suspend_and_resume() -> None:
    sim = simulation()
    sim.run()
    sim.edit(suspend=True)
    sim.reconcile()
    sim.end(INTERRUPTED)
    sim.settle()
    sim.edit(suspend=False)
    sim.reconcile()
    assert descriptions(sim)[2:] == [
        "Normal Suspending",
        "Normal AttemptEnded",
        "Normal Suspended",
        "Normal Resumed",
        "Normal AttemptStarted",
    ]


def test_a_stage_that_a_later_attempt_skips_has_one_event() -> None:
    sim = simulation()
    sim.run()
    sim.post = post(1, 5, stages=[PREPARED], outcome=failed("DiskFull", retryable=True))
    sim.reconcile()
    sim.next_attempt()
    sim.run()
    for state in ("Pending", "Skipped"):
        sim.post = post(2, 5, stages=[{**PREPARED, "state": state}])
        sim.reconcile()
    assert descriptions(sim).count("Normal StageSucceeded") == 1


def test_messages_fit_into_the_limit_of_kubernetes() -> None:
    sim = simulation()
    sim.planned = PlanError([Fault("spec.model.uri", "ü" * 3000)])
    sim.reconcile()
    (event,) = sim.events
    assert isinstance(event, Event)
    assert MAX_MESSAGE_BYTES - 2 <= len(event.message.encode()) <= MAX_MESSAGE_BYTES
