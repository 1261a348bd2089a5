"""The inputs of tiny evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tests.trainer.preferring import separable, write_pairs
from tests.trainer.rows import random_rows, write_prepared


@pytest.fixture(scope="session")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_tokenizer: Any
) -> dict[str, Path]:
    """A model and one tuned from it, prepared rows, preferences and a reward model, all tiny."""
    folder = tmp_path_factory.mktemp("inputs")
    write_prepared(folder / "prepared", tiny_tokenizer, random_rows(2), random_rows(9, seed=9))
    rows = [
        json.loads(line) | {"expected": ["lamp"] if index % 2 else []}
        for index, line in enumerate((folder / "prepared/validation.jsonl").read_text().split("\n"))
        if line
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prepared" / "validation.jsonl").write_text(text)
    tuned = tiny_llama(VOCABULARY, initializer_range=0.1)
    tuned.save_pretrained(folder / "tuned" / "weights")
    torch.manual_seed(0)
    shape = tiny_llama(VOCABULARY).config.to_dict()
    classifier = LlamaForSequenceClassification(LlamaConfig(**shape | {"num_labels": 1}))
    classifier.save_pretrained(folder / "reward")
    tiny_tokenizer.save_pretrained(folder / "reward")
    return {
        "model": tiny_model_dir,
        "tuned": folder / "tuned",
        "prepared": folder / "prepared",
        "pairs": write_pairs(folder / "pairs", tiny_model_dir, separable(28)),
        "reward": folder / "reward",
    }
