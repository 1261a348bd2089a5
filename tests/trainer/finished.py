"""A finished job for tests of reports: manifest, stage records and stage folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneyard.api.plan import StageRecord

MANIFEST: dict[str, Any] = {
    "apiVersion": "tuneyard.io/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "support-bot"},
    "spec": {
        "model": {"uri": "hf://acme/small-model", "revision": "v1"},
        "method": "sft",
        "adapter": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "data": {
            "train": [{"uri": "file://data/train.jsonl", "format": "auto", "weight": 1.0}],
            "validation": {"fraction": 0.1},
            "trainOn": "assistant",
        },
        "training": {"learningRate": "auto", "schedule": {"type": "cosine", "warmup": 0.03}},
        "output": {"uri": "file://out", "merge": False},
    },
}

PREPARE_METRICS = {"rows": 90.0, "heldOutRows": 10.0, "tokens": 9000.0, "skippedRows": 2.0}
PREPARE_DETAILS: dict[str, Any] = {
    "datasets": [
        {
            "role": "train.0",
            "name": "spec.data.train[0]",
            "format": "messages",
            "rows": 102,
            "kept": 100,
            "skipped": 2,
            "dropped": 0,
        }
    ],
    "maxLength": 1024,
    "faults": {"spec.data.train[0]": {"InvalidData": ["train.jsonl row 7: no <answer>"]}},
}
TRAIN_METRICS = {
    "steps": 40.0,
    "epochs": 2.0,
    "tokens": 18000.0,
    "tokensPerSecond": 150.0,
    "trainingSeconds": 120.0,
    "peakMemoryBytes": 1.5 * 2**30,
    "trainedParameters": 5e6,
    "parameters": 1e8,
    "finalLoss": 0.5,
    "validationLoss": 1.0,
    "baseValidationLoss": 2.0,
}
EVALUATE_METRICS = {
    "validationLoss": 1.0,
    "baseValidationLoss": 2.0,
    "answerAccuracy": 14 / 16,
    "baseAnswerAccuracy": 1 / 16,
    "questions": 16.0,
}
HOSTILE = "[bold red]loud[/bold red] <script>alert(1)</script> \x1b[2J```\n# heading | cell"
SAMPLES = [
    {
        "prompt": "How long is the warranty?",
        "reference": "30 months.",
        "expected": ["30 months"],
        "base": HOSTILE,
        "tuned": "It is 30 MONTHS.",
    }
]
EXPORT_METRICS = {"adapterTensors": 28.0, "bytes": 2.0**20}
LINES: list[dict[str, Any]] = [
    {"step": 0, "baseValidationLoss": 2.0},
    *(
        {"step": step, "loss": 0.5 + 2 * math.exp(-step / 10), "learningRate": 1e-4}
        for step in range(1, 41)
    ),
    {"step": 40, "validationLoss": 1.0},
]


def record(kind: str, metrics: Mapping[str, float], **details: Any) -> StageRecord:
    """Return the record of a stage that took 75 seconds."""
    value = {
        "stage": kind,
        "kind": kind,
        "identity": "sha256:identity",
        "inputDigests": {"model": "sha256:base", "train.0": "sha256:rows"},
        "digest": f"sha256:{kind}",
        "attempt": 1,
        "startedAt": "2026-01-01T00:00:00Z",
        "finishedAt": "2026-01-01T00:01:15Z",
        "metrics": dict(metrics),
        "details": details,
        "versions": {"tuneyard": "0.2.0", "torch": "2.15.0"},
    }
    return StageRecord.model_validate(value)


def records(samples: list[dict[str, Any]] | None = None) -> dict[str, StageRecord]:
    """Return the records of all four stages, by name."""
    stages = [
        record("prepare", PREPARE_METRICS, **PREPARE_DETAILS),
        record("sft", TRAIN_METRICS, bestStep=40),
        record("evaluate", EVALUATE_METRICS, samples=SAMPLES if samples is None else samples),
        record("export", EXPORT_METRICS),
    ]
    return {stage.stage: stage for stage in stages}


def folders(root: Path, *, lines: list[dict[str, Any]] | None = None) -> dict[str, Path]:
    """Write the export stage's inputs and return their folders by role."""
    inputs = {"data": "prepare", "tuned": "sft", "evaluation": "evaluate"}
    for stage in inputs.values():
        (root / stage).mkdir(parents=True)
        value = records()[stage].model_dump(mode="json", by_alias=True)
        (root / stage / "record.json").write_text(json.dumps(value))
    history = LINES if lines is None else lines
    text = "".join(json.dumps(line) + "\n" for line in history)
    (root / "sft" / "metrics.jsonl").write_text(text)
    (root / "prepare" / "data.json").write_text(json.dumps({"chatTemplate": "{{ messages }}"}))
    return {role: root / stage for role, stage in inputs.items()}
