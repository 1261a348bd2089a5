"""The text of a row: the parts that rules read, and how a rule changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tuneyard_trainer.data.example import Example


def turns(example: Example) -> Iterator[str]:
    """Yield the text of each turn, or the document."""
    if example.messages:
        yield from (turn.content for turn in example.messages)
    else:
        yield example.text or f"{example.prompt}\n{example.completion}"


def conversation(example: Example) -> str:
    """Return the text without the system turns, which many rows share, one turn after another."""
    if not example.messages:
        return "\n".join(turns(example))
    return "\n".join(turn.content for turn in example.messages if turn.role != "system")


def changed(example: Example, change: Callable[[str], str]) -> Example:
    """Return the example with each of its texts changed; the same object if none changes."""
    messages = tuple(
        turn if (text := change(turn.content)) == turn.content else replace(turn, content=text)
        for turn in example.messages
    )
    prompt, completion, text = (
        change(each) if each else each
        for each in (example.prompt, example.completion, example.text)
    )
    new = replace(example, messages=messages, prompt=prompt, completion=completion, text=text)
    return example if new == example else new


def written(text: Mapping[str, Any]) -> tuple[str, str]:
    """Return the system text and the other text of a row as `validation.jsonl` holds it."""
    if "messages" in text:
        parts = {
            is_system: "\n".join(
                turn["content"]
                for turn in text["messages"]
                if (turn["role"] == "system") == is_system
            )
            for is_system in (True, False)
        }
        return parts[True], parts[False]
    return "", text["text"] if "text" in text else f"{text['prompt']}\n{text['completion']}"
