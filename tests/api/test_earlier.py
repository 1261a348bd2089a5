"""Stages of plans of 0.2 are read, and run as this version runs them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tuneyard.api.earlier import current
from tuneyard.api.plan import PlannedStage, StageRecord
from tuneyard.api.stage_settings import EvaluateSettings

FINE_TUNED = {
    "kind": "evaluate",
    "compareWithBase": True,
    "samples": 3,
    "maxNewTokens": 64,
    "gates": [],
}
ALIGNED: dict[str, Any] = {
    "kind": "assess",
    "beta": 0.3,
    "chat": {"chatTemplate": None, "systemPrompt": "Be brief."},
    "gates": [{"metric": "winRate", "atLeast": 0.5, "atMost": None}],
    "prompts": None,
    "reward": [{"role": "reward", "rule": None, "weight": 1.0}],
    "samples": 3,
    "sampling": {"engine": "transformers", "maxNewTokens": 64, "temperature": 1.0, "topP": 1.0},
    "seed": 7,
    "winRate": {"judge": None, "principles": ["Be kind."], "question": "{first} or {second}?"},
}


def stage_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the last stage but one of a plan, as an operator of 0.2 wrote it."""
    return {
        "fingerprint": "sha256:planned",
        "inputs": {
            "data": {"file": None, "stage": "pairs"},
            "model": {
                "credentials": None,
                "path": "spec.model.uri",
                "revision": None,
                "tokenSecret": None,
                "uri": "file://model",
            },
            "tuned": {"file": None, "stage": "dpo"},
        },
        "name": "evaluate",
        "runtime": {
            "checkpointSteps": None,
            "endpoint": None,
            "gradientCheckpointing": False,
            "microBatchTokens": "auto",
        },
        "settings": settings,
    }


@pytest.mark.parametrize("settings", [FINE_TUNED, ALIGNED], ids=["fine-tuned", "aligned"])
def test_the_evaluation_of_a_plan_of_0_2_keeps_its_bytes(settings: dict[str, Any]) -> None:
    value = stage_of(settings)
    stage = PlannedStage.model_validate_json(json.dumps(value))
    assert stage.model_dump(mode="json", by_alias=True) == value


def test_the_evaluation_of_a_fine_tuning_of_0_2_runs_as_it_is() -> None:
    stage = PlannedStage.model_validate(stage_of(FINE_TUNED))
    assert current(stage) == stage


def test_the_evaluation_of_an_alignment_of_0_2_runs_as_evaluate_under_its_own_fingerprint() -> None:
    stage = current(PlannedStage.model_validate(stage_of(ALIGNED)))
    assert stage.fingerprint == "sha256:planned"
    assert list(stage.inputs) == ["pairs", "model", "tuned"]
    settings = stage.settings
    assert isinstance(settings, EvaluateSettings)
    assert settings.completions
    assert settings.completions.sampling.max_new_tokens == settings.max_new_tokens == 64
    assert settings.preferences
    assert settings.preferences.beta == 0.3
    same = ("chat", "gates", "reward", "samples", "seed", "winRate")
    found = settings.model_dump(mode="json", by_alias=True)
    assert {name: found[name] for name in same} == {name: ALIGNED[name] for name in same}


def test_a_record_of_an_alignment_of_0_2_is_read() -> None:
    value = {
        "stage": "evaluate",
        "kind": "assess",
        "identity": "sha256:i",
        "inputDigests": {},
        "digest": "sha256:d",
        "attempt": 1,
        "startedAt": "2026-11-26T10:00:00Z",
        "finishedAt": "2026-11-26T10:05:00Z",
        "metrics": {"winRate": 0.6},
    }
    assert StageRecord.model_validate(value).metrics == {"winRate": 0.6}
