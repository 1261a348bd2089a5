"""The tokens that prompts share are computed once, and change nothing in the completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.generation.test_greedy import load
from tuneyard_trainer.generation.batches import generate, next_token_logits
from tuneyard_trainer.generation.engines import TransformersEngine
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.generation.prefixes import SHORTEST, Prefix, common_prefix

SHARED = "Answer in one word, as the handbook of the harbor does. " * 8
PROMPTS = [SHARED + text for text in ("A lamp", "Who wrote it, and when was that?", "red")]


def encode(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("adapter", [None, "lora", "ia3"])
def test_a_prefix_that_is_computed_once_changes_no_completion_and_no_logits(
    adapter: str | None, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model = load(adapter, tiny_model_dir, tiny_tokenizer)
    ids = encode(tiny_tokenizer, PROMPTS)
    prefix = Prefix.of(model, ids)
    assert prefix is not None
    assert len(prefix.ids) >= SHORTEST

    def answers(prefix: Prefix | None) -> list[tuple[int, ...]]:
        pad = tiny_tokenizer.pad_token_id
        return generate(model, ids, pad=pad, stop=(), max_new_tokens=8, prefix=prefix)

    def logits(prefix: Prefix | None) -> torch.Tensor:
        return next_token_logits(model, ids, pad=tiny_tokenizer.pad_token_id, prefix=prefix)

    assert answers(prefix) == answers(None)
    assert len(set(answers(prefix))) > 1
    torch.testing.assert_close(logits(prefix), logits(None), rtol=1e-4, atol=1e-4)
    assert answers(prefix) == answers(None)  # a call leaves the prefix as it was


def test_continuations_compute_the_shared_tokens_once(
    tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model = load(None, tiny_model_dir, tiny_tokenizer)
    computed: list[int] = []

    def count(_: Any, __: Any, given: dict[str, Any]) -> None:
        computed.append(given["input_ids"].numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    many = [f"{SHARED} number {number}" for number in range(40)]
    engine = TransformersEngine(model, tiny_tokenizer.pad_token_id)
    continuations(engine, tiny_tokenizer, many, max_new_tokens=2, add_special_tokens=False)
    handle.remove()
    ids = encode(tiny_tokenizer, many)
    shared = len(common_prefix(ids))
    assert computed[0] == shared
    assert sum(computed) < 2 * shared + sum(len(each) - shared for each in ids) + 200


@pytest.mark.parametrize("adapter", ["prompt", "prefix"])
def test_a_model_with_virtual_tokens_has_no_prefix(
    adapter: str, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model = load(adapter, tiny_model_dir, tiny_tokenizer)
    assert Prefix.of(model, encode(tiny_tokenizer, PROMPTS)) is None


def test_a_model_with_a_sliding_window_has_no_prefix(
    tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model = load(None, tiny_model_dir, tiny_tokenizer)
    ids = encode(tiny_tokenizer, PROMPTS)
    model.config.sliding_window = 16
    assert Prefix.of(model, ids) is None
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert Prefix.of(model, ids) is None
    model.config.layer_types = ["full_attention", "full_attention"]
    assert Prefix.of(model, ids) is not None


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([], []),
        ([[1, 2, 3]], [1, 2]),
        ([[1, 2, 3], [1, 2, 4]], [1, 2]),
        ([[1, 2], [1, 2, 4]], [1]),  # a token of each prompt is left
        ([[1, 2], [1, 2]], [1]),
        ([[1], []], []),
        ([[5, 1], [5, 2], [6, 1]], []),
    ],
)
def test_the_shared_tokens_leave_one_of_each_prompt(
    prompts: list[list[int]], shared: list[int]
) -> None:
    assert common_prefix(prompts) == shared


def test_few_or_short_prompts_are_not_worth_a_prefix(
    tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    model = load(None, tiny_model_dir, tiny_tokenizer)
    assert Prefix.of(model, encode(tiny_tokenizer, PROMPTS[:1])) is None
    assert Prefix.of(model, encode(tiny_tokenizer, ["A red lamp", "A red door"])) is None
