"""The stage `evaluate`: which parts it measures, the values of each item, and earlier plans."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.evaluation.measuring import (
    ALONE,
    QUESTION,
    alignment_stage,
    evaluate_stage,
    measured,
    run,
)
from tests.trainer.preferring import planned
from tuneyard.api.adapters import Adapter
from tuneyard.api.plan import StageRecord
from tuneyard.api.stage_settings import AssessSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.sharing import InStep
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.models import adapters, policies
from tuneyard_trainer.reporting.results import Results
from tuneyard_trainer.worker import StageContext

WIN_RATE = {"judge": None, "question": QUESTION, "principles": ["be kind"]}


@pytest.fixture
def items(monkeypatch: pytest.MonkeyPatch) -> dict[str, Items]:
    """The items that the next evaluation hands over with its result."""
    found: dict[str, Items] = {}
    finish = evaluate.finish

    def noted(*given: Any, items: Mapping[str, Items], **named: Any) -> Any:
        found.update(items)
        return finish(*given, items=items, **named)

    monkeypatch.setattr(evaluate, "finish", noted)
    return found


# ---- items --------------------------------------------------------------------------------------


def loss_of(model: Any, rows: Rows, row: int) -> float:
    """Nats per target of one row, each target from the tokens before it."""
    ids, mask = torch.tensor(rows.ids(row)).long(), rows.mask(row)
    with torch.no_grad():
        log_probs = model(ids[None]).logits[0].float().log_softmax(-1)
    losses = [-float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids)) if mask[i]]
    return sum(losses) / len(losses)


def test_each_held_out_row_has_its_loss_under_both_models_and_each_question_its_answer(
    tmp_path: Path, inputs: dict[str, Path], items: dict[str, Items]
) -> None:
    run("held-out rows", tmp_path, inputs, ALONE)
    rows = Rows.open(inputs["prepared"], "validation")
    assert rows is not None
    found = items["validationLoss"]
    assert not found.higher_is_better
    assert found.ids == tuple(f"row {row + 1}" for row in range(9))
    for path, values in (("tuned/weights", found.tuned_N), ("model", found.base_N)):
        folder = inputs["model"] if path == "model" else inputs["tuned"] / "weights"
        model = type(tiny_llama(VOCABULARY)).from_pretrained(folder).eval()
        expected = [loss_of(model, rows, row) for row in range(9)]
        assert values == pytest.approx(expected, abs=1e-4)
    metrics = measured(tmp_path)["metrics"]
    assert np.average(found.tuned_N, weights=found.weights_N) == pytest.approx(
        metrics["validationLoss"], abs=1e-6
    )
    answers = items["answerAccuracy"]
    assert answers.ids == ("row 2", "row 4", "row 6", "row 8")
    assert answers.base_N is not None
    assert {*answers.tuned_N, *answers.base_N} <= {0.0, 1.0}
    assert answers.tuned_N.mean() == metrics["answerAccuracy"]


def test_each_prompt_and_each_pair_of_an_alignment_has_its_values(
    tmp_path: Path, inputs: dict[str, Path], items: dict[str, Items]
) -> None:
    run("an alignment", tmp_path, inputs, ALONE)
    metrics = measured(tmp_path)["metrics"]
    names = {"complete", "preferenceAccuracy", "repetition", "reward", "rewardAccuracy", "winRate"}
    assert items.keys() == {*names, "independentReward"}
    assert len(items["reward"].ids) == metrics["completions"]
    for name, found in items.items():
        assert len(found.ids) == len(found.tuned_N) == len({*found.ids})
        assert found.higher_is_better == (name != "repetition")
        assert found.tuned_N.mean() == pytest.approx(metrics[name])
    reward = items["reward"]
    assert reward.base_N is not None
    assert (reward.tuned_N - reward.base_N).mean() == pytest.approx(metrics["rewardGain"])
    independent = items["independentReward"]
    assert np.array_equal(independent.tuned_N, reward.tuned_N), "here it is the same model"
    assert metrics["independentRewardGain"] == metrics["rewardGain"]
    assert metrics["startIndependentReward"] == metrics["startReward"]
    assert metrics["complete"] == 0, "all completions have 8 tokens, so nothing goes with length"
    assert "rewardLengthCorrelation" not in metrics


def test_a_finding_is_recorded_reported_and_a_warning_of_the_results(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finding that everything gives: its evidence is tested in test_findings.py."""
    monkeypatch.setattr(evaluate, "findings", lambda found: [f"of {len(found.items)} metrics"])
    reported: list[str | None] = []
    worker = replace(ALONE, report=lambda **event: reported.append(event.get("message")))
    stage = evaluate_stage(samples=1)
    given = {"model": inputs["model"], "tuned": inputs["tuned"], "data": inputs["prepared"]}
    outcome = evaluate.run(StageContext(stage, given, tmp_path, worker))
    (finding,) = outcome.details["findings"]
    assert f"warning: {finding}" in reported
    record = StageRecord.model_validate(
        {
            "stage": "evaluate",
            "kind": "evaluate",
            "identity": "sha256:a",
            "inputDigests": {},
            "digest": "sha256:b",
            "attempt": 1,
            "startedAt": "2026-01-01T00:00:00Z",
            "finishedAt": "2026-01-01T00:00:01Z",
            "metrics": dict(outcome.metrics),
            "details": dict(outcome.details),
        }
    )
    assert finding in Results.of({"evaluate": record}).warnings


def test_the_metrics_that_a_manifest_names_are_measured_of_both_models(
    tmp_path: Path, inputs: dict[str, Path], items: dict[str, Items]
) -> None:
    stage = evaluate_stage(
        samples=1, metrics=["tokenF1", "bleu", "classification"], answerPattern="[a-z]"
    )
    given = {"model": inputs["model"], "tuned": inputs["tuned"], "data": inputs["prepared"]}
    outcome = evaluate.run(StageContext(stage, given, tmp_path, ALONE))
    for name in ("tokenF1", "bleu", "sentenceBleu", "classAccuracy", "macroF1", "patternMatch"):
        base = f"base{name[:1].upper()}{name[1:]}"
        gain = outcome.metrics[name] - outcome.metrics[base]
        assert outcome.metrics[f"{name}Gain"] == pytest.approx(gain)
        if name not in ("bleu", "macroF1"):  # these are of all answers together
            assert items[name].tuned_N.mean() == pytest.approx(outcome.metrics[name])
            assert len(items[name].ids) == 9, "every held-out row is answered"
    tables = outcome.details["classification"]
    assert tables.keys() == {"tuned", "base"}
    assert sum(map(sum, tables["tuned"]["counts"])) == 9
    assert "bleu" not in items


# ---- parts --------------------------------------------------------------------------------------


def test_a_judge_compares_the_answers_to_held_out_questions(
    tmp_path: Path, inputs: dict[str, Path], items: dict[str, Items]
) -> None:
    stage = evaluate_stage(samples=1, winRate=WIN_RATE, seed=1)
    given = {name: inputs[name] for name in ("model", "tuned")}
    given |= {"data": inputs["prepared"], "judge": inputs["model"]}
    outcome = evaluate.run(StageContext(stage, given, tmp_path, ALONE))
    assert 0 <= outcome.metrics["winRate"] <= 1
    assert outcome.metrics["validationLoss"] > 0
    assert len(items["winRate"].ids) == 9, "all rows are answered, not only those that are shown"
    assert len(measured(tmp_path)["samples"]) == 1
    assert "reward" not in outcome.metrics


def test_one_stage_measures_held_out_rows_and_an_alignment_together(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    given = {**inputs, "data": inputs["prepared"], "judge": inputs["model"]}
    given["reward.independent"] = inputs["reward"]
    metrics = evaluate.run(StageContext(alignment_stage(), given, tmp_path, ALONE)).metrics
    alone = tmp_path / "alone"
    for name in ("held-out rows", "an alignment"):
        run(name, alone, inputs, ALONE)
        expected = measured(alone)["metrics"]
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_a_model_before_that_is_the_base_is_measured_without_loading_it_again(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(VOCABULARY)
    tuned = adapters.attach(base, Adapter.model_validate({"lora": {}}), seed=1, tokenizer=None)  # type: ignore[arg-type]
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapters.save(tuned, tmp_path / "lora" / "weights")
    loads: list[Path] = []
    load = policies.load_base

    def noted(folder: Path, **named: Any) -> Any:
        loads.append(folder)
        return load(folder, **named)

    monkeypatch.setattr(policies, "load_base", noted)
    for number, start in enumerate((None, tmp_path / "lora")):
        given = {**inputs, "tuned": tmp_path / "lora", "judge": inputs["model"]}
        given["reward.independent"] = inputs["reward"]
        given |= {"start": start} if start else {}
        folder = tmp_path / str(number)
        folder.mkdir()
        metrics = evaluate.run(StageContext(alignment_stage(), given, folder, ALONE)).metrics
        assert (metrics["kl"] == pytest.approx(0, abs=1e-6)) == (start is not None)
    assert loads == [inputs["model"]] * 3


# ---- earlier plans ------------------------------------------------------------------------------


def test_the_evaluation_of_an_alignment_of_0_2_measures_what_it_measures_today(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    (tmp_path / "today").mkdir()
    today = {"judge": inputs["model"], **inputs}
    stage = alignment_stage(independent_reward=None)
    evaluate.run(StageContext(stage, today, tmp_path / "today", ALONE))
    stage = planned(
        AssessSettings.model_validate(
            {
                "chat": {"system_prompt": None, "chat_template": None},
                "prompts": None,
                "sampling": {"max_new_tokens": 8},
                "reward": [{"role": "reward"}],
                "beta": 0.1,
                "win_rate": WIN_RATE,
                "samples": 3,
                "gates": [],
                "seed": 2,
            }
        )
    )
    given = {**inputs, "data": inputs["pairs"], "judge": inputs["model"]}
    del given["pairs"]
    evaluate.run(StageContext(stage, given, tmp_path, ALONE))
    assert measured(tmp_path) == measured(tmp_path / "today")


def test_vllm_is_refused_for_a_model_that_the_workers_share(inputs: dict[str, Path]) -> None:
    """The planner lets each worker have the whole model: an engine is never changed silently."""
    stage = evaluate_stage(engine="vllm")
    context = StageContext(stage, {"model": inputs["model"]}, inputs["model"], ALONE)
    with pytest.raises(StageError, match=r"evaluate\.engine is vllm") as caught:
        evaluate._engine(context, tiny_llama(VOCABULARY), InStep(ALONE))
    assert caught.value.reason == "EngineUnsupported"
    assert "compute.sharding" in caught.value.advice


def test_vllm_that_is_missing_ends_the_stage_and_transformers_does_not_answer(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "vllm" else find(name, *more),
    )
    given = {"model": inputs["model"], "tuned": inputs["tuned"], "data": inputs["prepared"]}
    with pytest.raises(StageError, match=r"evaluate\.engine is vllm") as caught:
        evaluate.run(StageContext(evaluate_stage(engine="vllm"), given, tmp_path, ALONE))
    assert caught.value.reason == "MissingExtra"
    assert not (tmp_path / "evaluation.json").exists()
