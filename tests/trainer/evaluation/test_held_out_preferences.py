"""Held-out preferences: a reward model reads them as it was trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.trainer.conftest import VOCABULARY
from tests.trainer.preferring import write_pairs
from tuneyard.api.stage_settings import ChatSettings
from tuneyard_trainer.evaluation.preferences import HeldOutPreferences
from tuneyard_trainer.reinforcement.rewards import Attempt, LearnedReward

CPU = torch.device("cpu")
REASONING = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '[' + m['reasoning_content'] + ']' }}{% endif %}"
    "{{ m['content'] }}{% for call in m['tool_calls'] %}{{ '{' + call['function']['name'] + "
    "call['function']['arguments'] | tojson + '}' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = ChatSettings(system_prompt="Be brief.", chat_template=REASONING)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def reward_model(folder: Path, tokenizer: Any) -> LearnedReward:
    """Return the output of a reward stage."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder / "weights")
    tokenizer.save_pretrained(folder / "tokenizer")
    return LearnedReward.load(folder, CHAT, CPU)


def assert_read_as_trained_on(
    tmp_path: Path, model: Path, tokenizer: Any, rows: list[dict[str, Any]]
) -> HeldOutPreferences:
    folder = write_pairs(tmp_path, model, rows, chat=CHAT, held_out=0.5)
    found = HeldOutPreferences.open(folder, CHAT)
    assert found is not None
    encode = reward_model(tmp_path / "reward", tokenizer).encode
    held_out = found.comparisons.rows
    trained_on = [held_out.ids(row).tolist() for row in range(len(held_out))]
    assert [encode(attempt) for attempt in found.attempts] == trained_on
    assert len(found.prompts) == len(found.comparisons)
    return found


def test_answers_that_differ_in_their_reasoning_alone_are_scored_with_it(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    """They had the same tokens, so that each such pair was a tie."""
    rows = [
        {
            "prompt": f"{n} + 2?",
            "chosen": {"role": "assistant", "content": "So.", "thinking": f"{n} and two"},
            "rejected": {"role": "assistant", "content": "So.", "thinking": "a guess"},
        }
        for n in range(4)
    ]
    found = assert_read_as_trained_on(tmp_path, tiny_model_dir, tiny_tokenizer, rows)
    better, worse = found.groups[0]
    assert better.completion == worse.completion == "So."
    assert better.turn != worse.turn


def test_calls_are_scored_as_the_template_renders_them_and_beside_the_tools(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    def call(number: int) -> dict[str, Any]:
        function = {"name": "add", "arguments": {"a": number}}
        calls = [{"type": "function", "function": function}]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    rows = [
        {"prompt": f"{n} + 2?", "chosen": call(n), "rejected": call(9), "tools": [TOOL]}
        for n in range(4)
    ]
    assert_read_as_trained_on(tmp_path, tiny_model_dir, tiny_tokenizer, rows)


def test_plain_answers_need_no_turns_on_disk(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(4)]
    assert_read_as_trained_on(tmp_path, tiny_model_dir, tiny_tokenizer, rows)
    lines = (tmp_path / "pairs" / "validation.jsonl").read_text().splitlines()
    assert all(json.loads(line).keys() == {"prompt", "answers", "label"} for line in lines)


def test_a_sampled_answer_is_scored_beside_the_tools_as_a_written_one_is(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    """The reward model was trained on the prompts with their tools."""
    rows = [
        {"prompt": f"{n} + 2?", "chosen": f"{n + 2}.", "rejected": "No.", "tools": [TOOL]}
        for n in range(4)
    ]
    found = assert_read_as_trained_on(tmp_path, tiny_model_dir, tiny_tokenizer, rows)
    encode = LearnedReward.load(tmp_path / "reward", CHAT, CPU).encode
    for attempt in found.attempts:
        assert encode(Attempt(attempt.prompt, attempt.completion)) == encode(attempt)
