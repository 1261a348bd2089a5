"""Each gate gets the verdict that its evidence allows, and only a shown result is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tuneyard.api.evaluation import Gate
from tuneyard.api.gates import GateResult, overall
from tuneyard.api.plan import PlannedStage, StageInput
from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation.evidence import Estimate, Interval
from tuneyard_trainer.evaluation.gates import judge_gates
from tuneyard_trainer.evaluation.items import MAX_FLIPPED, Items
from tuneyard_trainer.evaluation.result import finish
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker


def items(
    tuned: NDArray[np.float64] | list[float],
    base: NDArray[np.float64] | list[float] | None = None,
    *,
    higher: bool = True,
    weights: NDArray[np.float64] | None = None,
) -> Items:
    ids = tuple(f"row {index + 1}" for index in range(len(tuned)))
    base_N = None if base is None else np.asarray(base, float)
    return Items(ids, np.asarray(tuned, float), base_N, higher, weights)


def answers(count: int, gained: int, lost: int, both: int = 0) -> Items:
    """Right and wrong answers: `gained` only of the tuned model, `lost` only of the base model."""
    tuned = [1.0] * (gained + both) + [0.0] * (count - gained - both)
    base = [0.0] * gained + [1.0] * (both + lost) + [0.0] * (count - gained - both - lost)
    return items(tuned, base)


def judged(gate: dict[str, Any], metrics: dict[str, float], **found: Items) -> GateResult:
    (result,) = judge_gates([Gate.model_validate(gate)], metrics, found)
    return result


# ---- bounds of the value --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [
        ({"atLeast": 0.5}, "pass"),
        ({"atLeast": 0.51}, "breach"),
        ({"atMost": 0.5}, "pass"),
        ({"atMost": 0.49}, "breach"),
        ({"atLeast": 0.4, "atMost": 0.45}, "breach"),
    ],
)
def test_a_bound_of_the_value_is_checked_against_the_value_and_includes_it(
    bound: dict[str, float], verdict: str
) -> None:
    """Without regard to the interval, as in 0.2: it contains each of these bounds."""
    found = answers(20, gained=10, lost=3)
    result = judged({"metric": "answerAccuracy", **bound}, {"answerAccuracy": 0.5},
                    answerAccuracy=found)  # fmt: skip
    assert result.verdict == verdict
    assert (result.low, result.high) == found.value_interval
    assert (result.value, result.items) == (0.5, 20)
    assert result.worse_by is None


@pytest.mark.parametrize(
    ("metric", "more", "change"),
    [
        ("answerAccuracy", "Hold out more rows", "training.epochs"),
        ("sense/accuracy", "Give the suite more items", "data.replay"),
        ("preferenceAccuracy", "Hold out more rows", "training.epochs, preferences.data"),
        ("complete", "Hold out more rows", "closer to its start (a higher beta"),
    ],
)
def test_the_remedy_names_what_changes_this_metric(metric: str, more: str, change: str) -> None:
    gate = Gate(metric=metric, atLeast=0.6, minItems=30)
    metrics, found = {metric: 0.5}, {metric: answers(20, gained=10, lost=3)}
    (few,) = judge_gates([gate], metrics, found)
    assert (few.verdict, more in few.remedy) == ("insufficientEvidence", True)
    (missed,) = judge_gates([gate.model_copy(update={"min_items": None})], metrics, found)
    assert (missed.verdict, change in missed.remedy) == ("breach", True)


def test_a_metric_that_is_no_mean_over_items_is_shown_with_its_estimate() -> None:
    gate = Gate(metric="lengthControlledWinRate", at_least=0.5, min_items=30)
    estimates = {gate.metric: Estimate(Interval(0.4, 0.7), 40)}
    (result,) = judge_gates([gate], {gate.metric: 0.55}, {}, estimates)
    assert result.verdict == "pass"
    assert (result.low, result.high, result.items) == (0.4, 0.7, 40)
    few = {gate.metric: Estimate(Interval(0.4, 0.7), 29)}
    assert judge_gates([gate], {gate.metric: 0.55}, {}, few)[0].verdict == "insufficientEvidence"
    (missing,) = judge_gates([gate], {}, {})
    assert missing.verdict == "missing"
    assert missing.remedy.startswith("Measure lengthControlledWinRate: it needs judgments of at l")


@pytest.mark.parametrize("metrics", [{}, {"reward": float("nan")}, {"reward": float("inf")}])
def test_a_metric_that_is_not_measured_or_no_number_is_missing(metrics: dict[str, float]) -> None:
    for bound in ({"atMost": 1.0}, {"notWorseThanBaseBy": 0.0}):
        result = judged({"metric": "reward", **bound}, metrics)
        assert result.verdict == "missing"
        assert result.value is None
        assert "not measured" in result.sentence


def test_fewer_items_than_the_gate_asks_for_are_no_evidence_whatever_the_value() -> None:
    for count, verdict in ((19, "insufficientEvidence"), (20, "pass")):
        gate = {"metric": "answerAccuracy", "atLeast": 0.1, "minItems": 20}
        found = answers(count, gained=10, lost=0)
        result = judged(gate, {"answerAccuracy": 10 / count}, answerAccuracy=found)
        assert result.verdict == verdict
    assert judged(gate, {"answerAccuracy": 0.5}).verdict == "insufficientEvidence", "unknown"


def test_intervals_of_metrics_that_are_computed_from_others_are_theirs() -> None:
    random = np.random.default_rng(3)
    base, weights = random.gamma(4, 1, 200), random.integers(1, 50, 200).astype(float)
    loss = items(base * random.uniform(0.5, 0.7, 200), base, higher=False, weights=weights)
    tuned = float(np.average(loss.tuned_N, weights=weights))
    reduction = 1 - tuned / float(np.average(base, weights=weights))
    metrics = {"lossReduction": reduction, "validationPerplexity": float(np.exp(tuned))}
    result = judged({"metric": "lossReduction", "atLeast": 0.1}, metrics, validationLoss=loss)
    assert result.low is not None
    assert result.high is not None
    assert 0.3 < result.low < reduction < result.high < 0.5
    result = judged({"metric": "validationPerplexity", "atMost": 1e9}, metrics, validationLoss=loss)
    assert (result.low, result.high) == pytest.approx(np.exp(loss.value_interval))
    found = answers(40, gained=9, lost=2)
    gain = {"metric": "answerAccuracyGain", "atLeast": 0.0}
    result = judged(gain, {"answerAccuracyGain": 7 / 40}, answerAccuracy=found)
    assert (result.low, result.high) == found.difference_interval
    assert result.items == 40


# ---- bounds of the difference from the base -------------------------------------------------


@pytest.mark.parametrize("higher", [True, False], ids=["higher is better", "lower is better"])
@pytest.mark.parametrize(
    ("worse_by", "verdict"),
    [(-0.5, "pass"), (0.0, "pass"), (0.2, "insufficientEvidence"), (0.6, "breach")],
)
def test_the_interval_of_the_difference_decides_in_the_metrics_direction(
    higher: bool, worse_by: float, verdict: str
) -> None:
    """The margin is 0.2 and the interval is 0.14 to each side."""
    noise = np.random.default_rng(5).normal(0, 1, 200)
    noise -= noise.mean()
    base = np.random.default_rng(6).normal(3, 1, 200)
    tuned = base + noise + (-worse_by if higher else worse_by)
    found = items(tuned, base, higher=higher)
    gate = {"metric": "reward", "notWorseThanBaseBy": 0.2}
    result = judged(gate, {"reward": float(tuned.mean())}, reward=found)
    assert result.verdict == verdict
    assert result.worse_by == pytest.approx(worse_by)
    assert result.base == pytest.approx(base.mean())
    assert result.low == pytest.approx(worse_by - 0.14, abs=0.02)
    assert result.high == pytest.approx(worse_by + 0.14, abs=0.02)


def test_a_few_equal_items_do_not_show_that_nothing_got_worse() -> None:
    """The interval of equal numbers has no width; ten items are the default of minItems."""
    gate = {"metric": "reward", "notWorseThanBaseBy": 0.01}
    for count, verdict in ((9, "insufficientEvidence"), (10, "pass")):
        found = items([2.5] * count, [2.5] * count)
        assert judged(gate, {"reward": 2.5}, reward=found).verdict == verdict
    found = items([2.5] * 9, [2.5] * 9)
    assert judged({**gate, "minItems": 9}, {"reward": 2.5}, reward=found).verdict == "pass"


def test_answers_of_which_none_flipped_show_more_the_more_there_are() -> None:
    gate = {"metric": "answerAccuracy", "notWorseThanBaseBy": 0.01}
    for count, verdict in ((24, "insufficientEvidence"), (400, "pass")):
        found = answers(count, gained=0, lost=0, both=count)
        assert judged(gate, {"answerAccuracy": 1.0}, answerAccuracy=found).verdict == verdict


def test_without_items_of_both_models_a_difference_is_not_shown() -> None:
    gate = {"metric": "reward", "notWorseThanBaseBy": 10.0}
    alone, broken = items([1.0] * 50), items([float("nan")] * 50, [0.0] * 50)
    for found, count in ((None, None), (alone, 50), (broken, 50), (items([], []), 0)):
        result = judged(gate, {"reward": 1.0}, **({} if found is None else {"reward": found}))
        assert result.verdict == "insufficientEvidence"
        assert result.items == count
        assert ("not compared" in result.sentence) == (count != 0)


def test_the_worst_verdict_of_the_required_gates_counts() -> None:
    def result(verdict: str, tier: str = "required") -> GateResult:
        return GateResult.model_validate(
            {"metric": "reward", "atLeast": 0.0, "verdict": verdict, "tier": tier}
        )

    assert overall([]) is None
    assert overall([result("breach", "advisory")]) is None
    assert overall([result("pass"), result("breach", "advisory")]) == "pass"
    assert overall([result("insufficientEvidence"), result("pass")]) == "insufficientEvidence"
    assert overall([result("insufficientEvidence"), result("breach")]) == "breach"
    assert overall([result("missing"), result("breach")]) == "missing"


# ---- the stage ------------------------------------------------------------------------------


def ended(
    folder: Path, gates: list[dict[str, Any]], metrics: dict[str, float], **found: Items
) -> tuple[StageOutcome | StageError, list[dict[str, Any]]]:
    """Finish an evaluation; return its outcome or error, and the reports."""
    settings = EvaluateSettings(
        compare_with_base=True,
        samples=0,
        max_new_tokens=1,
        gates=[Gate.model_validate(gate) for gate in gates],
    )
    inputs = {"tuned": StageInput(stage="sft")}
    stage = PlannedStage(name="evaluate", settings=settings, inputs=inputs, fingerprint="sha256:0")
    reports: list[dict[str, Any]] = []
    worker = Worker(0, 1, torch.device("cpu"), report=lambda **report: reports.append(report))
    context = StageContext(stage, {}, folder, worker, {"tuned": "sha256:weights"})
    try:
        return finish(context, settings.gates, metrics, [], items=found), reports
    except StageError as error:
        return error, reports


METRICS = {"answerAccuracy": 0.5, "validationLoss": 2.0}
ANSWERS = answers(40, gained=20, lost=4)
MET = {"metric": "answerAccuracy", "atLeast": 0.3}
MISSED = {"metric": "validationLoss", "atMost": 1.0}


def test_a_missed_gate_is_reported_with_every_finding_a_remedy_and_the_models_place(
    tmp_path: Path,
) -> None:
    gates = [MET, MISSED, {"metric": "validationLoss", "atMost": 1.5, "tier": "advisory"}]
    error, reports = ended(tmp_path, gates, METRICS, answerAccuracy=ANSWERS)
    assert isinstance(error, StageError)
    assert error.reason == "GateFailed"
    assert not error.retryable
    assert "1 of 2 required gates is not met" in error.message
    assert "kept in stages/sft/weights" in error.message
    assert "validationLoss is 2, below" not in error.message
    assert "validationLoss is 2, above 1: breach" in error.message
    assert "above 1.5: breach (advisory)" in error.message
    assert "answerAccuracy is 0.5, at least 0.3 (95% interval 0.3" in error.message
    assert "40 items): pass" in error.message
    assert "training.epochs" in error.advice
    verdicts = [gate.verdict for gate in reports[-1]["gates"]]
    assert verdicts == ["pass", "breach", "breach"]
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert [gate["verdict"] for gate in written["gates"]] == verdicts
    assert written["inputDigests"] == {"tuned": "sha256:weights"}, "there is no record"


@pytest.mark.parametrize(
    ("gate", "remedy"),
    [
        ({"metric": "answerAccuracy", "atLeast": 0.3, "minItems": 41}, "Hold out more rows"),
        ({"metric": "answerAccuracyGain", "atLeast": 0.3}, "held-out rows with the field expected"),
        ({"metric": "lossReduction", "atLeast": 0.3}, "has no value"),
    ],
)
def test_too_little_evidence_and_a_missing_metric_fail_a_required_gate_with_a_remedy(
    gate: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    error, _ = ended(tmp_path, [gate], METRICS, answerAccuracy=ANSWERS)
    assert isinstance(error, StageError)
    assert error.reason == "GateFailed"
    assert remedy in error.advice
    outcome, _ = ended(tmp_path, [{**gate, "tier": "advisory"}], METRICS, answerAccuracy=ANSWERS)
    assert isinstance(outcome, StageOutcome)


def test_the_record_holds_verdicts_intervals_and_flipped_items_and_no_value_of_an_item(
    tmp_path: Path,
) -> None:
    outcome, _ = ended(tmp_path, [MET], METRICS, answerAccuracy=answers(90, gained=40, lost=4))
    assert isinstance(outcome, StageOutcome)
    assert [gate["verdict"] for gate in outcome.details["gates"]] == ["pass"]
    found = outcome.details["evidence"]["answerAccuracy"]
    assert found["items"] == 90
    assert found["difference"] == pytest.approx(0.4)
    low, high = found["differenceInterval"]
    assert 0.2 < low < 0.4 < high < 0.6
    flips = found["flips"]
    assert (flips["gained"], flips["lost"]) == (40, 4)
    assert len(flips["gainedItems"]) == MAX_FLIPPED
    assert flips["lostItems"] == ["row 41", "row 42", "row 43", "row 44"]
    assert flips["pValue"] < 1e-7
    assert "items" not in outcome.details
    written = json.loads((tmp_path / "evaluation.json").read_text())
    values = written["items"]["answerAccuracy"]
    assert len(values["ids"]) == len(values["tuned"]) == len(values["base"]) == 90
    assert outcome.contents == ("evaluation.json",)


def test_values_that_are_not_right_or_wrong_have_no_flipped_items() -> None:
    assert items([0.5, 1.0], [1.0, 0.0]).flipped() is None
    assert items([1.0, 1.0]).flipped() is None
    assert items([1.0, 0.0], [0.0, 1.0]).flipped() == (["row 1"], ["row 2"])


def test_items_must_have_one_value_each() -> None:
    with pytest.raises(ValueError, match="2 items"):
        Items(("a", "b"), np.zeros(3), None, True)


def test_a_base_loss_of_almost_only_zeros_leaves_a_reduction_without_an_interval(
    tmp_path: Path,
) -> None:
    """A resample without the one row that has a loss has no ratio."""
    loss = items([0.1] * 10, [0.0] * 9 + [2.0], higher=False, weights=np.ones(10))
    assert loss.reduction_interval is None
    metrics = {"lossReduction": 0.5}
    result = judged({"metric": "lossReduction", "atLeast": 0.1}, metrics, validationLoss=loss)
    assert (result.verdict, result.value, result.low) == ("pass", 0.5, None)


def test_the_change_of_a_suite_and_the_value_before_have_the_items_of_its_metric() -> None:
    found = {"sense/accuracy": answers(50, gained=5, lost=2, both=30)}
    metrics = {"sense/accuracy": 0.7, "sense/baseAccuracy": 0.64, "sense/accuracyChange": 0.06}
    intervals = {
        "sense/accuracyChange": found["sense/accuracy"].difference_interval,
        "sense/baseAccuracy": found["sense/accuracy"].base_interval,
    }
    for metric, interval in intervals.items():
        gate = Gate(metric=metric, at_least=-0.02, min_items=50)
        (result,) = judge_gates([gate], metrics, found)
        assert (result.verdict, result.items) == ("pass", 50)
        assert (result.low, result.high) == interval
        more = gate.model_copy(update={"min_items": 51})
        assert judge_gates([more], metrics, found)[0].verdict == "insufficientEvidence"
