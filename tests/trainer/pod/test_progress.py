"""What the operator is told of an attempt, event by event."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.finished import record
from tests.trainer.jobs import manifest, planned
from tuneyard.api.progress import Outcome, Post, ProgressReport
from tuneyard.api.status import Failure
from tuneyard_trainer.pod.progress import Story

START = 1_800_000_000.0


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(planned(manifest(tmp_path)), attempt=2, at=START)


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


def test_an_attempt_begins_with_every_stage_pending(story: Story) -> None:
    post = story.post()
    assert picture(post).attempt == 2
    assert [(s.name, s.kind, s.state) for s in picture(post).stages] == [
        (name, name, "Pending") for name in ("prepare", "sft", "evaluate", "export")
    ]
    assert post.trainer_status.progress_percentage == 0
    assert picture(post).resumed_step is None


def test_a_finished_stage_shows_its_record(story: Story) -> None:
    story.take(stage("prepare", "Skipped", rows=10.0), START)
    done = picture(story.post()).stages[0]
    assert done.state == "Skipped"
    assert done.metrics == {"rows": 10.0}
    assert done.digest is not None
    assert done.started_at is not None
    assert done.finished_at is not None


def test_steps_metrics_and_the_time_to_the_stages_end_follow_the_newest_event(story: Story) -> None:
    story.take(stage("sft", "Running"), START)
    story.take(progress(10, 100, loss=2.0) | {"resumedStep": 10}, START + 30)
    assert story.post().trainer_status.estimated_remaining_seconds is None
    story.take(progress(20, 100, loss=1.5, learningRate=1e-4, broken=math.nan), START + 50)
    post = story.post()
    assert post.trainer_status.estimated_remaining_seconds == 160  # 2 s a step since the resumption
    assert {m.name: m.value for m in post.trainer_status.metrics} == {
        "loss": 1.5,
        "learningRate": 1e-4,
    }
    shown = picture(post)
    assert (shown.stage, shown.step, shown.total_steps, shown.resumed_step) == ("sft", 20, 100, 10)


def test_news_of_a_stage_that_does_not_run_changes_nothing(story: Story) -> None:
    story.take(stage("sft", "Running"), START)
    story.take(progress(5, 10, name="prepare", loss=9.0), START)
    assert picture(story.post()).step == 0
    assert story.post().trainer_status.metrics == []


def test_the_percentage_only_grows_and_reaches_100_with_success_alone(story: Story) -> None:
    seen = []
    for name in ("prepare", "sft", "evaluate", "export"):
        story.take(stage(name, "Running"), START)
        for step in range(1, 11):
            story.take(progress(step, 10, name=name), START + step)
            seen.append(story.post().trainer_status.progress_percentage or 0)
        story.take(stage(name, "Succeeded"), START + 20)
        seen.append(story.post().trainer_status.progress_percentage or 0)
    assert seen == sorted(seen)
    assert seen[10] == 10  # prepare's share
    assert seen[21] == 80  # and training's
    assert seen[-1] == 99
    last = story.end(story.success(), START + 30)
    assert last.trainer_status.progress_percentage == 100


def test_a_total_that_turns_out_larger_takes_no_percentage_back(story: Story) -> None:
    story.take(stage("prepare", "Running"), START)
    story.take(progress(10, 10, name="prepare"), START + 1)
    story.take(progress(11, 100, name="prepare"), START + 2)
    assert story.post().trainer_status.progress_percentage == 10
    assert picture(story.post()).total_steps == 100


def test_success_names_the_result_its_digest_and_the_evaluations_metrics(story: Story) -> None:
    for name in ("prepare", "sft", "evaluate", "export"):
        story.take(stage(name, "Succeeded", **{f"{name}Metric": 1.0}), START)
    outcome = picture(story.end(story.success(), START)).outcome
    assert outcome
    assert outcome.result
    assert outcome.result.uri == "file://out/result"
    assert outcome.result.digest == record("export", {}).digest
    assert outcome.result.metrics == {"evaluateMetric": 1.0}


@pytest.mark.parametrize(("state", "left"), [("Failed", "Failed"), ("Interrupted", "Pending")])
def test_the_stage_that_ran_last_says_how_the_attempt_ended(
    story: Story, state: Any, left: str
) -> None:
    story.take(stage("sft", "Running"), START)
    story.take(progress(5, 10), START)
    outcome = Outcome(state=state, failure=Failure(reason="LossNotFinite", message="nan"))
    last = picture(story.end(outcome, START))
    assert last.stages[1].state == left
    assert last.outcome == outcome
    assert (last.stage, last.step) == ("sft", 5)
