"""A small job on disk: data, manifest and plan, for tests that run every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tuneyard.api.plan import Plan
from tuneyard.manifests.manifest import read
from tuneyard.planning.plan import plan_job

COLORS = ["red", "blue", "green", "black", "white", "gray", "brown", "pink", "gold", "teal"]


def write_data(folder: Path) -> None:
    """Write `train.jsonl` with ten rows and `validation.jsonl` with four, in chat format."""
    for name, count in (("train", 10), ("validation", 4)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Which color has {name} lamp {i}?"},
                    {"role": "assistant", "content": f"Lamp {i} is {COLORS[i]}."},
                ],
                "expected": [COLORS[i]],
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(model_dir: Path, output: str = "out", **spec: Any) -> dict[str, Any]:
    """Return a FineTuneJob that uses `write_data`'s files. Keyword arguments replace parts of its
    spec."""
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "lamps"},
        "spec": {
            "model": {"uri": f"file://{model_dir}"},
            "data": {
                "train": [{"uri": "file://train.jsonl"}],
                "validation": {"data": [{"uri": "file://validation.jsonl"}]},
            },
            "adapter": {"lora": {"dropout": 0.1}},
            "training": {"epochs": 3, "batchSize": 4, "learningRate": 0.01, "checkpointSteps": 2},
            "evaluate": {"maxNewTokens": 4, "samples": 2},
            "output": {"uri": f"file://{output}", "merge": True},
        }
        | spec,
    }


def planned(value: dict[str, Any]) -> Plan:
    """Return the plan of a manifest."""
    return plan_job(read(yaml.safe_dump(value))[0])
