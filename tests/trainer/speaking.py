"""A tiny model that answers with a few letters and then stops, and stages that train it on rewards.

Reinforcement learning needs completions that end and that differ; a model with random weights
produces neither.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tests.trainer.conftest import VOCABULARY, tiny_llama
from tuneyard.api.plan import PlannedStage, StageInput
from tuneyard.api.stage_settings import GrpoSettings, PpoSettings
from tuneyard_trainer.reinforcement.rewards import Attempt

LETTERS = "abcdefgh"
QUESTIONS = [f"Say {word}." for word in ("one", "two", "three", "four", "five", "six", "seven")]


def speaking_model(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Path:
    """Train a model to answer any question with 2 to 6 random letters of LETTERS (about a second).
    Return its folder."""
    generator = random.Random(0)
    rows = [_row(generator, tokenizer) for _ in range(64)]
    width = max(len(ids) for ids, _ in rows)
    ids_BL = torch.full((len(rows), width), 3)
    labels_BL = torch.full((len(rows), width), -100)
    for index, (ids, start) in enumerate(rows):
        ids_BL[index, : len(ids)] = torch.tensor(ids)
        labels_BL[index, start : len(ids)] = torch.tensor(ids[start:])
    model = tiny_llama(VOCABULARY, **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(input_ids=ids_BL, labels=labels_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _row(generator: random.Random, tokenizer: Any) -> tuple[list[int], int]:
    """Return token ids and the position of the completion. Each letter is one token."""
    turns = [{"role": "user", "content": generator.choice(QUESTIONS)}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    letters = generator.choices(LETTERS, k=generator.randint(2, 6))
    answer = [tokenizer.convert_tokens_to_ids(letter) for letter in letters]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def share_of(letter: str) -> Callable[[Sequence[Attempt]], torch.Tensor]:
    """Return a reward: the share of this letter in a completion; 0 for an empty completion."""

    def reward(attempts: Sequence[Attempt]) -> torch.Tensor:
        return torch.tensor(
            [answer.count(letter) / len(answer) if answer else 0.0 for _, answer in attempts]
        )

    return reward


def write_prompts(path: Path, count: int = 7) -> Path:
    rows = [{"prompt": question} for question in (QUESTIONS * count)[:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loop_settings(**changes: Any) -> dict[str, Any]:
    return {
        "freeze": None,
        "dropout": None,
        "epochs": None,
        "max_steps": 4,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "schedule": {"type": "constant", "warmup": 0.0},
        "optimizer": {},
        "evaluation_steps": None,
        "early_stopping": None,
        "keep_best": True,
        "precision": "auto",
        "seed": 3,
    } | changes


SHARED: dict[str, Any] = {
    "adapter": None,
    "prompts": {"format": "auto", "fields": {}, "limit": None},
    "chat": {"system_prompt": None, "chat_template": None},
    "sampling": {"max_new_tokens": 12},
    "reward": [{"role": "reward"}],
    "clip_range": 0.2,
    "stop_on": None,
}


def ppo_stage(training: dict[str, Any] | None = None, **changes: Any) -> PlannedStage:
    settings: dict[str, Any] = SHARED | {
        "rollouts": 16,
        "optimization_epochs": 2,
        "value_clip_range": 0.2,
        "value_coefficient": 0.1,
        "entropy_coefficient": 0.0,
        "discount": 1.0,
        "gae_lambda": 0.95,
        "kl_coefficient": 0.05,
        "target_kl": None,
        "missing_eos_penalty": 1.0,
    }
    return _stage("ppo", PpoSettings, settings, training, changes)


def grpo_stage(training: dict[str, Any] | None = None, **changes: Any) -> PlannedStage:
    settings: dict[str, Any] = SHARED | {
        "estimator": "grpo",
        "group_size": 8,
        "kl_coefficient": 0.04,
    }
    return _stage("grpo", GrpoSettings, settings, {"batch_size": 32} | (training or {}), changes)


def _stage(
    name: str,
    kind: type[PpoSettings | GrpoSettings],
    settings: dict[str, Any],
    training: dict[str, Any] | None,
    changes: dict[str, Any],
) -> PlannedStage:
    runtime = changes.pop("runtime", {})
    settings = settings | changes | {"training": loop_settings(**(training or {}))}
    return PlannedStage(
        name=name,
        settings=kind.model_validate(settings),
        inputs={"model": StageInput(stage="model"), "prompts": StageInput(stage="prompts")},
        runtime=runtime,
        fingerprint="sha256:test",
    )
