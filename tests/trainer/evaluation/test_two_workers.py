"""Two workers measure what one does, in every part of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.evaluation.measuring import (
    ALONE,
    CPU,
    STAGES,
    evaluate_stage,
    measured,
    run,
)
from tests.trainer.several_workers import Notes, end_of, spawn
from tests.trainer.stop_after import StopAtCheck
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.models import policies
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import StageContext, Worker, never_stop

UNREACHABLE = [{"metric": "lossReduction", "atLeast": 0.999}]


class Counted:
    """Counts the rows that this worker measures for a loss, and fails on request."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.original = Forward.loss

    def __call__(self, forward: Any, model: Any, rows: Any, batch: Any, **settings: Any) -> Any:
        self.rows += batch.rows.tolist()
        return self.original(forward, model, rows, batch, **settings)


def broken(*_: Any, **__: Any) -> Any:
    raise MemoryError("no memory for the weights")


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    worker = Worker(rank, 2, CPU, identity=ALONE.identity if rank == 0 else "")
    for name in STAGES:
        counted = Counted()
        Forward.loss = lambda *values, counted=counted, **named: counted(*values, **named)  # type: ignore[assignment,method-assign,misc]
        run(name, folder / name, inputs, worker)
        Forward.loss = counted.original  # type: ignore[method-assign]
        notes[name, rank] = counted.rows
    (folder / "gated").mkdir(exist_ok=True)
    gated = StageContext(
        evaluate_stage(gates=UNREACHABLE),
        {"model": inputs["model"], "tuned": inputs["tuned"], "data": inputs["prepared"]},
        folder / "gated",
        worker,
    )
    notes["gated", rank] = end_of(lambda: evaluate.run(gated))
    for name in STAGES[:2]:
        checks = StopAtCheck(5)
        asked = replace(worker, stop=checks if rank == 1 else never_stop)
        notes["stopped", name, rank] = end_of(
            lambda name=name, asked=asked: run(name, folder / "stopped", inputs, asked)  # type: ignore[misc]
        )
    if rank == 1:
        policies.load_base = broken
    for name in STAGES[:2]:
        notes["memory", name, rank] = end_of(
            lambda name=name: run(name, folder / "memory", inputs, worker)  # type: ignore[misc]
        )


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]
) -> tuple[Path, dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, spawn(2, _worker, folder, inputs)


def each(two: tuple[Path, dict[Any, Any]], *name: Any) -> list[Any]:
    return [two[1][*name, rank] for rank in (0, 1)]


@pytest.mark.parametrize("name", STAGES)
def test_two_workers_measure_the_losses_and_sample_the_completions_of_one(
    name: str, two: tuple[Path, dict[Any, Any]], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    run(name, tmp_path, inputs, ALONE)
    one, by_two = measured(tmp_path), measured(two[0] / name)
    assert one["metrics"].keys() == by_two["metrics"].keys()
    assert by_two["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-5)
    assert by_two["samples"] == one["samples"]
    expected = {
        "held-out rows": {"validationLoss", "baseValidationLoss", "answerAccuracy"},
        "an alignment": {"preferenceAccuracy", "kl", "rewardGain", "winRate", "sycophancyShift"},
        "a reward model": {"rewardAccuracy"},
    }
    assert expected[name] <= one["metrics"].keys()


def test_each_worker_measures_half_of_the_rows(two: tuple[Path, dict[Any, Any]]) -> None:
    shares = each(two, "held-out rows")
    assert sorted(shares[0] + shares[1]) == sorted([*range(9), *range(9)])  # tuned and base
    assert sorted(map(len, shares)) == [8, 10]
    shares = each(two, "an alignment")
    assert all(shares)
    assert abs(len(shares[0]) - len(shares[1])) <= 4


def test_a_missed_gate_ends_both_workers_and_rank_0_has_written_the_result(
    two: tuple[Path, dict[Any, Any]],
) -> None:
    assert each(two, "gated") == ["GateFailed"] * 2
    assert measured(two[0] / "gated")["metrics"]["validationLoss"] > 0


@pytest.mark.parametrize("name", STAGES[:2])
def test_a_request_to_stop_one_worker_ends_both_and_writes_nothing(
    name: str, two: tuple[Path, dict[Any, Any]]
) -> None:
    assert each(two, "stopped", name) == ["interrupted"] * 2
    assert not (two[0] / "stopped" / "evaluation.json").exists()


@pytest.mark.parametrize("name", STAGES[:2])
def test_memory_that_runs_out_on_rank_1_ends_both_workers(
    name: str, two: tuple[Path, dict[Any, Any]]
) -> None:
    assert each(two, "memory", name) == ["MemoryError: no memory for the weights"] * 2
