"""The verdicts on the gates decide a condition, a warning, and whether the result is promotable."""

from __future__ import annotations

from typing import Any

import pytest

from tests.status.simulation import SUCCESS, Simulation, failed, new_job, post
from tuneyard.api.gates import GateResult
from tuneyard.api.status import JobStatus
from tuneyard.status.patches import dump, status_patch


def gate(verdict: str, tier: str = "required", **more: Any) -> dict[str, Any]:
    bound = {"metric": "answerAccuracy", "atLeast": 0.3, "value": 0.25, "items": 20}
    return {**bound, "verdict": verdict, "tier": tier, **more}


def evaluated(gates: list[dict[str, Any]], state: str = "Succeeded") -> dict[str, Any]:
    return {"name": "export", "kind": "export", "state": state, "gates": gates}


def running(gates: list[dict[str, Any]], state: str = "Succeeded") -> Simulation:
    sim = Simulation(new_job())
    sim.run()
    for step in (1, 2):
        sim.post = post(1, step, stages=[evaluated(gates, state)])
        sim.reconcile()
    return sim


@pytest.mark.parametrize(
    ("gates", "status", "reason"),
    [
        ([gate("pass"), gate("breach", "advisory")], "True", "GatesPassed"),
        ([gate("breach", "advisory")], "True", "NoRequiredGates"),
        ([gate("pass"), gate("breach")], "False", "GateFailed"),
        ([gate("missing", value=None)], "False", "GateFailed"),
        ([gate("insufficientEvidence", minItems=30)], "Unknown", "InsufficientEvidence"),
        ([gate("insufficientEvidence"), gate("breach")], "False", "GateFailed"),
    ],
)
def test_the_required_gates_decide_the_condition(
    gates: list[dict[str, Any]], status: str, reason: str
) -> None:
    condition = running(gates).condition("GatesPassed")
    assert condition is not None
    assert (condition.status, condition.reason) == (status, reason)


def test_the_condition_names_each_gate_that_is_not_met_with_its_evidence() -> None:
    missed = gate("breach", low=0.1, high=0.45)
    condition = running([gate("pass"), missed]).condition("GatesPassed")
    assert condition is not None
    assert condition.message == (
        "answerAccuracy is 0.25, below 0.3 (95% interval 0.1 to 0.45, 20 items)"
    )


def test_a_job_without_gates_has_no_such_condition_and_no_such_field() -> None:
    sim = running([])
    assert sim.condition("GatesPassed") is None
    assert all("gates" not in stage for stage in dump(sim.status)["stages"])
    sim.end(SUCCESS)
    sim.settle()
    assert sim.status.result is not None
    assert sim.status.result.promotable is None
    assert "promotable" not in dump(sim.status)["result"]


@pytest.mark.parametrize(
    ("gates", "promotable"),
    [
        ([gate("pass"), gate("breach", "advisory")], True),
        ([gate("pass"), gate("insufficientEvidence")], False),
        ([gate("breach", "advisory")], None),
    ],
)
def test_a_result_is_promotable_only_if_all_its_required_gates_are_met(
    gates: list[dict[str, Any]], promotable: bool | None
) -> None:
    sim = running(gates)
    sim.end(SUCCESS)
    sim.settle()
    assert sim.phase == "Succeeded"
    assert sim.status.result is not None
    assert sim.status.result.promotable is promotable


def test_a_failed_evaluation_keeps_its_verdicts_and_has_no_result() -> None:
    sim = running([gate("breach")], "Running")
    sim.end(failed("GateFailed"))
    sim.settle()
    assert sim.phase == "Failed"
    assert sim.status.result is None
    (stage,) = [stage for stage in sim.status.stages if stage.gates]
    assert [result.verdict for result in stage.gates] == ["breach"]
    condition = sim.condition("GatesPassed")
    assert condition is not None
    assert condition.status == "False"


def test_a_missed_advisory_gate_is_one_warning() -> None:
    sim = running([gate("pass"), gate("breach", "advisory")])
    warnings = [event for event in sim.events if event.reason == "AdvisoryGateMissed"]
    assert [(event.type, event.message) for event in warnings] == [
        ("Warning", "answerAccuracy is 0.25, below 0.3 (20 items)")
    ]
    assert "AdvisoryGateMissed" not in running([gate("breach")]).event_reasons()


def test_a_posted_verdict_without_a_bound_is_shown_and_breaks_nothing() -> None:
    result = GateResult.model_validate({"metric": "reward", "verdict": "breach", "value": 1.0})
    assert result.sentence == "reward is 1"
    assert running([{"metric": "reward", "verdict": "breach"}]).condition("GatesPassed")


def test_the_verdicts_of_a_newer_version_survive_a_patch() -> None:
    stored = {"stages": [evaluated([{**gate("pass"), "ofANewerVersion": 1}])]}
    before = JobStatus.model_validate(stored)
    patch, _ = status_patch(stored, before, before.model_copy(update={"phase": "Running"}))
    assert patch == {"phase": "Running"}
