"""The text of a row: the parts that rules read, and how a rule changes them."""

from __future__ import annotations

import json
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


def as_written(example: Example) -> dict[str, Any]:
    """Return a row as `validation.jsonl` holds it, for a model with a chat template."""
    if not example.messages:
        return {"text": "\n".join(turns(example))}
    messages = [{"role": turn.role, "content": turn.content} for turn in example.messages]
    return {"messages": messages}


def written(text: Mapping[str, Any]) -> tuple[str, str]:
    """Return the system text and the other text of a row as `validation.jsonl` holds it."""
    if "messages" not in text:
        return "", text["text"] if "text" in text else f"{text['prompt']}\n{text['completion']}"
    parts: dict[bool, list[str]] = {True: [], False: []}
    for turn in text["messages"]:
        parts[turn["role"] == "system"].append(_turn(turn))
    return "\n".join(parts[True]), "\n".join(parts[False])


def _turn(turn: Mapping[str, Any]) -> str:
    """Return a turn's content, and whatever else it says, such as calls of tools."""
    rest = {name: turn[name] for name in turn if name not in ("role", "content") and turn[name]}
    content = turn.get("content") or ""
    return f"{content}\n{json.dumps(rest, ensure_ascii=False)}" if rest else content
