"""Stages that evaluate tiny models, and what they measure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.trainer.preferring import planned
from tuneyard.api.plan import PlannedStage, StageInput
from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.worker import StageContext, Worker

CPU = torch.device("cpu")
ALONE = Worker(0, 1, CPU, identity="sha256:one")
QUESTION = "{first}\nor\n{second}? A or B?"
STAGES = ("held-out rows", "an alignment", "a reward model")


def evaluate_stage(**changes: Any) -> PlannedStage:
    settings = {"compareWithBase": True, "samples": 5, "maxNewTokens": 6, "gates": []}
    return PlannedStage(
        name="evaluate",
        settings=EvaluateSettings.model_validate(settings | changes),
        inputs={role: StageInput(stage=role) for role in ("model", "data", "tuned")},
        fingerprint="sha256:test",
    )


def alignment_stage(**changes: Any) -> PlannedStage:
    settings: dict[str, Any] = {
        "chat": {"system_prompt": None, "chat_template": None},
        "compare_with_base": True,
        "completions": {"prompts": None, "sampling": {"max_new_tokens": 8}},
        "max_new_tokens": 8,
        "reward": [{"role": "reward"}],
        "independent_reward": {"role": "reward.independent"},
        "preferences": {"beta": 0.1},
        "win_rate": {"judge": None, "question": QUESTION, "principles": ["be kind"]},
        "samples": 3,
        "gates": [],
        "seed": 2,
    }
    return planned(EvaluateSettings.model_validate(settings | changes))


def run(name: str, folder: Path, inputs: Mapping[str, Path], worker: Worker) -> None:
    folder.mkdir(exist_ok=True)
    worker = replace(worker, stage=name)
    given = {"model": inputs["model"], "tuned": inputs["tuned"]}
    if name == "held-out rows":
        given["data"] = inputs["prepared"]
        evaluate.run(StageContext(evaluate_stage(), given, folder, worker))
        return
    given |= {"pairs": inputs["pairs"], "reward": inputs["reward"], "judge": inputs["model"]}
    given["reward.independent"] = inputs["reward"]
    if name == "a reward model":
        del given["tuned"]
    evaluate.run(StageContext(alignment_stage(), given, folder, worker))


def measured(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return value
