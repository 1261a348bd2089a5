"""Write small models, and what mergekit makes of them, for the tests of merging.

    .venv-mergekit/bin/python scripts/merge_oracle.py tests/trainer/merging/mergekit

Runs in an environment of its own (`make merge-oracle`). The models are Llamas with random weights:
a base and three that differ from it. Each file of the result has the tensors of one model.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.4}
DENSITY, SCALE = 0.35, 0.8
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "taskArithmetic": {"merge_method": "task_arithmetic", "parameters": {"lambda": SCALE}},
    "ties": {
        "merge_method": "ties",
        "parameters": {"lambda": SCALE, "density": DENSITY, "normalize": True},
    },
    "dareLinear": {"merge_method": "dare_linear", "parameters": {"lambda": SCALE, "density": 1.0}},
    "dareTies": {"merge_method": "dare_ties", "parameters": {"lambda": SCALE, "density": 1.0}},
}
"""mergekit's recipes by our names. At a density of 1, DARE draws nothing."""


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        models = {name: Path(folder) / name for name in ("base", *WEIGHTS)}
        for seed, (name, path) in enumerate(models.items()):
            write_model(path, seed)
            shutil.copy(path / "model.safetensors", target / f"{name}.safetensors")
        for name, recipe in MERGES.items():
            made = Path(folder) / name
            run_merge(configuration(recipe, models), str(made), MergeOptions())
            (part,) = made.glob("*.safetensors")
            shutil.copy(part, target / f"{name}.safetensors")


def write_model(folder: Path, seed: int) -> None:
    """Write a model: the base for seed 0, and else the base with other weights by a tenth."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += noise * (0.01 if seed else 0.1)
    model.save_pretrained(folder)


def configuration(recipe: dict[str, Any], models: dict[str, Path]) -> MergeConfiguration:
    if recipe["merge_method"] == "slerp":
        parts = [{"model": str(models["a"])}, {"model": str(models["b"])}]
        base = models["a"]
    else:
        parts = [
            {"model": str(models[name]), "parameters": {"weight": weight}}
            for name, weight in WEIGHTS.items()
        ]
        base = models["base"]
    based = {} if recipe["merge_method"] == "linear" else {"base_model": str(base)}
    return MergeConfiguration.model_validate(
        {**recipe, **based, "models": parts, "dtype": "float32"}
    )


if __name__ == "__main__":
    main()
