"""Conversations in the shape that chat templates take, and that rows on disk have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuneyard_trainer.data.reading.example import Message as Turn
from tuneyard_trainer.data.reading.example import ToolCall, call_text

Message = dict[str, Any]
"""One turn in the shape that chat templates take: {"role": ..., "content": ...}, and `tool_calls`
and `reasoning_content` if it has them. `template_turns` makes them."""
_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)


def template_turns(turns: Sequence[Turn], *, reasoning: bool = True) -> list[Message]:
    """Return the turns of a conversation in the shape that chat templates take.

    A call without an id gets one, and the tool's result the id and the name of its call: some
    templates need them. `reasoning`: False leaves the reasoning out.
    """
    messages: list[Message] = []
    waiting: list[dict[str, Any]] = []  # calls without a result
    number = 0
    for turn in turns:
        message: Message = {"role": turn.role, "content": turn.content}
        if turn.role == "assistant":
            if not reasoning:
                message["content"] = _THOUGHT.sub("", turn.content, count=1) or turn.content
            elif turn.reasoning:
                message["reasoning_content"] = turn.reasoning
            waiting = []
            for call in turn.calls:
                number += 1
                function = {"name": call.name, "arguments": dict(call.arguments)}
                key = call.id or f"call{number:05}"  # Mistral's templates require 9 characters
                waiting.append({"type": "function", "id": key, "function": function})
            if turn.calls:
                message["tool_calls"] = waiting
                waiting = list(waiting)
        elif turn.role == "tool":
            answered = next((c for c in waiting if c["id"] == turn.call_id), None)
            answered = answered or (waiting[0] if waiting else None)
            if answered is not None:
                waiting.remove(answered)
            name = turn.name or (answered["function"]["name"] if answered else "")
            key = turn.call_id or (answered["id"] if answered else "")
            message |= {"name": name} if name else {}
            message |= {"tool_call_id": key} if key else {}
        messages.append(message)
    return messages


def turn_text(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn, followed by its calls as JSON objects, one a line."""
    calls = (call["function"] for call in turn.get("tool_calls", ()))
    lines = (call_text(ToolCall(call["name"], call["arguments"])) for call in calls)
    return "\n".join(filter(None, (turn["content"], *lines)))
