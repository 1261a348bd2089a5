"""Separable preferences and their stages, for tests of training on preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuneyard.api.plan import PlannedStage, SourceInput
from tuneyard.api.sources import FieldMap
from tuneyard.api.stage_settings import (
    ChatSettings,
    DatasetSettings,
    LoopSettings,
    PairsSettings,
    Settings,
)
from tuneyard.api.training import Optimizer, Schedule
from tuneyard_trainer.preference import pairs
from tuneyard_trainer.worker import StageContext, Worker

CPU = torch.device("cpu")
WORDS = [
    "lamp",
    "desk",
    "port",
    "charger",
    "handbook",
    "harbour",
    "team",
    "number",
    "button",
    "row",
]


def separable(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs that differ in one word: the better completion holds "warranty"."""
    random = np.random.default_rng(seed)

    def words(number: int) -> list[str]:
        return [WORDS[i] for i in random.integers(0, len(WORDS), size=number)]

    rows = []
    for index in range(count):
        answer = words(5)
        place = int(random.integers(0, 5))
        better, worse = list(answer), list(answer)
        better[place], worse[place] = "warranty", "red"
        rows.append(
            {
                "prompt": f"{' '.join(words(3))} {index}?",
                "chosen": " ".join(better),
                "rejected": " ".join(worse),
            }
        )
    return rows


def loop_settings(**changes: Any) -> LoopSettings:
    settings: dict[str, Any] = {
        "freeze": None,
        "dropout": None,
        "epochs": 1.0,
        "max_steps": None,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "schedule": Schedule(),
        "optimizer": Optimizer(),
        "evaluation_steps": None,
        "early_stopping": None,
        "keep_best": True,
        "precision": "auto",
        "seed": 3,
    }
    return LoopSettings(**(settings | changes))


def planned(settings: Settings, **runtime: Any) -> PlannedStage:
    source = SourceInput(uri="file://rows.jsonl", path="spec.preferences.data[0].uri")
    return PlannedStage(
        name=settings.kind,
        settings=settings,
        inputs={"preferences.0": source},
        runtime=runtime,  # type: ignore[arg-type]
        fingerprint="sha256:test",
    )


def write_pairs(
    folder: Path, model: Path, rows: list[dict[str, Any]] | Path, **changes: Any
) -> Path:
    """Run a pairs stage over rows, or over a file of them, and return its output folder. A quarter
    of the prompts is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    source = rows if isinstance(rows, Path) else folder / "rows.jsonl"
    if not isinstance(rows, Path):
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "preferences": [DatasetSettings(format="auto", fields=FieldMap(), weight=1.0, limit=None)],
        "labeled": False,
        "held_out": 0.25,
        "max_length": "auto",
        "on_overlength": "error",
        "on_invalid_row": "error",
        "chat": ChatSettings(system_prompt=None, chat_template=None),
        "seed": 0,
    }
    stage = planned(PairsSettings(**(settings | changes)))
    out = folder / "pairs"
    out.mkdir()
    pairs.run(
        StageContext(stage, {"model": model, "preferences.0": source}, out, Worker(0, 1, CPU))
    )
    return out
