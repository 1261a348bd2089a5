"""Prepared data and planned stages, for tests of the stages after `prepare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tuneyard.api.plan import PlannedStage, StageInput
from tuneyard.api.stage_settings import TrainSettings
from tuneyard_trainer.data.prepared import ARRAYS

Row = tuple[list[int], list[int]]
"""Token ids and mask."""


def random_rows(count: int, *, seed: int = 0, vocabulary: int = 400) -> list[Row]:
    """Return rows of 5 to 40 tokens. The first third of a row has no loss."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(random.integers(5, 41))
        ids = random.integers(4, vocabulary, size=length).tolist()
        rows.append((ids, [int(position > length // 3) for position in range(length)]))
    return rows


def write_prepared(
    folder: Path,
    tokenizer: Any,
    train: list[Row],
    validation: list[Row] | None = None,
    **general: list[Row],
) -> Path:
    """Write the files of a prepare stage and return their folder. `general`: the rows of `general`
    and `guard`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in {"train": train, "validation": validation or [], **general}.items():
        if not rows:
            continue
        arrays = {
            "tokens": np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in rows]),
            "mask": np.concatenate([np.array(mask, dtype=np.uint8) for _, mask in rows]),
            "offsets": np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64),
            "source": np.zeros(len(rows), dtype=np.int16),
        }
        for name in ARRAYS:
            np.save(folder / f"{split}.{name}.npy", arrays[name])
    (folder / "validation.jsonl").write_text(
        "".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids, _ in validation or [])
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "data.json").write_text(json.dumps({"weights": [1.0], "maxLength": 256}))
    return folder


def train_stage(**changes: Any) -> PlannedStage:
    """Return an SFT stage. Keyword arguments override settings (snake_case); `runtime` sets the
    runtime."""
    runtime = changes.pop("runtime", {})
    settings: dict[str, Any] = {
        "kind": "sft",
        "adapter": None,
        "freeze": None,
        "dropout": None,
        "epochs": 2.0,
        "max_steps": None,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "schedule": {},
        "optimizer": {},
        "packing": "auto",
        "evaluation_steps": None,
        "early_stopping": None,
        "keep_best": True,
        "precision": "auto",
        "seed": 3,
    }
    return PlannedStage(
        name="sft",
        settings=TrainSettings.model_validate(settings | changes),
        inputs={"model": StageInput(stage="model"), "data": StageInput(stage="prepare")},
        runtime=runtime,
        fingerprint="sha256:test",
    )
