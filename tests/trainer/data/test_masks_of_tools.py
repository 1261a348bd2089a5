"""Masks of conversations with tools and reasoning, in the templates of six families of models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import tokenizer_of_bytes
from tests.trainer.data.chat_templates import FAMILIES, Family
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder, Misfit
from tuneyard_trainer.data.reading.example import Example, Message, ToolCall, check

TOOL = {"type": "function", "function": {"name": "find", "description": "d", "parameters": {}}}
WORDS = (
    st.text(
        st.characters(
            codec="utf-8", exclude_categories=("Cc", "Cs", "Co"), include_characters="\n"
        ),
        min_size=1,
        max_size=12,
    )
    .map(str.strip)
    .filter(bool)
)
"""Texts without white space around them, which some templates trim."""
VALUES = st.recursive(
    WORDS | st.integers() | st.booleans() | st.none(),
    lambda value: st.lists(value, max_size=2) | st.dictionaries(WORDS, value, max_size=2),
    max_leaves=3,
)
CALLS = st.builds(
    ToolCall, st.sampled_from(["find", "get_weather"]), st.dictionaries(WORDS, VALUES, max_size=2)
)


@st.composite
def conversations(draw: Any, family: Family) -> list[Message]:
    """Draw a conversation of what the family's template supports."""
    turns = [Message("system", draw(WORDS))] if family.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(WORDS)))
        for _ in range(draw(st.integers(0, 2)) if family.calls else 0):
            calls = draw(st.lists(CALLS, min_size=1, max_size=family.calls))
            said = draw(WORDS) if family.text_beside_calls and draw(st.booleans()) else ""
            turns.append(Message("assistant", said, tuple(calls), _thought(draw, family)))
            turns += [Message("tool", draw(WORDS)) for _ in calls]
        turns.append(Message("assistant", draw(WORDS), reasoning=_thought(draw, family)))
    return turns


def _thought(draw: Any, family: Family) -> str:
    return str(draw(WORDS)) if family.reasoning and draw(st.booleans()) else ""


def _tokenizer(family: Family) -> Any:
    tokenizer = tokenizer_of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.specials)})
    tokenizer.chat_template = family.template
    return tokenizer


TOKENIZERS = {name: _tokenizer(family) for name, family in FAMILIES.items()}


def encode(tokenizer: Any, turns: list[Message], train_on: Any = "assistant") -> Encoded | Misfit:
    tools = (TOOL,) if any(turn.calls for turn in turns) else ()
    example = Example(1, "chat", tuple(turns), tools=tools)
    check(example)
    (found,) = Encoder(tokenizer, train_on).encode([example])
    return found


def trained(tokenizer: Any, turns: list[Message], train_on: Any = "assistant") -> str:
    found = encode(tokenizer, turns, train_on)
    assert isinstance(found, Encoded), found
    return str(tokenizer.decode(found.ids[found.mask == 1]))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_targets_are_the_assistants_turns_with_their_calls_and_stop_tokens(
    name: str, data: Any
) -> None:
    """For any conversation; no result of a tool, no header and no text of others is a target."""
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    turns = data.draw(conversations(family))
    written = family.writes(turns)
    assert trained(tokenizer, turns) == "".join(written)
    assert trained(tokenizer, turns, "last-assistant") == written[-1]
    flags = data.draw(st.lists(st.booleans(), min_size=len(written), max_size=len(written)))
    if not any(flags):
        return
    remaining = iter(flags)
    marked = [replace(t, train=next(remaining)) if t.role == "assistant" else t for t in turns]
    kept = [text for text, flag in zip(written, flags, strict=True) if flag]
    assert trained(tokenizer, marked) == "".join(kept)
