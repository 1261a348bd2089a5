"""The progress report of an attempt, event by event."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.finished import record
from tests.trainer.jobs import manifest, planned
from tuneyard.api.progress import Outcome, Post, ProgressReport
from tuneyard.api.status import Failure, StageCost
from tuneyard_trainer.pod.progress import AttemptProgress

START = 1_800_000_000.0


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptProgress:
    return AttemptProgress(planned(manifest(tmp_path)), attempt=2, at=START)


def stage(name: str, state: str, **metrics: float) -> dict[str, Any]:
    value = None
    if state != "Running":
        kind = record(name, metrics)
        value = kind.model_dump(mode="json", by_alias=True)
    return {"type": "stage", "stage": name, "state": state, "record": value}


def progress(step: int, total: int, name: str = "sft", **metrics: float) -> dict[str, Any]:
    return {
        "type": "progress",
        "stage": name,
        "step": step,
        "totalSteps": total,
        "metrics": metrics,
        "message": None,
        "resumedStep": None,
    }


def picture(post: Post) -> ProgressReport:
    assert post.tuneyard
    return post.tuneyard


def test_an_attempt_begins_with_every_stage_pending(attempt: AttemptProgress) -> None:
    post = attempt.post()
    assert picture(post).attempt == 2
    assert [(s.name, s.kind, s.state) for s in picture(post).stages] == [
        (name, name, "Pending") for name in ("prepare", "sft", "evaluate", "export")
    ]
    assert post.trainer_status.progress_percentage == 0
    assert picture(post).resumed_step is None


def test_a_finished_stage_shows_its_record(attempt: AttemptProgress) -> None:
    attempt.add(stage("prepare", "Skipped", rows=10.0), START)
    done = picture(attempt.post()).stages[0]
    assert done.state == "Skipped"
    assert done.metrics == {"rows": 10.0}
    assert done.digest is not None
    assert done.started_at is not None
    assert done.finished_at is not None


def test_a_stage_whose_files_another_job_prepared_says_so(attempt: AttemptProgress) -> None:
    event = stage("prepare", "Succeeded")
    attempt.add(event, START)
    assert picture(attempt.post()).stages[0].reused is None
    attempt.add(event | {"record": event["record"] | {"reused": True}}, START)
    assert picture(attempt.post()).stages[0].reused is True


def test_steps_metrics_and_the_time_to_the_stages_end_follow_the_newest_event(
    attempt: AttemptProgress,
) -> None:
    attempt.add(stage("sft", "Running"), START)
    attempt.add(progress(10, 100, loss=2.0) | {"resumedStep": 10}, START + 30)
    assert attempt.post().trainer_status.estimated_remaining_seconds is None
    attempt.add(progress(20, 100, loss=1.5, learningRate=1e-4, broken=math.nan), START + 50)
    post = attempt.post()
    assert post.trainer_status.estimated_remaining_seconds == 160  # 2 s a step since the resumption
    assert {m.name: m.value for m in post.trainer_status.metrics} == {
        "loss": 1.5,
        "learningRate": 1e-4,
    }
    shown = picture(post)
    assert (shown.stage, shown.step, shown.total_steps, shown.resumed_step) == ("sft", 20, 100, 10)


def test_a_metric_whose_name_is_too_long_for_a_post_is_left_out_of_it(
    attempt: AttemptProgress,
) -> None:
    attempt.add(stage("sft", "Running"), START)
    attempt.add(progress(1, 2, **{"a" * 128: 1.0, "b" * 129: 2.0}), START)
    assert [metric.name for metric in attempt.post().trainer_status.metrics] == ["a" * 128]


def test_progress_of_a_stage_that_does_not_run_changes_nothing(attempt: AttemptProgress) -> None:
    attempt.add(stage("sft", "Running"), START)
    attempt.add(progress(5, 10, name="prepare", loss=9.0), START)
    assert picture(attempt.post()).step == 0
    assert attempt.post().trainer_status.metrics == []


def test_the_percentage_never_falls_and_reaches_100_only_with_success(
    attempt: AttemptProgress,
) -> None:
    seen = []
    for name in ("prepare", "sft", "evaluate", "export"):
        attempt.add(stage(name, "Running"), START)
        for step in range(1, 11):
            attempt.add(progress(step, 10, name=name), START + step)
            seen.append(attempt.post().trainer_status.progress_percentage or 0)
        attempt.add(stage(name, "Succeeded"), START + 20)
        seen.append(attempt.post().trainer_status.progress_percentage or 0)
    assert seen == sorted(seen)
    assert seen[10] == 10  # prepare's share
    assert seen[21] == 80  # and training's
    assert seen[-1] == 99
    last = attempt.end(attempt.success(), START + 30)
    assert last.trainer_status.progress_percentage == 100


def test_a_larger_total_does_not_lower_the_percentage(attempt: AttemptProgress) -> None:
    attempt.add(stage("prepare", "Running"), START)
    attempt.add(progress(10, 10, name="prepare"), START + 1)
    attempt.add(progress(11, 100, name="prepare"), START + 2)
    assert attempt.post().trainer_status.progress_percentage == 10
    assert picture(attempt.post()).total_steps == 100


def test_success_names_the_result_its_digest_and_the_evaluations_metrics(
    attempt: AttemptProgress,
) -> None:
    for name in ("prepare", "sft", "evaluate", "export"):
        attempt.add(stage(name, "Succeeded", **{f"{name}Metric": 1.0}), START)
    outcome = picture(attempt.end(attempt.success(), START)).outcome
    assert outcome
    assert outcome.result
    assert outcome.result.uri == "file://out/result"
    assert outcome.result.digest == record("export", {}).digest
    assert outcome.result.metrics == {"evaluateMetric": 1.0}


@pytest.mark.parametrize(("state", "left"), [("Failed", "Failed"), ("Interrupted", "Pending")])
def test_the_last_stage_shows_how_the_attempt_ended(
    attempt: AttemptProgress, state: Any, left: str
) -> None:
    attempt.add(stage("sft", "Running"), START)
    attempt.add(progress(5, 10), START)
    outcome = Outcome(state=state, failure=Failure(reason="LossNotFinite", message="nan"))
    last = picture(attempt.end(outcome, START))
    assert last.stages[1].state == left
    assert last.outcome == outcome
    assert (last.stage, last.step) == ("sft", 5)


# ---- time and price -----------------------------------------------------------------------------


def costing(folder: Path, *, present: int | None = None, **compute: Any) -> AttemptProgress:
    """Return an attempt whose stage of 110 steps began an hour before step 10, and which then took
    36 s a step."""
    plan = planned(manifest(folder, compute=compute))
    attempt = AttemptProgress(plan, attempt=1, at=START - 999, workers=present)
    attempt.add(stage("sft", "Running"), START)
    attempt.add(progress(10, 110), START + 3600)
    assert picture(attempt.post()).cost is None
    attempt.add(progress(20, 110), START + 3960)
    return attempt


def test_the_whole_stage_is_the_time_so_far_and_the_steps_that_are_left(tmp_path: Path) -> None:
    cost = picture(costing(tmp_path).post()).cost
    assert cost == StageCost(total_seconds=3960 + 90 * 36)


def test_gpu_hours_count_all_gpus_and_the_price_all_workers(tmp_path: Path) -> None:
    compute = {"workers": 2, "gpusPerWorker": 4, "pricePerHour": 10.0}
    assert picture(costing(tmp_path, **compute).post()).cost == StageCost(
        total_seconds=7200, gpu_hours=16.0, price=40.0
    )


def test_an_attempt_with_fewer_workers_costs_less(tmp_path: Path) -> None:
    compute = {"workers": 2, "minWorkers": 1, "gpusPerWorker": 4, "pricePerHour": 10.0}
    assert picture(costing(tmp_path, present=1, **compute).post()).cost == StageCost(
        total_seconds=7200, gpu_hours=8.0, price=20.0
    )


def test_a_stage_that_begins_has_no_cost_of_the_one_before(tmp_path: Path) -> None:
    attempt = costing(tmp_path)
    attempt.add(stage("sft", "Succeeded"), START + 8000)
    assert picture(attempt.post()).cost is None
    attempt.add(stage("evaluate", "Running"), START + 8000)
    assert picture(attempt.post()).cost is None


VERDICT = {"metric": "lossReduction", "atLeast": 0.3, "verdict": "breach", "value": 0.1}


def test_the_verdicts_of_an_evaluation_are_posted_although_it_failed(
    attempt: AttemptProgress,
) -> None:
    attempt.add(stage("evaluate", "Running"), START)
    attempt.add({**progress(2, 2, "evaluate"), "gates": [VERDICT]}, START + 1)
    failure = Failure(reason="GateFailed", message="missed")
    post = attempt.end(Outcome(state="Failed", failure=failure), START + 2)
    (found,) = [s for s in picture(post).stages if s.gates]
    assert (found.name, found.state) == ("evaluate", "Failed")
    assert [gate.verdict for gate in found.gates] == ["breach"]


def test_the_verdicts_of_an_earlier_attempts_evaluation_are_those_of_its_record(
    attempt: AttemptProgress,
) -> None:
    value = record("evaluate", {}, gates=[{**VERDICT, "verdict": "pass"}])
    skipped = stage("evaluate", "Skipped")
    skipped["record"] = value.model_dump(mode="json", by_alias=True)
    attempt.add(skipped, START)
    (found,) = [s for s in picture(attempt.post()).stages if s.gates]
    assert [gate.verdict for gate in found.gates] == ["pass"]
