"""TRL's RewardTrainer and the native loop train the same reward model on the same pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.preferring import CPU, loop_settings, planned, separable, write_pairs
from tests.trainer.stop_after import StopAfter
from tuneyard.api.adapters import Adapter
from tuneyard.api.stage_settings import RewardSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import reward_models
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.preference import reward as native
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.training.batches import Order
from tuneyard_trainer.trl_engine import reward as trl
from tuneyard_trainer.worker import Interrupted, StageContext, Worker

LORA = {"lora": {"rank": 4}}
SMALL = 1e-3
"""A learning rate at which both engines stay within 1e-4 of each other."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return {"model": tiny_model_dir, "data": write_pairs(folder, tiny_model_dir, separable(28))}


def settings(
    adapter: Any = None, margin: float = 0.0, centering: float = 0.0, **loop: Any
) -> RewardSettings:
    return RewardSettings(
        adapter=Adapter.model_validate(adapter) if adapter else None,
        margin=margin,
        centering=centering,
        # 21 pairs in batches of 8: the last batch of an epoch is smaller. Ten steps and more.
        training=loop_settings(
            **{"learning_rate": SMALL, "epochs": 4.0, "keep_best": False, **loop}
        ),
    )


def run(
    engine: Any, folder: Path, inputs: dict[str, Path], chosen: RewardSettings, worker: Any = None
) -> tuple[dict[str, torch.Tensor], Any]:
    folder.mkdir(exist_ok=True)
    stage = planned(chosen, micro_batch_tokens=100)
    outcome = engine.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(folder / "weights" / "model.safetensors"), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


JOBS: dict[str, dict[str, Any]] = {
    "full, with a margin and centering": {"margin": 0.5, "centering": 0.1},
    "lora, with a margin and centering": {"adapter": LORA, "margin": 0.5, "centering": 0.1},
    "qlora": {"adapter": {"qlora": {"rank": 4}}},
    "keeping the best": {"keep_best": True, "evaluation_steps": 1, "learning_rate": 1e-2},
    "stopped early": {
        "adapter": LORA,
        "early_stopping": {"patience": 1, "minDelta": 10.0},
        "evaluation_steps": 1,
    },
}


@pytest.mark.parametrize("name", JOBS)
def test_both_engines_reach_the_same_weights_by_the_same_losses(
    name: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    chosen = settings(**JOBS[name])
    ours, expected = run(native, tmp_path / "native", inputs, chosen)
    theirs, found = run(trl, tmp_path / "trl", inputs, chosen)
    assert ours.keys() == theirs.keys()
    # Rounding grows with the steps that adapt to it.
    tolerance = 1e-4 if chosen.training.learning_rate == SMALL else 2e-3
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=tolerance)
    for one, other in zip(lines(tmp_path / "native"), lines(tmp_path / "trl"), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"tokensPerSecond"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    assert found.metrics.keys() == expected.metrics.keys()
    assert found.details == {**expected.details, "engine": "trl"}
    for file in ("weights/config.json", "tokenizer/tokenizer_config.json"):
        assert (tmp_path / "trl" / file).read_text() == (tmp_path / "native" / file).read_text()


def test_a_stopped_run_goes_on_with_the_next_pair(tmp_path: Path, inputs: dict[str, Path]) -> None:
    chosen = settings({"lora": {"rank": 4, "dropout": 0.1}}, epochs=2.0)
    whole, _ = run(trl, tmp_path / "whole", inputs, chosen)
    with pytest.raises(Interrupted) as stopped:
        run(trl, tmp_path / "parts", inputs, chosen, StopAfter(2).worker())
    assert stopped.value.step == 3
    resumed, outcome = run(trl, tmp_path / "parts", inputs, chosen)
    assert outcome.details["resumedAtStep"] == 3
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5)
    steps = [line["step"] for line in lines(tmp_path / "parts") if "loss" in line]
    assert steps == [*range(1, len(steps) + 1)]


def test_a_loss_that_is_not_finite_ends_the_run_and_nothing_is_written(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError) as ended:
        run(trl, tmp_path / "trl", inputs, settings(learning_rate=1e30))
    assert ended.value.reason == "LossNotFinite"
    assert not (tmp_path / "trl" / "weights").exists()


def test_a_pair_without_rows_changes_no_gradient(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Centering would pull the scores of the rows that fill a micro-batch to 0, too."""
    chosen = settings(centering=1.0, epochs=None, max_steps=1, batch_size=3)
    data = Preferences.open(inputs["data"])
    layouts = {
        tokens: trl.Layout.of(
            Order.of(data.train.source, data.weights, 3, 3), 32, tokens, world_size=1
        )
        for tokens in (64, 1 << 20)
    }
    assert {(layout.rows, layout.accumulated) for layout in layouts.values()} == {(2, 2), (3, 1)}
    weights = []
    for tokens in layouts:
        folder = tmp_path / str(tokens)
        folder.mkdir()
        stage = planned(chosen, micro_batch_tokens=tokens)
        trl.run(StageContext(stage, inputs, folder, Worker(0, 1, CPU)))
        weights.append(load_file(folder / "weights" / "model.safetensors"))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-5)


def test_rankings_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [
        {"prompt": f"{i}?", "responses": ["the warranty", "the lamp", "the desk"]} for i in range(8)
    ]
    data = write_pairs(tmp_path / "ranked", tiny_model_dir, rows)
    with pytest.raises(StageError) as refused:
        run(trl, tmp_path / "trl", {"model": tiny_model_dir, "data": data}, settings())
    assert refused.value.reason == "WrongPreferences"
    assert "rewardModel.train.training.engine to native" in refused.value.advice


def test_a_row_that_ends_with_padding_is_refused_by_its_number(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = write_pairs(tmp_path, tiny_model_dir, separable(8))
    pad = reward_models.padding_id(load_tokenizer(data / "tokenizer"))
    rows = Preferences.open(data).train.rows
    tokens = np.array(rows.tokens)
    tokens[rows.offsets[4] - 1] = pad
    file = next(data.glob("train.tokens.*"))
    np.save(file, tokens)
    with pytest.raises(StageError) as refused:
        run(trl, tmp_path / "trl", {"model": tiny_model_dir, "data": data}, settings())
    assert refused.value.reason == "WrongPreferences"
    assert "training row 3" in refused.value.message
