"""Prompt sets: the turns of a row, and their rendering with and without a chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tuneyard.api.sources import FieldMap
from tuneyard.api.stage_settings import ChatSettings, PromptSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prompts import Prompt, read_prompts, tokenize

CHAT = ChatSettings(system_prompt=None, chat_template=None)
TURNS = [
    {"role": "user", "content": "Which lamp?"},
    {"role": "assistant", "content": "The left one."},
    {"role": "user", "content": "Sure?"},
]


def read(
    path: Path, *rows: dict[str, Any], system: str | None = None, **fields: str
) -> list[Prompt]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PromptSettings(format="auto", fields=FieldMap(**fields), limit=None)
    chat = ChatSettings(system_prompt=system, chat_template=None)
    return read_prompts(path, settings, chat, name="spec.optimize.ppo.prompts")


def without_template(tokenizer: Any) -> Any:
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    return plain


def text(prompt: Prompt, tokenizer: Any) -> str:
    tokenized = tokenize(prompt, tokenizer, CHAT)
    assert tokenized is not None
    return str(tokenizer.decode(tokenized.ids))


def test_without_a_chat_template_the_policy_continues_every_turn_of_the_prompt(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    plain = without_template(tiny_tokenizer)
    conversation = (
        "\n\nHuman: Which lamp?\n\nAssistant: The left one.\n\nHuman: Sure?\n\nAssistant: "
    )
    (prompt,) = read(tmp_path / "p.jsonl", {"messages": TURNS})
    assert text(prompt, plain) == conversation
    (prompt,) = read(tmp_path / "p.jsonl", {"messages": TURNS}, system="Be exact.")
    assert text(prompt, plain) == f"\n\nSystem: Be exact.{conversation}"


def test_without_a_chat_template_a_single_turn_is_continued_as_it_is(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    (prompt,) = read(tmp_path / "p.jsonl", {"prompt": "Which lamp?"})
    assert text(prompt, without_template(tiny_tokenizer)) == "Which lamp?"


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"instruction": "i", "input": "x"}, {}),
        ({"instruction": "i", "context": "x"}, {"input": "context"}),
        ({"question": "i", "context": "x"}, {"prompt": "question", "input": "context"}),
        ({"text": "i", "context": "x"}, {"prompt": "text", "input": "context"}),
    ],
)
def test_the_input_of_a_row_follows_its_prompt(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, str]
) -> None:
    (prompt,) = read(tmp_path / "p.jsonl", row, **fields)
    assert prompt.question == "i\n\nx"


@pytest.mark.parametrize(
    ("row", "fields", "problem"),
    [
        ({"prompt": TURNS, "context": "x"}, {"input": "context"}, "context cannot follow a prompt"),
        ({"prompt": "i", "context": ["x"]}, {"input": "context"}, "context must be a string"),
        ({"instruction": "i", "input": {"x": 1}}, {}, "input must be a string, not dict"),
    ],
)
def test_an_input_that_cannot_follow_its_prompt_is_refused(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, str], problem: str
) -> None:
    with pytest.raises(StageError, match=problem) as caught:
        read(tmp_path / "p.jsonl", row, **fields)
    assert caught.value.reason == "InvalidData"


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        (["user", "user"], "turn 2 is by user and follows user; expected assistant"),
        (["assistant", "user"], "turn 1 is by assistant and begins the conversation"),
        (["user", "system", "user"], "turn 2 is by system and follows user; expected assistant"),
    ],
)
def test_a_prompt_with_roles_out_of_order_is_refused_by_its_row(
    tmp_path: Path, roles: list[str], problem: str
) -> None:
    turns = [{"role": role, "content": "Which lamp?"} for role in roles]
    with pytest.raises(StageError) as caught:
        read(tmp_path / "p.jsonl", {"messages": TURNS}, {"messages": turns})
    assert caught.value.reason == "InvalidData"
    assert f"p.jsonl row 2: {problem}" in caught.value.message


def test_the_reasoning_of_earlier_turns_is_kept_or_dropped_as_the_job_says(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Which port?"},
        {"role": "assistant", "content": "Left.", "reasoning_content": "Two ports."},
        {"role": "user", "content": "Sure?"},
    ]
    path = tmp_path / "p.jsonl"
    (kept,) = read(path, {"messages": turns})
    assert kept.messages[1]["reasoning_content"] == "Two ports."
    settings = PromptSettings(format="auto", fields=FieldMap(), limit=None, reasoning="drop")
    (dropped,) = read_prompts(path, settings, CHAT, name="prompts")
    assert dropped.messages[1] == {"role": "assistant", "content": "Left."}


def test_a_prompt_may_end_with_answers_and_hold_the_turn_of_a_tool(tmp_path: Path) -> None:
    """The turns after the last one of the user are an answer, which is left out."""
    called = [*TURNS[:2], {"role": "tool", "content": "left"}, *TURNS[1:]]
    answer = [{"role": "assistant", "content": "Yes."}]
    (prompt,) = read(tmp_path / "p.jsonl", {"messages": [*called, *answer]})
    assert list(prompt.messages) == called
