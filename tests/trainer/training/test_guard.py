"""The guard against forgetting, and the metric that chooses a checkpoint, on planted losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.rows import random_rows, train_stage, write_prepared
from tests.trainer.stop_after import StopAfter
from tuneyard.errors import StageError
from tuneyard_trainer.reporting.results import headline
from tuneyard_trainer.training import sft
from tuneyard_trainer.training.cross_entropy import CrossEntropy
from tuneyard_trainer.worker import Interrupted, StageContext, Worker

CPU = torch.device("cpu")
ROWS, HELD_OUT, GUARDED = random_rows(10), random_rows(4, seed=9), random_rows(4, seed=7)
GUARD = {"worsensBy": 0.1, "patience": 1}

Plant = Callable[..., None]


@pytest.fixture
def inputs(tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any) -> dict[str, Path]:
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS, HELD_OUT, guard=GUARDED)
    return {"model": tiny_model_dir, "data": tmp_path / "data"}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Return a function that plants the metrics of the base and of each evaluation."""

    def planted(**series: list[float]) -> None:
        lines = [
            dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)
        ]
        rest = iter(lines)
        monkeypatch.setattr(CrossEntropy, "held_out", lambda _: dict(next(rest)))

    return planted


def run(
    folder: Path, inputs: dict[str, Path], worker: Worker | None = None, **settings: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Train for 12 steps with an evaluation at every second one."""
    folder.mkdir(exist_ok=True)
    fixed = {"max_steps": 12, "epochs": None, "evaluation_steps": 2}
    context = StageContext(
        train_stage(**(fixed | settings)), inputs, folder, worker or Worker(0, 1, CPU)
    )
    outcome = sft.run(context)
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


VALIDATION = [3.0, 2.5, 2.0, 1.8, 1.5, 1.2, 1.0]
GENERAL = [4.0, 4.05, 4.02, 4.09, 4.2, 4.3, 4.4]


def test_the_guard_stops_at_the_first_evaluation_beyond_its_bound_and_keeps_the_best_before(
    tmp_path: Path, inputs: dict[str, Path], plant: Plant
) -> None:
    """The held-out loss still falls, so that the last step within the bound is the best one."""
    plant(validationLoss=VALIDATION, generalLoss=GENERAL)
    weights, outcome = run(tmp_path / "a", inputs, guard=GUARD)
    assert outcome.metrics["steps"] == 8
    assert outcome.details["bestStep"] == 6
    assert outcome.details["stoppedEarly"]
    assert outcome.details["stoppedByGuard"] == (
        "stopped by the guard at step 8: the general loss has risen by 0.2 nats per token, and the "
        "bound is 0.1; step 6 is kept"
    )
    assert outcome.details["stoppedByGuard"] in headline("sft", outcome.metrics, outcome.details)
    expected = {"validationLoss": 1.8, "generalLoss": 4.09, "baseGeneralLoss": 4.0}
    expected |= {"generalLossIncrease": 0.09, "baseValidationLoss": 3.0}
    assert {name: outcome.metrics[name] for name in expected} == pytest.approx(expected)
    measured = [line for line in lines(tmp_path / "a") if "generalLossIncrease" in line]
    assert [line["step"] for line in measured] == [2, 4, 6, 8]
    plant(validationLoss=VALIDATION, generalLoss=[4.0] * 7)
    at_six, _ = run(tmp_path / "b", inputs, guard=GUARD, max_steps=6, schedule={"type": "constant"})
    plant(validationLoss=VALIDATION, generalLoss=GENERAL)
    kept, _ = run(tmp_path / "c", inputs, guard=GUARD, schedule={"type": "constant"})
    assert any(not torch.equal(weights[name], kept[name]) for name in kept)
    close = [torch.allclose(at_six[name], kept[name], atol=1e-3) for name in kept]
    assert all(close)


def test_a_better_held_out_loss_beyond_the_bound_is_not_kept(
    tmp_path: Path, inputs: dict[str, Path], plant: Plant
) -> None:
    """With more patience, training goes on, and comes back within the bound without stopping."""
    plant(validationLoss=VALIDATION, generalLoss=[4.0, 4.0, 4.2, 4.0, 4.2, 4.2, 4.0])
    _, outcome = run(tmp_path / "a", inputs, guard={"worsensBy": 0.1, "patience": 2})
    assert outcome.metrics["steps"] == 10, "at the second in a row"
    assert outcome.details["bestStep"] == 6


def test_without_held_out_rows_the_last_evaluation_within_the_bound_is_kept(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any, plant: Plant
) -> None:
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS, guard=GUARDED)
    plant(generalLoss=GENERAL)
    inputs = {"model": tiny_model_dir, "data": tmp_path / "data"}
    _, outcome = run(tmp_path / "a", inputs, guard=GUARD)
    assert (outcome.metrics["steps"], outcome.details["bestStep"]) == (8, 6)
    assert outcome.metrics["generalLoss"] == 4.09


def test_a_run_within_the_bound_is_not_stopped(
    tmp_path: Path, inputs: dict[str, Path], plant: Plant
) -> None:
    plant(validationLoss=VALIDATION, generalLoss=[4.0, *[4.1 - 1e-9] * 6])
    _, outcome = run(tmp_path / "a", inputs, guard=GUARD)
    assert outcome.metrics["steps"] == 12
    assert "stoppedByGuard" not in outcome.details


def test_a_stage_fails_if_no_evaluation_is_within_the_bound(
    tmp_path: Path, inputs: dict[str, Path], plant: Plant
) -> None:
    plant(validationLoss=VALIDATION, generalLoss=[4.0, *[4.5] * 6])
    with pytest.raises(StageError) as failed:
        run(tmp_path / "a", inputs, guard=GUARD)
    assert failed.value.reason == "GuardExceeded"
    assert "no earlier step is kept" in str(failed.value)
    assert "training.evaluationSteps" in failed.value.advice


def test_a_guarded_run_that_was_killed_ends_as_an_uninterrupted_one(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """On real losses: a high rate on random rows raises the loss of other random rows."""
    settings = {"guard": {"worsensBy": 0.02, "patience": 2}, "learning_rate": 1e-2}
    whole, expected = run(tmp_path / "whole", inputs, **settings, max_steps=40)
    assert "stoppedByGuard" in expected.details
    for stop in (1, int(expected.metrics["steps"]) - 1):
        folder = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            run(folder, inputs, StopAfter(stop).worker(), **settings, max_steps=40)
        resumed, outcome = run(folder, inputs, **settings, max_steps=40)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert outcome.details["stoppedByGuard"] == expected.details["stoppedByGuard"]
        assert outcome.details["bestStep"] == expected.details["bestStep"]


@pytest.mark.parametrize(
    ("best_by", "best"), [(None, 12), ("validationLoss", 12), ("generalLoss", 4)]
)
def test_the_chosen_metric_decides_which_checkpoint_is_kept(
    best_by: Any, best: int, tmp_path: Path, inputs: dict[str, Path], plant: Plant
) -> None:
    plant(validationLoss=VALIDATION, generalLoss=GENERAL)
    _, outcome = run(tmp_path / "a", inputs, guard={"worsensBy": 9}, best_by=best_by)
    assert outcome.details["bestStep"] == best
    assert outcome.metrics["validationLoss"] == VALIDATION[best // 2]


def test_the_highest_value_of_a_metric_that_is_no_loss_is_the_best(
    tmp_path: Path, inputs: dict[str, Path], plant: Plant
) -> None:
    accuracy = [0.5, 0.6, 0.9, 0.8, 0.7, 0.8, 0.9]
    plant(validationLoss=VALIDATION, preferenceAccuracy=accuracy)
    _, outcome = run(tmp_path / "a", inputs, best_by="preferenceAccuracy")
    assert outcome.details["bestStep"] == 4, "the first of two equal ones"


def test_early_stopping_judges_by_the_chosen_metric(
    tmp_path: Path, inputs: dict[str, Path], plant: Plant
) -> None:
    plant(validationLoss=VALIDATION, generalLoss=GENERAL)
    settings = {"best_by": "generalLoss", "early_stopping": {"patience": 2}}
    _, outcome = run(tmp_path / "a", inputs, guard={"worsensBy": 9}, **settings)
    assert outcome.metrics["steps"] == 8, "two evaluations after step 4"
    assert "stoppedByGuard" not in outcome.details
