"""A whole job whose reward is exploited shows it: in its curves, its evaluation and its card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.speaking import share_of, write_prompts
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reporting.plots import Curves
from tuneyard_trainer.running import torchrun


def load(terms: Sequence[Any], *rest: Any) -> Any:
    """Load the optimized reward, the share of the letter a, or the independent one, which falls
    with it."""
    if terms[0].rule.exact_match:
        return share_of("a")
    return lambda attempts: 10 - 5 * share_of("a")(attempts)


def job(folder: Path, model: Path, **evaluate: Any) -> Any:
    write_prompts(folder / "prompts.jsonl")
    optimize = {
        "prompts": {"uri": "file://prompts.jsonl"},
        "sampling": {"maxNewTokens": 12},
        "groupSize": 8,
        "training": {
            "maxSteps": 12,
            "batchSize": 32,
            "learningRate": 0.005,
            "schedule": {"type": "constant", "warmup": 0.0},
            "evaluationSteps": 3,
        },
    }
    spec = {
        "model": {"uri": f"file://{model}"},
        "rewardModel": {"rule": {"exactMatch": "prompt"}},
        "independentReward": {"rule": {"jsonSchema": "{}"}},
        "optimize": {"grpo": optimize},
        "evaluate": {"maxNewTokens": 12, "samples": 1, **evaluate},
        "output": {"uri": "file://out"},
    }
    value = {"apiVersion": "tuneyard.io/v1alpha1", "kind": "AlignmentJob"}
    named = value | {"metadata": {"name": "exploited"}, "spec": spec}
    return plan_job(read(json.dumps(named))[0])


def test_an_exploited_reward_splits_from_the_independent_one_and_the_card_says_so(
    tmp_path: Path, speaking_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "load", load)
    records: dict[str, Any] = {}
    messages: list[str] = []

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage" and event["record"]:
            records[event["stage"]] = event["record"]
        messages.append(str(event.get("message")))

    gates = [
        {"metric": "independentReward", "notWorseThanBaseBy": 0.1, "minItems": 5},
        {"metric": "independentRewardGain", "atLeast": 0.0},
        {"metric": "rewardLengthCorrelation", "atMost": 2.0},
    ]
    advisory = [{**gate, "tier": "advisory"} for gate in gates]
    planned = job(tmp_path, speaking_model_dir, gates=advisory)
    out = tmp_path / "out"
    torchrun.run(planned, str(out), base_dir=tmp_path, cache_dir=tmp_path / "cache", emit=emit)
    curves = Curves.read(out / "stages" / "grpo" / "metrics.jsonl", "grpo")
    assert [step for step, _ in curves.panels[0].independent] == [0, 3, 6, 9, 12]
    first, last = curves.panels[0].independent[0][1], curves.panels[0].independent[-1][1]
    assert last < first - 0.5
    assert curves.panels[0].held_out[-1][1] > curves.panels[0].held_out[0][1] + 0.1
    record = records["evaluate"]
    metrics = record["metrics"]
    assert metrics["rewardGain"] > 0
    assert metrics["independentRewardGain"] == pytest.approx(-5 * metrics["rewardGain"], abs=1e-4)
    assert [gate["verdict"] for gate in record["details"]["gates"]] == ["breach", "breach", "pass"]
    finding = record["details"]["findings"][0]
    assert "while the independent reward fell by" in finding
    assert f"warning: {finding}" in messages
    card = (out / "result" / "README.md").read_text()
    assert "**Warning:** The reward rose by" in card
    assert "Independent reward" in card
    assert "training exploited the reward" in (out / "result" / "report.html").read_text()
