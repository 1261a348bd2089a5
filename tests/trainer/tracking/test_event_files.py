"""TensorBoard's own reader shows each step of a run once, in order, over killed attempts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.jobs import manifest, planned
from tests.trainer.tracking.scene import Scene, resumed, running
from tuneyard_trainer.tracking import follow
from tuneyard_trainer.tracking.event_files import EventFiles
from tuneyard_trainer.tracking.state import TrackerState
from tuneyard_trainer.tracking.steps import Step
from tuneyard_trainer.worker import persist_nothing


def files(folder: Path) -> EventFiles:
    plan = planned(manifest(folder / "model", tracking={"tensorboard": {}}))
    return EventFiles(folder, plan, persist_nothing, place="tensorboard", where="here")


def shown(folder: Path, stage: str = "sft") -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a stage: steps and values by tag."""
    reader = EventAccumulator(str(folder / stage), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def steps(numbers: Sequence[int]) -> list[Step]:
    """Return steps, each evaluated if it is even: a second line with the step's number."""
    return [
        step
        for number in numbers
        for step in (
            Step(number, {"loss": float(-number)}),
            *([Step(number, {"validationLoss": float(number)})] if number % 2 == 0 else []),
        )
    ]


def whole(last: int) -> dict[str, list[tuple[int, float]]]:
    return {
        "sft/loss": [(number, -number) for number in range(1, last + 1)],
        "sft/validationLoss": [(number, number) for number in range(2, last + 1, 2)],
    }


def test_a_killed_attempt_and_the_next_one_show_one_line_without_a_gap_or_a_repeated_step(
    tmp_path: Path,
) -> None:
    first, state = files(tmp_path), TrackerState("tensorboard", [])
    first.open(state)
    first.add_steps("sft", steps(range(1, 5))[:-1])
    first.flush()
    stored = TrackerState(**state.to_json())
    first.add_steps("sft", steps([4])[-1:] + steps(range(5, 8)))
    first.flush()  # the process is killed here: the state does not say so

    # The last checkpoint is of step 3. The metrics' file is read from its beginning.
    second = files(tmp_path)
    second.open(stored)
    second.add_steps("sft", steps(range(1, 4)))
    second.add_steps("sft", steps(range(4, 11)))
    second.flush()
    second.close()
    assert shown(tmp_path) == whole(10)


def test_steps_that_were_not_flushed_before_an_error_are_written_again(tmp_path: Path) -> None:
    tracker, state = files(tmp_path), TrackerState("tensorboard", [])
    tracker.open(state)
    tracker.add_steps("sft", steps(range(1, 4)))
    tracker.flush()
    tracker.add_steps("sft", steps(range(4, 7)))
    assert state.steps["sft"] == 3
    tracker.open(state)
    tracker.add_steps("sft", steps(range(1, 9)))
    tracker.flush()
    assert shown(tmp_path) == whole(8)


def test_a_folder_that_could_not_be_written_to_for_a_while_has_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(follow, "FIRST_RETRY_SECONDS", 0.02)
    scene = Scene(tmp_path)
    tracker, full = files(tmp_path / "events"), OSError(28, "No space left on device")
    original, failing = tracker.add_steps, [full]

    def add_steps(stage: str, some: Sequence[Step]) -> None:
        original(stage, some)
        if some[0].step > 1 and failing:
            raise failing.pop()

    monkeypatch.setattr(tracker, "add_steps", add_steps)
    with scene.followed(tracker) as tracking:
        tracking.follow(running())
        tracking.follow(resumed(0))
        scene.write([1, 2, 3])
        path = tmp_path / "events" / "sft"
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        scene.write([4, 5])
    assert not failing
    assert "cannot be written: OSError: [Errno 28] No space left" in scene.said[1]
    assert [step for step, _ in shown(tmp_path / "events")["sft/loss"]] == [1, 2, 3, 4, 5]


def test_another_run_at_the_same_place_replaces_what_is_shown(tmp_path: Path) -> None:
    tracker, state = files(tmp_path), TrackerState("tensorboard", [])
    tracker.open(state)
    tracker.add_steps("sft", steps(range(1, 9)))
    tracker.flush()
    tracker.open(state.renewed())
    tracker.add_steps("sft", steps(range(1, 4)))
    tracker.flush()
    assert shown(tmp_path) == whole(3)


def test_an_evaluation_is_shown_once_and_the_manifest_as_text(tmp_path: Path) -> None:
    state = TrackerState("tensorboard", [])
    for _ in range(2):  # a stage that is skipped is handed over again
        tracker = files(tmp_path)
        tracker.open(state)
        tracker.add_evaluation("evaluate", {"lossReduction": 0.5, "code/pass@1": 0.25})
        tracker.flush()
        tracker.close()
    assert shown(tmp_path, "evaluate") == {
        "evaluate/lossReduction": [(0, 0.5)],
        "evaluate/code/pass_1": [(0, 0.25)],  # TensorBoard cleans names by itself
    }
    reader = EventAccumulator(str(tmp_path / "job"), size_guidance={"tensors": 0})
    reader.Reload()
    (tag,) = reader.Tags()["tensors"]
    (text,) = reader.Tensors(tag)
    assert b"kind: FineTuneJob" in text.tensor_proto.string_val[0]
