"""TRL's KTOTrainer and the native loop train the same policy on the same completions."""

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
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.trl_engine import kto as trl
from tuneyard_trainer.worker import Interrupted, StageContext, Worker

LORA = {"lora": {"rank": 4}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """Pairs as completions, and a few good ones more: the two kinds have unequal weights."""
    folder = tmp_path_factory.mktemp("labeled")
    rows: list[dict[str, Any]] = separable(15)
    more = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
        for row in separable(5, seed=5)
    ]
    data = write_pairs(folder, tiny_model_dir, rows + more, labeled=True)
    return {"model": tiny_model_dir, "data": data}


def settings(adapter: Any = None, **loop: Any) -> DpoSettings:
    return DpoSettings(
        adapter=Adapter.model_validate(adapter) if adapter else None,
        loss="kto",
        beta=0.5,
        label_smoothing=0.0,
        training=loop_settings(
            **{"learning_rate": 1e-3, "epochs": 3.0, "keep_best": False, **loop}
        ),
    )


def run(
    engine: Any,
    folder: Path,
    inputs: dict[str, Path],
    chosen: DpoSettings,
    worker: Any = None,
    max_tokens: int = 64,
) -> tuple[dict[str, torch.Tensor], Any]:
    folder.mkdir(exist_ok=True)
    stage = planned(chosen, micro_batch_tokens=max_tokens)
    outcome = engine.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


JOBS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": LORA},
    "qlora": {"adapter": {"qlora": {"rank": 4}}},
    "prompt": {"adapter": {"prompt": {}}},
    "bottleneck, stopped early": {
        "adapter": {"bottleneck": {}},
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
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)
    for one, other in zip(lines(tmp_path / "native"), lines(tmp_path / "trl"), strict=True):
        assert one.keys() == other.keys()
        # At first every log-ratio is 0, and its sign is rounding.
        skipped = {"tokensPerSecond", "accuracy"} if one["step"] == 1 else {"tokensPerSecond"}
        for name in one.keys() - skipped:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    assert found.metrics.keys() == expected.metrics.keys()
    assert found.details == {**expected.details, "engine": "trl", "sharding": "none"}
    for file in (tmp_path / "native" / "weights").glob("*.json"):
        assert (tmp_path / "trl" / "weights" / file.name).read_text() == file.read_text()
    assert not list((tmp_path / "trl" / "mismatched").iterdir())


def test_the_reference_point_is_of_the_whole_batch_whatever_its_micro_batches(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """One row in each micro-batch, which TRL's own estimate of the KL does not allow; or 3 of them,
    so that 9 places hold the 8 rows of a batch."""
    chosen = settings(LORA, learning_rate=1e-2)
    three_rows = 3 * int(Preferences.open(inputs["data"]).train.longest.max())
    one, _ = run(trl, tmp_path / "one", inputs, chosen, max_tokens=1)
    some, _ = run(trl, tmp_path / "some", inputs, chosen, max_tokens=three_rows)
    for name, weight in one.items():
        torch.testing.assert_close(some[name], weight, rtol=1e-3, atol=1e-4)
    steps = [
        [line for line in lines(tmp_path / folder) if "kl" in line] for folder in ("one", "some")
    ]
    for first, second in zip(*steps, strict=True):
        for name in ("kl", "loss", "gradientNorm"):
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-6), name
    assert max(line["kl"] for line in steps[0]) > 0.01


def test_a_stopped_run_goes_on_with_the_next_row_and_the_same_reference(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
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


def test_rows_that_an_attempt_with_more_workers_left_are_deleted(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    left = tmp_path / "trl" / "mismatched" / "3"
    left.mkdir(parents=True)
    (left / "train.tokens.npy").write_bytes(b"")
    run(trl, tmp_path / "trl", inputs, settings(LORA, epochs=1.0))
    assert not list((tmp_path / "trl" / "mismatched").iterdir())


def test_a_loss_that_is_not_finite_ends_the_run_and_nothing_is_written(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError) as ended:
        run(trl, tmp_path / "trl", inputs, settings(learning_rate=1e30))
    assert ended.value.reason == "LossNotFinite"
    assert not (tmp_path / "trl" / "weights").exists()


def test_a_second_stage_trains_the_adapter_of_the_first_one(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    first, _ = run(trl, tmp_path / "first", inputs, settings(LORA, learning_rate=1e-2))
    later = {**inputs, "tuned": tmp_path / "first"}
    ours, _ = run(native, tmp_path / "native", later, settings(LORA))
    theirs, _ = run(trl, tmp_path / "trl", later, settings(LORA))
    assert first.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)


def test_pairs_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write_pairs(tmp_path / "pairs", tiny_model_dir, separable(8))
    with pytest.raises(StageError) as refused:
        run(trl, tmp_path / "trl", {"model": tiny_model_dir, "data": data}, settings())
    assert refused.value.reason == "WrongPreferences"
