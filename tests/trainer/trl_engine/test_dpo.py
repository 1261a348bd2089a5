"""TRL's DPOTrainer and the native loop train the same policy on the same pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.preferring import CPU, loop_settings, planned, separable, write_pairs
from tests.trainer.stop_after import StopAfter
from tuneyard.api.adapters import Adapter
from tuneyard.api.stage_settings import DpoSettings
from tuneyard.errors import StageError
from tuneyard_trainer.preference import dpo as native
from tuneyard_trainer.trl_engine import dpo as trl
from tuneyard_trainer.worker import Interrupted, StageContext, Worker

LORA = {"lora": {"rank": 4}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return {"model": tiny_model_dir, "data": write_pairs(folder, tiny_model_dir, separable(28))}


def settings(loss: str = "sigmoid", adapter: Any = None, **loop: Any) -> DpoSettings:
    return DpoSettings(
        adapter=Adapter.model_validate(adapter) if adapter else None,
        loss=loss,  # type: ignore[arg-type]
        beta=0.5,
        label_smoothing=0.1 if loss == "robust" else 0.0,
        # 21 pairs in batches of 8: the last batch of an epoch is smaller.
        training=loop_settings(
            **{"learning_rate": 1e-3, "epochs": 2.0, "keep_best": False, **loop}
        ),
    )


def run(
    engine: Any, folder: Path, inputs: dict[str, Path], chosen: DpoSettings, worker: Any = None
) -> tuple[dict[str, torch.Tensor], Any]:
    folder.mkdir(exist_ok=True)
    stage = planned(chosen, micro_batch_tokens=100)
    outcome = engine.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("loss", "adapter"),
    [
        ("sigmoid", None),
        *((loss, LORA) for loss in ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down")),
    ],
)
def test_both_engines_reach_the_same_weights_by_the_same_losses(
    loss: str, adapter: Any, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    chosen = settings(loss, adapter)
    ours, expected = run(native, tmp_path / "native", inputs, chosen)
    theirs, found = run(trl, tmp_path / "trl", inputs, chosen)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)
    shared = ("step", "loss", "gradientNorm", "learningRate", "validationLoss", "tokens")
    rewards = ("chosenReward", "rejectedReward")
    for one, other in zip(lines(tmp_path / "native"), lines(tmp_path / "trl"), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & set(shared):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
        for name in one.keys() & set(rewards):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
        if one["step"] > 1 and "accuracy" in one:  # before, the policy is the reference
            assert other["accuracy"] == pytest.approx(one["accuracy"], abs=1e-6)
    for file in (tmp_path / "native" / "weights").glob("*.json"):
        assert (tmp_path / "trl" / "weights" / file.name).read_text() == file.read_text()
    assert found.metrics.keys() == expected.metrics.keys()
    start = lines(tmp_path / "trl")[0]["baseValidationLoss"]
    assert found.metrics["validationLoss"] < start


def test_a_stopped_run_goes_on_with_the_next_pair_and_the_same_reference(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    whole, _ = run(trl, tmp_path / "whole", inputs, settings())
    with pytest.raises(Interrupted) as stopped:
        run(trl, tmp_path / "parts", inputs, settings(), StopAfter(2).worker())
    assert stopped.value.step == 3
    resumed, outcome = run(trl, tmp_path / "parts", inputs, settings())
    assert outcome.details["resumedAtStep"] == 3
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5)


def test_a_second_stage_trains_the_adapter_of_the_first_one(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    first, _ = run(trl, tmp_path / "first", inputs, settings(adapter=LORA))
    later = {**inputs, "tuned": tmp_path / "first"}
    ours, _ = run(native, tmp_path / "native", later, settings(adapter=LORA))
    theirs, _ = run(trl, tmp_path / "trl", later, settings(adapter=LORA))
    assert first.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)
    start = lines(tmp_path / "trl")[0]["baseValidationLoss"]
    assert start == pytest.approx(lines(tmp_path / "native")[0]["baseValidationLoss"])


def test_a_trainer_prints_nothing(
    tmp_path: Path, inputs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run(trl, tmp_path / "trl", inputs, settings())
    out, err = capfd.readouterr()
    assert "grad_norm" not in out
    assert "%|" not in err  # a progress bar


def test_rankings_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [
        {"prompt": f"{i}?", "ranking": ["the warranty", "the lamp", "the desk"]} for i in range(8)
    ]
    rows = [{"prompt": row["prompt"], "responses": row["ranking"]} for row in rows]
    data = write_pairs(tmp_path / "ranked", tiny_model_dir, rows)
    with pytest.raises(StageError) as refused:
        run(trl, tmp_path / "trl", {"model": tiny_model_dir, "data": data}, settings())
    assert refused.value.reason == "WrongPreferences"
    assert "engine to native" in refused.value.advice
