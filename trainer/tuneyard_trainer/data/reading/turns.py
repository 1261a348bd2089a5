"""The parser of turns, tool calls and tools: the only one, for every layout and purpose.

A turn is an object {role, content} or {from, value}. A conversation is a list of turns, a list of
strings that alternate between user and assistant (UltraChat), a dialogue of hh-rlhf as one string,
or a single turn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tuneyard_trainer.data.reading.example import ROLES, Message, Role, RowError, ToolCall

_REASONING = ("reasoning_content", "thinking", "reasoning")
_TRAINED = ("train", "training")
MAX_LEVELS = 100
"""The deepest nesting of arguments and tools. Real ones have less than 20 levels."""
_DIALOGUE_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


@dataclass(frozen=True)
class TurnKeys:
    """The keys of a turn's role and text, as the manifest names them. "": the published names."""

    role: str = ""
    content: str = ""

    def of(self, turn: Mapping[str, Any]) -> tuple[str, str]:
        """Return the keys of the role and of the text in this turn."""
        role, content, other = "role", "content", "value"
        if "role" not in turn and "from" in turn:
            role, content, other = "from", "value", "content"
        if content not in turn and other in turn:  # Axolotl's {role, value}
            content = other
        return self.role or role, self.content or content


PUBLISHED = TurnKeys()
TURN_KEYS = frozenset(
    {
        *("role", "from", "content", "value", *_REASONING, "weight", *_TRAINED, "train_detail"),
        *("tool_calls", "function_call", "name", "tool_call_id"),
    }
)
"""The published keys of a turn that are read."""


def is_turn(given: Mapping[str, Any], keys: TurnKeys) -> bool:
    """Return whether an object has the role of a turn."""
    role = given.get(keys.of(given)[0])
    return isinstance(role, str) and role.lower() in ROLES


def conversation(
    given: Any, field: str, keys: TurnKeys = PUBLISHED, *, texts: bool = False
) -> list[Message]:
    """Return the turns of a list. `texts`: they may be strings, by user and assistant in turn.

    Raises RowError, which names `field`, for anything else.
    """
    if not isinstance(given, list) or not given:
        raise RowError(
            f"{field} must be a list of turns {{role, content}} or {{from, value}}, and it is "
            f"{kind_of(given)}",
            "UnknownShape",
        )
    if texts and all(isinstance(each, str) for each in given):
        roles: tuple[Role, Role] = ("user", "assistant")
        return [Message(roles[i % 2], text) for i, text in enumerate(given)]
    return _joined(turn(each, f"turn {n}", keys) for n, each in enumerate(given, start=1))


def side(given: Any, field: str, role: Role, keys: TurnKeys = PUBLISHED) -> list[Message]:
    """Return the turns of a prompt or an answer: text by `role`, a dialogue, a turn, or a list."""
    if isinstance(given, str):
        return dialogue(given) or [Message(role, given)]
    if isinstance(given, Mapping):
        return [turn(given, field, keys)]
    if not isinstance(given, list):
        raise RowError(
            f"{field} must be text or a list of turns, and it is {kind_of(given)}", "UnknownShape"
        )
    return conversation(given, field, keys)


def dialogue(text: str) -> list[Message]:
    """Return the turns of an hh-rlhf dialogue; [] for any other text."""
    starts = list(_DIALOGUE_TURN.finditer(text))
    if not starts or starts[0].start() != 0 or starts[0][1] != "Human":
        return []
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return [
        Message("user" if match[1] == "Human" else "assistant", text[match.end() : end].strip())
        for match, end in zip(starts, ends, strict=True)
    ]


def turn(given: Any, where: str, keys: TurnKeys = PUBLISHED) -> Message:
    """Return one turn. `where` names it in messages. Raises RowError."""
    if not isinstance(given, dict):
        raise RowError(
            f"{where} must be an object {{role, content}} or {{from, value}}, not "
            f"{type(given).__name__}"
        )
    role_key, content_key = keys.of(given)
    name = str(given.get(role_key)).lower()
    role = ROLES.get(name)
    if role is None:
        known = ", ".join(ROLES)
        raise RowError(f"{where} has {role_key} {given.get(role_key)!r}; known roles are {known}")
    content = given.get(content_key)
    if len(given) == 2 and isinstance(content, str) and name != "function_call":
        return Message(role, content)
    if name == "function_call":
        return Message(role, "", _calls(_from_json(content, where), where), train=_train(given))
    calls = _given_calls(given, where) if role == "assistant" else ()
    if content is None and calls:
        content = ""
    if role == "tool" and isinstance(content, Mapping):
        _check_json(content, f"{where}: {content_key}")
        content = json.dumps(content, ensure_ascii=False)
    text, thought = _content(content, where, content_key)
    return Message(
        role,
        text,
        calls,
        (thought or _reasoning(given, where)) if role == "assistant" else "",
        _string(given, "name") if role == "tool" else "",
        _string(given, "tool_call_id") if role == "tool" else "",
        _train(given) if role == "assistant" else None,
    )


def _joined(turns: Iterable[Message]) -> list[Message]:
    """Return the turns, with a text and the calls of the assistant that follow it as one turn:
    ShareGPT writes each call as a turn of its own. A turn with its own reasoning, or trained on
    otherwise than the one before it, stays alone."""
    joined: list[Message] = []
    for message in turns:
        before = joined[-1] if joined else None
        calls_alone = message.calls and not message.content and not message.reasoning
        belongs = before is not None and (before.role, before.train) == ("assistant", message.train)
        if before is not None and belongs and calls_alone:
            joined[-1] = replace(before, calls=(*before.calls, *message.calls))
        else:
            joined.append(message)
    return joined


# ---- content ----------------------------------------------------------------------------------


def _content(value: Any, where: str, key: str) -> tuple[str, str]:
    """Return the text and the reasoning of a content: a string, or a list of parts."""
    if isinstance(value, list):
        parts = [_part(part, where) for part in value]
        return "".join(text for text, _ in parts), "\n".join(t for _, t in parts if t)
    if not isinstance(value, str):
        raise RowError(f"{where}: {key} must be a string, not {kind_of(value)}")
    return value, ""


def _part(part: Any, where: str) -> tuple[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(kind) if kind in ("text", "thinking") else None
    if not isinstance(text, str):
        raise RowError(f"{where} holds a part that is not text; training supports text only")
    return (text, "") if kind == "text" else ("", text)


def _reasoning(given: Mapping[str, Any], where: str) -> str:
    for key in _REASONING:
        text = given.get(key)
        if text is not None and not isinstance(text, str):
            raise RowError(f"{where}: {key} must be a string, not {type(text).__name__}")
        if text:
            return text
    return ""


def _train(given: Mapping[str, Any]) -> bool | None:
    """Return whether the turn is trained on: OpenAI's `weight`, or Axolotl's `train`.

    Raises RowError for Axolotl's `train_detail`, which trains on parts of a turn.
    """
    if given.get("train_detail"):
        problem = "train_detail marks parts of a turn, and a turn is trained on as a whole"
        raise RowError(f"{problem}: write train: true or false", "InvalidLabel")
    weight = given.get("weight")
    if weight is not None:
        if weight not in (0, 1):
            raise RowError(f"weight must be 0 or 1, and it is {weight!r}", "InvalidLabel")
        return bool(weight)
    for key in _TRAINED:
        if given.get(key) is not None:
            if not isinstance(given[key], bool):
                raise RowError(f"{key} must be true or false, not {given[key]!r}", "InvalidLabel")
            return bool(given[key])
    return None


# ---- tools ------------------------------------------------------------------------------------


def tools(given: Any, field: str) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a row in OpenAI's shape. `given`: a list, a list as JSON text, or None.

    A tool {name, description, parameters}, as ShareGPT has it, becomes the `function` of one.
    """
    given = _from_json(given, field) if isinstance(given, str) and given.strip() else given
    if given in (None, "", [], {}) or (isinstance(given, str) and not given.strip()):
        return ()
    found = given if isinstance(given, list) else [given]
    return tuple(_tool(each, f"{field}[{index}]") for index, each in enumerate(found))


def _tool(given: Any, where: str) -> Mapping[str, Any]:
    given = _from_json(given, where) if isinstance(given, str) else given
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} must be a tool {{name, description, parameters}}")
    _check_json(given, where)
    if function is given:
        return {"type": "function", "function": dict(given)}
    return given


def _given_calls(given: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    calls = given.get("tool_calls")
    if calls:
        return _calls(_from_json(calls, where) if isinstance(calls, str) else calls, where)
    single = given.get("function_call")  # OpenAI's field before `tool_calls`
    return _calls(single, where) if isinstance(single, Mapping) else ()


def _calls(given: Any, where: str) -> tuple[ToolCall, ...]:
    found = given if isinstance(given, list) else [given]
    return tuple(_call(each, where) for each in found)


def _call(given: Any, where: str) -> ToolCall:
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a call of a tool must be {{name, arguments}}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = _from_json(arguments, f"{where}: the arguments of {function['name']}")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowError(
            f"{where}: the arguments of {function['name']} must be an object, not "
            f"{type(arguments).__name__}"
        )
    _check_json(arguments, f"{where}: the arguments of {function['name']}")
    return ToolCall(function["name"], arguments, _string(given, "id"))


def _from_json(text: Any, where: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError(f"{where} is not JSON: {reason}") from error


def _check_json(value: Any, where: str) -> None:
    """Raise RowError for a value that JSON cannot hold, and for one of too many levels. Parquet has
    dates and bytes, and Python reads NaN, which no other reader of JSON does."""
    waiting = [(value, 1)]
    while waiting:
        each, level = waiting.pop()
        if level > MAX_LEVELS:
            raise RowError(f"{where}: more than {MAX_LEVELS} levels; flatten them")
        if isinstance(each, Mapping):
            waiting += [(part, level + 1) for pair in each.items() for part in pair]
        elif isinstance(each, list):
            waiting += [(part, level + 1) for part in each]
        elif isinstance(each, float) and not math.isfinite(each):
            raise RowError(f"{where}: {each} is not JSON; write null or a text")
        elif not isinstance(each, str | int | float | None):
            kind = type(each).__name__
            raise RowError(f"{where}: a {kind} is not JSON; write it as text")
        elif isinstance(each, str) and not _is_encodable(each):
            raise RowError(f"{where}: half of a surrogate pair")


def _is_encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _string(given: Mapping[str, Any], key: str) -> str:
    value = given.get(key)
    return value if isinstance(value, str) else ""


def kind_of(value: Any) -> str:
    """Return the type of a value for messages."""
    if value is None:
        return "missing"
    return "empty" if value in ("", [], {}) else type(value).__name__
