"""The text of a row: the parts that rules read, and how a rule changes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tuneyard_trainer.data.reading.conversations import template_turns, turn_text
from tuneyard_trainer.data.reading.example import Example, Message, ToolCall
from tuneyard_trainer.data.texts import WITHOUT_CONTEXT

Change = Callable[[str], str]


def texts(example: Example) -> Iterator[str]:
    """Yield each text of a row that `changed` changes: the content and the reasoning of each turn
    with the values in its calls, or the document; the right answers, and the values in the tools.
    """
    if example.messages:
        for turn in example.messages:
            yield from filter(None, (turn.content, turn.reasoning))
            for call in turn.calls:
                yield from _values(call.arguments)
    else:
        yield example.text or f"{example.prompt}\n{example.completion}"
    yield from example.expected
    for tool in example.tools:
        yield from _values(tool)


def passages(example: Example) -> Iterator[str]:
    """Yield the texts of which a row consists, without the system turns, which many rows share: of
    each turn its reasoning, and its content with its calls as JSON."""
    if not example.messages:
        yield from filter(None, (example.text, example.prompt, example.completion))
    for turn in example.messages:
        if turn.role != "system":
            yield from filter(None, (turn.reasoning, turn.text))


def conversation(example: Example) -> str:
    """Return the `passages` as one text, one after another."""
    if not example.messages:
        return example.text or f"{example.prompt}\n{example.completion}"
    return "\n".join(passages(example))


def changed(example: Example, change: Change) -> Example:
    """Return the example with each of its texts changed; the same object if none changes.

    A number in a call is changed as its digits: it becomes a string if these change. The names of
    tools and the ids of calls stay.
    """
    messages = tuple(_changed_turn(turn, change) for turn in example.messages)
    prompt, completion, text = (
        change(each) if each else each
        for each in (example.prompt, example.completion, example.text)
    )
    expected = tuple(map(change, example.expected))
    tools = tuple(_changed_value(tool, change) for tool in example.tools)
    new = replace(
        example,
        messages=messages,
        prompt=prompt,
        completion=completion,
        text=text,
        expected=expected,
        tools=tools,
    )
    return example if new == example and tools == example.tools else new


def _changed_turn(turn: Message, change: Change) -> Message:
    content = change(turn.content)
    reasoning = change(turn.reasoning) if turn.reasoning else ""
    calls = tuple(
        ToolCall(call.name, _changed_value(call.arguments, change), call.id) for call in turn.calls
    )
    if (content, reasoning, calls) == (turn.content, turn.reasoning, turn.calls):
        return turn
    return replace(turn, content=content, reasoning=reasoning, calls=calls)


# ---- values of JSON -----------------------------------------------------------------------------


def _values(value: Any) -> Iterator[str]:
    """Yield the strings and the numbers in a value of JSON, with the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from _values(each)
    elif isinstance(value, list):
        for each in value:
            yield from _values(each)
    elif _is_number(value):
        yield str(value)


def _changed_value(value: Any, change: Change) -> Any:
    """Return a value of JSON with each of its `_values` changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        named: dict[str, Any] = {}
        for name, each in value.items():
            new = change(name)
            while new in named:  # two addresses that are redacted are two fields still
                new += "_"
            named[new] = _changed_value(each, change)
        return named
    if isinstance(value, list):
        return [_changed_value(each, change) for each in value]
    if _is_number(value):
        text = change(str(value))
        return value if text == str(value) else text
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- rows on disk -------------------------------------------------------------------------------


def as_written(example: Example) -> dict[str, Any]:
    """Return a row as `validation.jsonl` holds it, for a model with a chat template."""
    if not example.messages:
        return {"text": conversation(example)}
    row: dict[str, Any] = {"messages": template_turns(example.messages)}
    return row | ({"tools": list(example.tools)} if example.tools else {})


def written(text: Mapping[str, Any]) -> tuple[str, str]:
    """Return the system text and the other text of a row as `validation.jsonl` holds it.

    The tools are part of the system text: with other tools, a row teaches another behavior.
    Passages before the question are left out, since rows share them.
    """
    text = text.get(WITHOUT_CONTEXT, text)
    if "messages" not in text:
        return "", text["text"] if "text" in text else f"{text['prompt']}\n{text['completion']}"
    parts: dict[bool, list[str]] = {True: [], False: []}
    for turn in text["messages"]:
        parts[turn["role"] == "system"].append(said(turn))
    if text.get("tools"):
        parts[True].append(json.dumps(text["tools"], ensure_ascii=False, sort_keys=True))
    return "\n".join(parts[True]), "\n".join(parts[False])


def said(turn: Mapping[str, Any]) -> str:
    """Return all that a turn on disk says, without the ids of its calls."""
    return "\n".join(filter(None, (turn.get("reasoning_content"), turn_text(turn))))
