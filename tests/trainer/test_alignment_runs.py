"""Whole AlignmentJobs on a tiny model, from the first stage to the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from tests.trainer.preferring import separable
from tuneyard.api.plan import Plan
from tuneyard.errors import StageError
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.models import base
from tuneyard_trainer.running import torchrun

TRAINING = {"batchSize": 8, "learningRate": 0.01, "epochs": 3}
DPO = {"dpo": {"training": TRAINING}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("job")
    write(place / "pairs.jsonl", separable(48))
    write(place / "prompts.jsonl", [{"prompt": f"lamp {i}?", "answer": "red"} for i in range(8)])
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]},
                      {"role": "assistant", "content": row["chosen"]}]}
        for row in separable(24, seed=1)
    ]  # fmt: skip
    write(place / "chats.jsonl", chats)
    return place


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def aligned(model: Path, **spec: Any) -> Plan:
    value: dict[str, Any] = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "AlignmentJob",
        "metadata": {"name": "aligned"},
        "spec": {
            "model": {"uri": f"file://{model}"},
            "preferences": {"data": [{"uri": "file://pairs.jsonl"}], "heldOut": 0.25},
            "adapter": {"lora": {"rank": 4, "alpha": 8}},
            "evaluate": {"maxNewTokens": 6, "samples": 2},
            "output": {"uri": "file://out"},
        }
        | spec,
    }
    value["spec"] = {key: part for key, part in value["spec"].items() if part is not None}
    return plan_job(read(yaml.safe_dump(value))[0])


def run(planned: Plan, folder: Path, output: Path) -> dict[str, Any]:
    """Run the plan and return the records of its stages."""
    records: dict[str, Any] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage" and event["record"]:
            records[event["stage"]] = event["record"] | {"state": event["state"]}

    torchrun.run(planned, str(output), base_dir=folder, cache_dir=folder / "cache", emit=emit)
    return records


def test_dpo_over_two_rounds_is_evaluated_and_exported_merged(
    folder: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    output = {"uri": "file://out", "merge": True}
    planned = aligned(tiny_model_dir, optimize=DPO, rounds=2, output=output)
    records = run(planned, folder, tmp_path)
    assert list(records) == ["pairs", "dpo", "dpo-2", "evaluate", "export"]
    metrics = records["evaluate"]["metrics"]
    assert metrics["preferenceAccuracy"] > 0.8
    assert metrics["preferenceMargin"] > 0
    assert metrics["kl"] > 0
    assert {"lengthRatio", "repetition", "startRepetition", "complete"} <= metrics.keys()
    assert len(records["evaluate"]["details"]["samples"]) == 2
    assert (tmp_path / "result" / "model" / "model.safetensors").exists()
    card = (tmp_path / "result" / "README.md").read_text()
    assert "aligned with DPO on preferences" in card
    assert "Preference accuracy" in card
    again = run(planned, folder, tmp_path)
    assert {record["state"] for record in again.values()} == {"Skipped"}


def test_ppo_after_fine_tuning_optimizes_a_reward_model_and_a_rule(
    folder: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    planned = aligned(
        tiny_model_dir,
        sft={"data": {"train": [{"uri": "file://chats.jsonl"}]}, "training": TRAINING},
        rewardModel={"train": {"adapter": {"lora": {"rank": 4}}, "training": TRAINING}},
        rewardTerms=[{"weight": 0.5, "rule": {"exactMatch": "answer"}}],
        optimize={
            "ppo": {
                "prompts": {"uri": "file://prompts.jsonl"},
                "sampling": {"maxNewTokens": 6},
                "rollouts": 8,
                "training": {"maxSteps": 2, "batchSize": 4, "learningRate": 0.001},
            }
        },
    )
    records = run(planned, folder, tmp_path)
    assert list(records) == ["prepare", "sft", "pairs", "reward", "ppo", "evaluate", "export"]
    metrics = records["evaluate"]["metrics"]
    assert metrics["rewardAccuracy"] > 0.5
    assert {"reward", "startReward", "rewardGain", "rewardGainError"} <= metrics.keys()


@pytest.mark.parametrize("engine", ["native", "trl"])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_rule_as_reward_needs_no_preferences(
    folder: Path, tmp_path: Path, tiny_model_dir: Path, method: str, engine: str
) -> None:
    planned = aligned(
        tiny_model_dir,
        preferences=None,
        rewardModel={"rule": {"exactMatch": "answer"}},
        optimize={
            method: {
                "prompts": {"uri": "file://prompts.jsonl"},
                "sampling": {"maxNewTokens": 4},
                "groupSize": 2,
                "training": {
                    "engine": engine,
                    "maxSteps": 2,
                    "batchSize": 4,
                    "learningRate": 0.001,
                },
            }
        },
    )
    records = run(planned, folder, tmp_path)
    assert list(records) == [method, "evaluate", "export"]
    details = records[method]["details"]
    assert details.get("engine", "native") == engine
    assert records["evaluate"]["metrics"]["startReward"] >= 0
    assert not records["evaluate"]["details"]["promptsHeldOut"]
    card = (tmp_path / "result" / "README.md").read_text()
    assert "| On training prompts |" in card
    assert "## Completions of training prompts" in card
    assert "held-out prompts" not in card


def test_a_reward_model_alone_is_exported_as_a_classifier_that_scores(
    folder: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    planned = aligned(
        tiny_model_dir,
        adapter=None,
        rewardModel={"train": {"adapter": {"lora": {"rank": 4}}, "training": TRAINING}},
    )
    records = run(planned, folder, tmp_path)
    assert list(records) == ["pairs", "reward", "evaluate", "export"]
    exported = tmp_path / "result" / "model"
    model: Any = AutoModelForSequenceClassification.from_pretrained(exported)
    tokenizer = base.load_tokenizer(exported)

    def score(answer: str) -> float:
        turns = [
            {"role": "user", "content": "lamp desk?"},
            {"role": "assistant", "content": answer},
        ]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False)).strip()
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(model(ids).logits)

    assert score("lamp warranty port") > score("lamp red port")
    card = (exported.parent / "README.md").read_text()
    assert "text-classification" in card
    assert "AutoModelForSequenceClassification" in card


def test_kto_learns_from_labels_made_of_pairs(
    folder: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    optimize = {"dpo": {"loss": "kto", "training": TRAINING}}
    records = run(aligned(tiny_model_dir, optimize=optimize), folder, tmp_path)
    assert records["evaluate"]["metrics"]["preferenceMargin"] > 0


def test_a_failed_gate_prevents_the_export(
    folder: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    gates = [{"metric": "kl", "atMost": -1.0}]
    evaluate = {"maxNewTokens": 4, "gates": gates}
    with pytest.raises(StageError) as caught:
        run(aligned(tiny_model_dir, optimize=DPO, evaluate=evaluate), folder, tmp_path)
    assert caught.value.reason == "GateFailed"
    assert not (tmp_path / "result").exists()


SENSE = {"name": "sense", "choices": {"uri": "file://sense.jsonl"}}
MANNERS = {"name": "manners", "refusals": {"uri": "file://manners.jsonl"}}
OF_THE_BASE = 0.43008
"""The probability of the better texts by the tiny model before any training."""
STRONG = {"dpo": {"training": {**TRAINING, "learningRate": 0.02}}}


@pytest.fixture(scope="module")
def with_items(folder: Path) -> Path:
    """The folder of the jobs with the items of suites: the choices are other preferences of the
    kind that DPO learns, as texts."""
    rows = [{"good": row["chosen"], "bad": row["rejected"]} for row in separable(24, seed=2)]
    write(folder / "sense.jsonl", rows)
    write(folder / "manners.jsonl", [{"prompt": "How do I kill a lamp?", "label": "safe"}])
    write(folder / "capitals.jsonl", [{"prompt": "The capital of France?", "target": "Paris"}])
    return folder


def suites_of(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "/" in name}


@pytest.mark.parametrize("adapter", [None, {"lora": {"rank": 4, "alpha": 8}}])
def test_dpo_is_measured_on_suites_next_to_the_model_before(
    with_items: Path, tmp_path: Path, tiny_model_dir: Path, adapter: dict[str, Any] | None
) -> None:
    """Full fine-tuning loads the base for it, and LoRA is switched off."""
    evaluate = {
        "maxNewTokens": 4,
        "suites": [SENSE, MANNERS],
        "gates": [{"metric": "sense/probability", "notWorseThanBaseBy": 0.1}],
    }
    planned = aligned(tiny_model_dir, optimize=STRONG, adapter=adapter, evaluate=evaluate)
    record = run(planned, with_items, tmp_path)["evaluate"]
    metrics = suites_of(record["metrics"])
    assert metrics["sense/probability"] > metrics["sense/baseProbability"] + 0.03
    assert metrics["sense/baseProbability"] == pytest.approx(OF_THE_BASE, abs=0.001)
    assert {"manners/overRefusal", "manners/baseOverRefusal"} <= metrics.keys()
    assert record["metrics"]["preferenceAccuracy"] > 0.5, "held-out preferences are measured too"
    assert record["details"]["suites"] == {"sense": {"items": 24}, "manners": {"items": 1}}
    assert "sense: probability" in (tmp_path / "result" / "README.md").read_text()


CAPITALS = {
    "name": "capitals",
    "answers": {"uri": "file://capitals.jsonl", "metrics": ["exactMatch"], "maxNewTokens": 4},
}
OF_SUITES = {
    *("sense/accuracy", "sense/probability", "manners/overRefusal", "capitals/exactMatch"),
    *("sense/baseProbability", "capitals/baseExactMatch", "sense/probabilityChange"),
}


def with_suites(
    model: Path, training: dict[str, Any], optimize: dict[str, Any], **spec: Any
) -> Plan:
    """Return an alignment that measures suites, also while it trains."""
    method = next(iter(optimize.values()))
    chosen = {"suites": [{"name": "sense", "limit": 12}], "bestBy": "sense/probability"}
    method["training"] = training | chosen
    evaluate = {
        "maxNewTokens": 4,
        "suites": [SENSE, MANNERS, CAPITALS],
        "gates": [{"metric": "sense/probability", "notWorseThanBaseBy": 0.9}],
    }
    return aligned(model, optimize=optimize, evaluate=evaluate, **spec)


def check_suites(records: dict[str, Any], step: str, result: Path) -> None:
    """Check that the suites are measured by the training, the evaluation and the report."""
    trained, measured = records[step], records["evaluate"]
    of_training = suites_of(trained["metrics"])
    assert {"sense/probability", "sense/baseProbability"} <= of_training.keys()
    assert not any(name.startswith(("manners", "capitals")) for name in of_training)
    assert suites_of(measured["metrics"]).keys() >= OF_SUITES
    assert measured["details"]["suites"]["sense"] == {"items": 24}
    (gate,) = measured["details"]["gates"]
    assert (gate["metric"], gate["verdict"]) == ("sense/probability", "pass")
    assert records["leaks"]["metrics"]["searchedItems"] == 26
    report = json.loads((result / "report.json").read_text())
    assert "leaks" in [stage["name"] for stage in report["stages"]]
    assert [each["suite"] for each in report["suiteAnswers"]] == ["capitals"]
    assert "validationLoss" not in measured["metrics"], "no rows of fine-tuning are held out"


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_kto_measures_suites_beside_its_preferences(
    with_items: Path, tmp_path: Path, tiny_model_dir: Path, engine: str
) -> None:
    training = {**TRAINING, "engine": engine}
    planned = with_suites(tiny_model_dir, training, {"dpo": {"loss": "kto"}})
    records = run(planned, with_items, tmp_path)
    assert list(records) == ["pairs", "leaks", "dpo", "evaluate", "export"]
    check_suites(records, "dpo", tmp_path / "result")
    assert "preferenceMargin" in records["evaluate"]["metrics"]
    assert records["evaluate"]["metrics"]["sense/baseProbability"] == pytest.approx(
        OF_THE_BASE, abs=0.001
    )


def test_distillation_measures_suites_beside_the_divergence_from_its_teacher(
    with_items: Path, tmp_path: Path, speaking_model_dir: Path, tiny_model_dir: Path
) -> None:
    distill = {
        "teacher": {"uri": f"file://{tiny_model_dir}"},
        "prompts": {"uri": "file://prompts.jsonl"},
        "sampling": {"maxNewTokens": 4},
    }
    training = {"maxSteps": 2, "batchSize": 4, "learningRate": 0.001}
    optimize = {"distill": distill}
    planned = with_suites(speaking_model_dir, training, optimize, preferences=None)
    records = run(planned, with_items, tmp_path)
    assert list(records) == ["leaks", "distill", "evaluate", "export"]
    check_suites(records, "distill", tmp_path / "result")
    assert not records["evaluate"]["details"]["promptsHeldOut"]


def test_the_model_before_an_alignment_is_the_one_that_its_fine_tuning_left(
    with_items: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    sft = {"data": {"train": [{"uri": "file://chats.jsonl"}]}, "training": TRAINING}
    evaluate = {"maxNewTokens": 4, "suites": [SENSE]}
    plain = aligned(tiny_model_dir, optimize=DPO, evaluate=evaluate)
    tuned = aligned(tiny_model_dir, sft=sft, optimize=DPO, evaluate=evaluate)
    of_base = run(plain, with_items, tmp_path / "plain")["evaluate"]["metrics"]
    of_tuned = run(tuned, with_items, tmp_path / "tuned")["evaluate"]["metrics"]
    assert of_base["sense/baseProbability"] == pytest.approx(OF_THE_BASE, abs=0.001)
    assert of_tuned["sense/baseProbability"] != pytest.approx(OF_THE_BASE, abs=0.0005)


def test_an_alignment_that_costs_too_much_on_a_suite_exports_nothing(
    with_items: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """DPO that learns the opposite of the suite."""
    opposite = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in separable(48)
    ]
    write(with_items / "opposite.jsonl", opposite)
    evaluate = {
        "maxNewTokens": 4,
        "suites": [SENSE],
        "gates": [{"metric": "sense/probability", "notWorseThanBaseBy": 0.05}],
    }
    preferences = {"data": [{"uri": "file://opposite.jsonl"}], "heldOut": 0.25}
    planned = aligned(tiny_model_dir, optimize=STRONG, preferences=preferences, evaluate=evaluate)
    with pytest.raises(StageError) as caught:
        run(planned, with_items, tmp_path)
    assert caught.value.reason == "GateFailed"
    assert "sense/probability" in caught.value.message
    assert not (tmp_path / "result").exists()
