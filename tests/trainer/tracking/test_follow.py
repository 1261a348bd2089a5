"""A run is handed over once and whole, whatever the tracker does, and nothing waits for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.tracking.scene import (
    Blocked,
    KeepingTracker,
    Scene,
    progress,
    resumed,
    running,
    succeeded,
)
from tuneyard.errors import StageError
from tuneyard_trainer.tracking import follow, steps
from tuneyard_trainer.worker import Interrupted


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(follow, "FIRST_RETRY_SECONDS", 0.02)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def line(last: int) -> list[tuple[int, float]]:
    return [(step, 10.0 / step) for step in range(1, last + 1)]


def test_steps_are_handed_over_while_the_stage_runs(scene: Scene) -> None:
    tracker = KeepingTracker()
    with scene.followed(tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write([1, 2])
        wait_until(lambda: bool(tracker.runs) and tracker.line("sft/loss") == line(2))
        scene.write([3])
        wait_until(lambda: tracker.line("sft/loss") == line(3))
        tracking.follow(succeeded())
    (run,) = tracker.runs.values()
    assert run == [("record", "sft"), ("end", "FINISHED")]
    assert scene.said == ["Keeper: at home"]


def test_the_steps_after_a_checkpoint_are_not_read_before_the_stage_has_cut_them_off(
    scene: Scene,
) -> None:
    scene.write([1, 2, 3])
    tracker = KeepingTracker()
    with scene.followed(tracker) as tracking:
        tracking.follow(running())
        wait_until(lambda: bool(tracker.runs))
        time.sleep(0.1)
        assert tracker.line("sft/loss") == []
        scene.truncate(2)
        tracking.follow(resumed(2))
    assert tracker.line("sft/loss") == line(2)


def test_an_attempt_continues_the_run_of_the_one_before_it(scene: Scene) -> None:
    tracker = KeepingTracker()
    with scene.ended_by(Interrupted("sft", 3), tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write([1, 2, 3])
        wait_until(lambda: bool(tracker.runs) and tracker.line("sft/loss") == line(3))
    assert [*tracker.runs.values()] == [[]], "the run goes on"
    scene.next_attempt()
    scene.truncate(2)
    with scene.followed(tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(2))
        scene.write([3, 4])
        tracking.follow(succeeded())
    assert tracker.line("sft/loss") == line(4)
    assert len(tracker.runs) == 1


@pytest.mark.parametrize("change", ["data", "plan"])
def test_other_data_or_another_plan_begins_a_run_with_all_of_its_steps(
    scene: Scene, change: str
) -> None:
    tracker = KeepingTracker()
    with scene.followed(tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write([1, 2, 3])
        tracking.follow(succeeded())
    scene.next_attempt()
    identity = "sha256:1"
    if change == "data":
        scene.truncate(0)
        scene.write([1])
        identity = "sha256:2"
    else:
        stages = [stage.model_copy() for stage in scene.plan.stages]
        stages[-1] = stages[-1].model_copy(update={"fingerprint": "sha256:other"})
        scene.plan = scene.plan.model_copy(update={"stages": stages})
    with scene.followed(tracker) as tracking:
        tracking.follow(succeeded(identity=identity))
    assert len(tracker.runs) == 2
    assert tracker.line("sft/loss") == line(1 if change == "data" else 3)


def test_a_tracker_that_fails_gets_everything_once_it_works_with_one_warning(scene: Scene) -> None:
    tracker = KeepingTracker()
    tracker.errors = [ValueError("no"), ValueError("never")]
    with scene.followed(tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write([1, 2])
        wait_until(lambda: bool(tracker.runs) and tracker.line("sft/loss") == line(2))
        tracker.errors = [ValueError("again")]
        scene.write([3])
        wait_until(lambda: tracker.line("sft/loss") == line(3))
        tracking.follow(succeeded())
    (run,) = tracker.runs.values()
    assert run == [("record", "sft"), ("end", "FINISHED")]
    warnings = [text for text in scene.said if text.startswith("!")]
    assert len(warnings) == 1
    assert "Keeper (here) says no; the job goes on" in warnings[0]


def test_what_a_tracker_that_stays_down_did_not_get_is_counted_and_the_next_run_brings_it(
    scene: Scene,
) -> None:
    tracker = KeepingTracker()
    tracker.errors = [ValueError("no")] * 10_000
    with scene.followed(tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write([1, 2, 3])
        wait_until(lambda: len(tracker.errors) < 9_999)
        tracking.follow(succeeded())
    assert scene.said[-1].endswith(
        "did not get the whole run: 3 lines of metrics and its end are missing"
    )
    assert tracker.runs == {}

    tracker.errors = []
    scene.next_attempt()
    with scene.followed(tracker) as tracking:
        tracking.follow(succeeded())
    assert tracker.line("sft/loss") == line(3)
    assert next(iter(tracker.runs.values()))[-1] == ("end", "FINISHED")


def test_a_tracker_that_never_answers_holds_up_no_event_and_keeps_no_step(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "FINAL_SECONDS", 0.1)
    tracker = Blocked()
    with scene.followed(tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        assert tracker.entered.wait(60)
        for step in range(1, 10_001):
            tracking.follow(progress(step))
        scene.write([1, 2])
        assert not tracker.released.is_set()
        assert [stage.name for stage in tracking._seen.all()] == ["sft"]
    tracker.released.set()
    assert "2 lines of metrics and its end are missing" in scene.said[-1]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StageError("LossNotFinite", "NaN."), ("end", "FAILED")),
        (RuntimeError("a bug"), ("end", "FAILED")),
        (Interrupted("sft", 1), None),
    ],
)
def test_the_run_ends_as_the_job_does(
    scene: Scene, error: Exception, status: tuple[str, str] | None
) -> None:
    tracker = KeepingTracker()
    with scene.ended_by(error, tracker) as tracking:
        tracking.follow(running())
    (run,) = tracker.runs.values()
    assert run == ([status] if status else [])


def test_a_user_s_stop_on_one_machine_ends_the_run_as_killed(scene: Scene) -> None:
    tracker = KeepingTracker()
    with scene.ended_by(Interrupted("sft", 1), tracker, interrupted=lambda: "KILLED") as tracking:
        tracking.follow(running())
    assert [*tracker.runs.values()] == [[("end", "KILLED")]]


def test_an_attempt_that_a_newer_one_supersedes_hands_over_nothing_more(scene: Scene) -> None:
    tracker = KeepingTracker()
    stale = StageError("StaleAttempt", "a newer attempt.")
    with scene.ended_by(stale, tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write([1])
        wait_until(lambda: bool(tracker.runs) and tracker.line("sft/loss") == line(1))
        scene.store.claim(scene.plan.job, 2)
        scene.write([2])
        time.sleep(0.2)
    assert tracker.line("sft/loss") == line(1)
    assert [*tracker.runs.values()] == [[]]
    assert scene.said == ["Keeper: at home"]


def test_an_evaluation_that_missed_its_gate_is_handed_over(scene: Scene) -> None:
    tracker = KeepingTracker()
    failed = StageError("GateFailed", "too little.")
    with scene.ended_by(failed, tracker) as tracking:
        tracking.follow(running("evaluate"))
        file = scene.store.workdir("evaluate") / "evaluation.json"
        file.write_text(json.dumps({"metrics": {"lossReduction": 0.01}, "samples": []}))
    (run,) = tracker.runs.values()
    assert run == [
        ("evaluation", "evaluate", {"lossReduction": 0.01}),
        ("file", "evaluation.json", "evaluate"),
        ("end", "FAILED"),
    ]


def test_reports_are_handed_over_and_weights_are_not(scene: Scene) -> None:
    folder = scene.store.workdir("export")
    for name in ("README.md", "report.html", "model.safetensors", "record.json"):
        (folder / name).write_text("x")
    tracker = KeepingTracker()
    with scene.followed(tracker) as tracking:
        tracking.follow(succeeded("export"))
    (run,) = tracker.runs.values()
    assert [item for item in run if item[0] == "file"] == [
        ("file", "README.md", None),
        ("file", "report.html", None),
    ]


def test_a_line_is_read_when_it_is_complete_and_in_pieces_of_bounded_size(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "MOST_BYTES", 64)
    reader = steps.StepReader(scene.store)
    assert reader.next("sft") == ([], 0)
    scene.write(range(1, 11))
    path = scene.store.workdir("sft") / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 11, "loss": NaN, "stopped": "KlBlowUp", "late": true}\n{"step": 1')
    found = []
    while True:
        some, end = reader.next("sft")
        if not some:
            break
        assert len(some) <= 3
        found += some
        reader.advance("sft", end)
    assert [each.step for each in found] == [*range(1, 12)]
    assert found[-1].metrics == {}, "neither NaN nor a word nor a truth value is a metric"
    assert reader.unread("sft") == 0
    reader.restart()
    assert reader.unread("sft") == 11
