"""DPO and KTO on a model that two workers share, and the comparison of the models afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.preferring import CPU, loop_settings, planned, separable, write_pairs
from tests.trainer.several_workers import Notes, end_of, spawn
from tests.trainer.stop_after import StopAfter, StopAtCheck
from tuneyard.api.adapters import Adapter
from tuneyard.api.plan import PlannedStage, TrainRuntime
from tuneyard.api.stage_settings import DpoSettings, EvaluateSettings
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.models import sharding
from tuneyard_trainer.trl_engine import dpo, kto
from tuneyard_trainer.worker import Interrupted, StageContext, Worker, never_stop

LORA = {"lora": {"rank": 4}}
CASES: dict[str, tuple[str, Any]] = {
    "dpo, full": ("sigmoid", None),
    "dpo, lora": ("sigmoid", LORA),
    "kto, lora": ("kto", LORA),
}
SHARED = TrainRuntime(micro_batch_tokens=100, sharding="fsdp")
WHOLE = TrainRuntime(micro_batch_tokens=100)
ALONE = Worker(0, 1, CPU)
STOP_CHECKS = (3, 9)
"""Before the first model is loaded, and while it measures."""


def stage_of(case: str, runtime: TrainRuntime) -> PlannedStage:
    loss, adapter = CASES[case]
    settings = DpoSettings(
        adapter=Adapter.model_validate(adapter) if adapter else None,
        loss=loss,  # type: ignore[arg-type]
        beta=0.5,
        label_smoothing=0.0,
        training=loop_settings(learning_rate=1e-3, epochs=2.0, keep_best=False),
    )
    return planned(settings).model_copy(update={"runtime": runtime})


def evaluate_stage(runtime: TrainRuntime) -> PlannedStage:
    settings = {
        "chat": {"system_prompt": None, "chat_template": None},
        "compare_with_base": True,
        "completions": {"prompts": None, "sampling": {"max_new_tokens": 8}},
        "max_new_tokens": 8,
        "reward": [{"rule": {"json_schema": "{}"}}],
        "preferences": {"beta": 0.5},
        "samples": 3,
        "gates": [],
        "seed": 2,
    }
    stage = planned(EvaluateSettings.model_validate(settings))
    return stage.model_copy(update={"runtime": runtime})


def train(
    case: str, folder: Path, inputs: Mapping[str, Path], worker: Worker, runtime: TrainRuntime
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    given = {"model": inputs["model"], "data": inputs[case[:3]]}
    trainer: Any = kto if case.startswith("kto") else dpo
    trainer.run(StageContext(stage_of(case, runtime), given, folder, worker))


def measure(
    case: str, folder: Path, tuned: Path, inputs: Mapping[str, Path], worker: Worker, runtime: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    given = {"model": inputs["model"], "pairs": inputs[case[:3]], "tuned": tuned}
    evaluate.run(StageContext(evaluate_stage(runtime), given, folder, worker))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "weights").glob("*.safetensors")))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """A model, 27 pairs and the same rows as labeled completions."""
    folder, rows = tmp_path_factory.mktemp("preferences"), separable(27)
    return {
        "model": tiny_model_dir,
        "dpo": write_pairs(folder / "pairs", tiny_model_dir, rows),
        "kto": write_pairs(folder / "labeled", tiny_model_dir, rows, labeled=True),
    }


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    worker, loaded = Worker(rank, 2, CPU), sharding.require_sharded

    def noted(model: Any, world_size: int) -> None:
        loaded(model, world_size)
        notes["held", rank] = sharding.local_bytes(model)

    sharding.require_sharded = noted
    for case in CASES:
        train(case, folder / case, inputs, worker, SHARED)
        notes["trained", case, rank] = notes.pop(("held", rank))
    for case in ("dpo, full", "kto, lora"):
        measure(case, folder / f"{case}, measured", folder / case, inputs, worker, SHARED)
        notes["measured", case, rank] = notes.pop(("held", rank))
    for check in STOP_CHECKS:
        asked = replace(worker, stop=StopAtCheck(check) if rank == 1 else never_stop)
        notes["stopped", check, rank] = end_of(
            partial(measure, case, folder / "asked", folder / case, inputs, asked, SHARED)
        )
    for case in ("dpo, full", "kto, lora"):
        stopper = StopAfter(2)
        asked = replace(worker, report=stopper.report, stop=stopper if rank else never_stop)
        with contextlib.suppress(Interrupted):
            train(case, folder / f"{case}, stopped", inputs, asked, SHARED)


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]
) -> tuple[Path, dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, spawn(2, _worker, folder, inputs)


@pytest.mark.parametrize("case", CASES)
def test_workers_that_share_the_model_reach_the_weights_of_one_that_has_it_all(
    case: str, two: tuple[Path, dict[Any, Any]], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    train(case, tmp_path, inputs, ALONE, WHOLE)
    expected, found = weights(tmp_path), weights(two[0] / case)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
    names = ("step", "loss", "gradientNorm", "validationLoss", "baseValidationLoss", "kl")
    curves = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, two[0] / case)
    ]
    for one, other in zip(*curves, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & set(names):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("rank", [0, 1])
def test_each_worker_holds_half_of_the_model_while_it_trains_and_while_it_measures(
    rank: int, two: tuple[Path, dict[Any, Any]]
) -> None:
    for case in CASES:
        held, total = two[1]["trained", case, rank]
        assert 0.45 < held / total < 0.55, case
    for case in ("dpo, full", "kto, lora"):
        held, total = two[1]["measured", case, rank]
        assert 0.45 < held / total < 0.55, case


@pytest.mark.parametrize("case", ["dpo, full", "kto, lora"])
def test_a_shared_model_is_measured_as_a_whole_one(
    case: str, two: tuple[Path, dict[Any, Any]], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    measure(case, tmp_path, two[0] / case, inputs, ALONE, WHOLE)
    one, shared = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in (tmp_path, two[0] / f"{case}, measured")
    )
    assert {"preferenceAccuracy", "kl", "rewardGain", "sycophancyShift"} <= one["metrics"].keys()
    assert shared["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-4)
    assert shared["samples"] == one["samples"]


def test_a_request_to_stop_one_worker_ends_the_measurement_on_both(
    two: tuple[Path, dict[Any, Any]],
) -> None:
    for check in STOP_CHECKS:
        assert [two[1]["stopped", check, rank] for rank in (0, 1)] == ["interrupted"] * 2
    assert not (two[0] / "asked" / "evaluation.json").exists()


@pytest.mark.parametrize("case", ["dpo, full", "kto, lora"])
def test_a_stopped_run_on_a_shared_model_goes_on_with_a_whole_one_and_its_reference(
    case: str, two: tuple[Path, dict[Any, Any]], inputs: dict[str, Path]
) -> None:
    folder = two[0] / f"{case}, stopped"
    assert not (folder / "weights").exists()
    train(case, folder, inputs, ALONE, WHOLE)
    expected, found = weights(two[0] / case), weights(folder)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
