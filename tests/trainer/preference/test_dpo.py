"""DPO, its variants and KTO on a tiny model: training, resuming and the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.preferring import (
    CPU,
    loop_settings,
    planned,
    separable,
    write_pairs,
)
from tests.trainer.stop_after import NEVER, StopAfter, StopAtCheck, without_times
from tuneyard.api.adapters import Adapter
from tuneyard.api.stage_settings import DpoSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import base, layers, policies
from tuneyard_trainer.preference import dpo
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.micro_batches import evaluate_rows, logprobs
from tuneyard_trainer.preference.reference import reference_logprobs
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker

LORA = {"lora": {"rank": 4, "alpha": 8}}
LOSSES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return {"model": tiny_model_dir, "data": write_pairs(folder, tiny_model_dir, separable(64))}


@pytest.fixture(scope="module")
def labeled_inputs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labeled")
    data = write_pairs(folder, tiny_model_dir, separable(64), labeled=True)
    return {"model": tiny_model_dir, "data": data}


def settings(
    loss: str = "sigmoid",
    adapter: dict[str, Any] | None = LORA,
    beta: float = 0.1,
    smoothing: float = 0.0,
    **loop: Any,
) -> DpoSettings:
    return DpoSettings(
        adapter=Adapter.model_validate(adapter) if adapter else None,
        loss=loss,  # type: ignore[arg-type]
        beta=beta,
        label_smoothing=smoothing,
        training=loop_settings(**loop),
    )


def run(
    folder: Path,
    inputs: dict[str, Path],
    chosen: DpoSettings,
    worker: Worker | None = None,
    **runtime: Any,
) -> tuple[dict[str, torch.Tensor], StageOutcome]:
    folder.mkdir(exist_ok=True)
    stage = planned(chosen, **runtime)
    outcome = dpo.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_raises_the_held_out_margin(
    tmp_path: Path, inputs: dict[str, Path], loss: str
) -> None:
    smoothing = 0.1 if loss == "robust" else 0.0
    chosen = settings(loss, smoothing=smoothing, epochs=4.0, keep_best=False)
    _, outcome = run(tmp_path / loss, inputs, chosen)
    assert outcome.metrics["preferenceMargin"] > 0.02
    assert outcome.metrics["preferenceAccuracy"] > 0.8
    assert outcome.metrics["validationLoss"] < outcome.metrics["baseValidationLoss"]


def test_full_fine_tuning_raises_the_held_out_accuracy(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    chosen = settings(adapter=None, epochs=3.0, learning_rate=3e-3)
    weights, outcome = run(tmp_path / "a", inputs, chosen)
    assert outcome.metrics["preferenceAccuracy"] > 0.8
    assert "model.norm.weight" in weights


def test_kto_learns_from_labeled_completions(
    tmp_path: Path, labeled_inputs: dict[str, Path]
) -> None:
    _, outcome = run(tmp_path / "a", labeled_inputs, settings("kto", epochs=4.0, keep_best=False))
    assert outcome.metrics["preferenceMargin"] > 0.02
    assert outcome.metrics["preferenceAccuracy"] > 0.8


def test_the_loss_of_the_reference_is_that_of_equal_sides(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    (tmp_path / "a").mkdir()
    chosen = settings()
    context = StageContext(planned(chosen), inputs, tmp_path, Worker(0, 1, CPU))
    loop = dpo.build(context, chosen)
    assert loop.objective.baseline()["validationLoss"] == pytest.approx(np.log(2))
    measured = loop.objective.held_out()
    assert measured["validationLoss"] == pytest.approx(np.log(2), abs=1e-6)
    assert measured["preferenceMargin"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_reaches_the_same_weights_bit_for_bit(
    tmp_path: Path, inputs: dict[str, Path], labeled_inputs: dict[str, Path], loss: str, stop: int
) -> None:
    chosen = settings(loss, {"lora": {"rank": 4, "dropout": 0.1}}, max_steps=6, epochs=None)
    data = labeled_inputs if loss == "kto" else inputs
    whole, _ = run(tmp_path / "a", data, chosen)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", data, chosen, StopAfter(stop).worker())
    resumed, outcome = run(tmp_path / "b", data, chosen)
    assert outcome.details["resumedAtStep"] == stop + 1
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_stop_at_any_moment_is_seen_within_a_batch_and_resumed_exactly(
    tmp_path: Path, inputs: dict[str, Path], labeled_inputs: dict[str, Path], loss: str
) -> None:
    """In the passes of the reference, which are not repeated once complete, and in evaluations."""
    chosen = settings(loss, {"lora": {"rank": 4}}, max_steps=3, epochs=None, evaluation_steps=2)
    data = labeled_inputs if loss == "kto" else inputs
    undisturbed = StopAtCheck(NEVER)
    whole, expected = run(tmp_path / "whole", data, chosen, undisturbed.worker())
    assert undisturbed.checks > 3 + 4  # the steps, reference passes and evaluations
    for check in range(1, undisturbed.checks + 1):
        stop = StopAtCheck(check)
        with pytest.raises(Interrupted):
            run(tmp_path / str(check), data, chosen, stop.worker())
        assert stop.checks == check
        resumed, outcome = run(tmp_path / str(check), data, chosen)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert without_times(outcome.metrics) == without_times(expected.metrics)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kto"])
def test_the_size_of_micro_batches_changes_rounding_alone(
    tmp_path: Path, inputs: dict[str, Path], labeled_inputs: dict[str, Path], loss: str
) -> None:
    chosen = settings(loss, max_steps=2, epochs=None, learning_rate=1e-3)
    data = labeled_inputs if loss == "kto" else inputs
    one, _ = run(tmp_path / "a", data, chosen, micro_batch_tokens=100_000)
    many, _ = run(tmp_path / "b", data, chosen, micro_batch_tokens=1)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, many[name], atol=2e-4, rtol=0)


def test_a_second_stage_trains_the_adapter_of_the_first_one(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    first, _ = run(tmp_path / "a", inputs, settings(epochs=2.0))
    chosen = settings(max_steps=1, epochs=None, learning_rate=1e-6)
    again = inputs | {"tuned": tmp_path / "a"}
    second, _ = run(tmp_path / "b", again, chosen)
    assert second.keys() == first.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=0)
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").open()]
    assert lines[0]["baseValidationLoss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(lines[1]["loss"] - np.log(2)) < 1e-6


def test_a_rows_log_probability_is_the_sum_over_its_completions_tokens(
    inputs: dict[str, Path],
) -> None:
    model: Any = base.load_base(inputs["model"], dtype=torch.float32, device=CPU)
    rows = Preferences.open(inputs["data"]).train.rows
    found = {}
    for pack in (True, False):
        forward = Forward(CPU, torch.float32, 3, pack, 64, 4096)
        with torch.no_grad():
            found[pack] = logprobs(model, rows, np.array([5, 0, 5]), forward)
    ids = torch.from_numpy(np.array(rows.ids(5), dtype=np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0].log_softmax(-1)
    token = logits[:-1].gather(1, ids[1:, None])[:, 0]
    wanted = float(token[torch.from_numpy(np.array(rows.mask(5)))[1:] == 1].sum())
    for values in found.values():
        assert values[0] == values[2]
        assert float(values[0]) == pytest.approx(wanted, abs=1e-4)


def test_the_reference_is_computed_once_and_cached_by_content(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    model: Any = base.load_base(inputs["model"], dtype=torch.float32, device=CPU)
    rows = Preferences.open(inputs["data"]).train.rows
    forward, worker = Forward(CPU, torch.float32, 3, True, 64, 4096), Worker(0, 1, CPU)

    def reference(key: str) -> Any:
        return reference_logprobs(model, key, rows, forward, tmp_path, worker)

    first = reference("a")
    np.testing.assert_allclose(
        first, evaluate_rows(logprobs, model, rows, forward, worker), atol=1e-4
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    np.testing.assert_array_equal(reference("a"), first)
    assert not np.allclose(reference("b"), first)
    for file in (tmp_path / "reference").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert not np.allclose(reference("a"), first), "a truncated file is not read"


def test_other_settings_read_the_cached_reference(tmp_path: Path, inputs: dict[str, Path]) -> None:
    run(tmp_path, inputs, settings(max_steps=1, epochs=None))
    kept = sorted((tmp_path / "reference").iterdir())
    run(tmp_path, inputs, settings(max_steps=2, epochs=None, beta=0.5))
    assert sorted((tmp_path / "reference").iterdir()) == kept


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_preferences_of_the_wrong_shape_are_an_error(
    tmp_path: Path, inputs: dict[str, Path], labeled_inputs: dict[str, Path], loss: str
) -> None:
    with pytest.raises(StageError) as caught:
        run(tmp_path, inputs if loss == "kto" else labeled_inputs, settings(loss))
    assert caught.value.reason == "WrongPreferences"


def test_the_reference_replaces_the_trained_tensors_only_while_active(
    inputs: dict[str, Path], tiny_tokenizer: Any
) -> None:
    model = policies.load(
        inputs,
        Adapter.model_validate(LORA),
        loop_settings(),
        device=CPU,
        precision=torch.float32,
        tokenizer=tiny_tokenizer,
    ).eval()
    parameters = layers.trainable(model)
    reference = policies.Reference(model)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        for parameter in parameters.values():
            parameter.add_(0.1)
        changed = model(ids).logits
        with reference.active():
            torch.testing.assert_close(model(ids).logits, before, atol=0, rtol=0)
        torch.testing.assert_close(model(ids).logits, changed, atol=0, rtol=0)
    assert not torch.equal(before, changed)
