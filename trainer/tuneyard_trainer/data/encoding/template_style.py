"""How a chat template wants tools and reasoning, found out by rendering samples.

Templates differ: arguments are an object or JSON text, the content beside calls is "" or none, ids
of calls have 9 characters (Mistral), and reasoning is in a field of one of several names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]

# Templates raise these on unsupported conversations: by raise_exception, or by wrong assumptions.
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)
_NAME, _KEY, _VALUE = "tuneyard_call", "tuneyard_key", "tuneyard_value"
_TOOL = {
    "type": "function",
    "function": {
        "name": "tuneyard_tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_SHORT_ID, _LONG_ID = "call00001", "call_0123456789abcdef"


class MisfitError(Exception):
    """The chat template does not support this conversation."""


@dataclass(frozen=True)
class TemplateStyle:
    """The shape in which a template takes calls and reasoning."""

    calls: bool
    """Whether calls are rendered."""
    tools: bool
    """Whether the list of tools is rendered."""
    reasoning: str
    """The field whose text is rendered as reasoning. "": none."""
    json_arguments: bool = False
    """Whether arguments are JSON text, not an object."""
    no_content: bool = False
    """Whether the content beside calls is none, not ""."""
    short_ids: bool = False
    """Whether ids of calls must have 9 characters."""
    end: str = ""
    """The text after the arguments of a last call."""

    @staticmethod
    @lru_cache(maxsize=8)
    def of(tokenizer: PreTrainedTokenizerBase, template: str) -> TemplateStyle:
        """Return the style of a template."""
        reasoning = next((key for key in REASONING_KEYS if _thinks(tokenizer, template, key)), "")
        tools = "tuneyard_tool" in _try(tokenizer, template, [_user()], [_TOOL])
        for no_content in (False, True):
            for json_arguments in (False, True):
                call = _calling(json_arguments, no_content, _SHORT_ID)
                text = _try(tokenizer, template, [_user(), call], [_TOOL])
                if not _shows_call(text):
                    continue
                answered = [_user(), _calling(json_arguments, no_content, _LONG_ID), *_ANSWERED]
                return TemplateStyle(
                    calls=True,
                    tools=tools,
                    reasoning=reasoning,
                    json_arguments=json_arguments,
                    no_content=no_content,
                    short_ids=not _try(tokenizer, template, answered, [_TOOL]),
                    end=text.rpartition(_VALUE)[2],
                )
        return TemplateStyle(calls=False, tools=tools, reasoning=reasoning)

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """Return the turns in the template's shape. Reasoning that it does not render is left out.

        Raises MisfitError if the turns hold calls and the template renders none.
        """
        ids: dict[str, str] = {}
        return [self._turn(message, ids) for message in messages]

    def closing(self, text: str) -> str:
        """Return the start of `text`, which follows the arguments of a call, that ends the call."""
        return text[: common_prefix(text, self.end)]

    def _turn(self, message: Message, ids: dict[str, str]) -> Message:
        turn = dict(message)
        thought = turn.pop("reasoning_content", "")
        if thought and self.reasoning:
            turn[self.reasoning] = thought
        if "tool_calls" in turn:
            if not self.calls:
                raise MisfitError(
                    "the chat template renders no tool calls: set spec.data.chatTemplate to one "
                    "that does, or choose a model that calls tools"
                )
            turn["tool_calls"] = [self._call(call, ids) for call in turn["tool_calls"]]
            if self.no_content and not turn["content"]:
                turn["content"] = None
        if self.short_ids and "tool_call_id" in turn:
            turn["tool_call_id"] = _short_id(turn["tool_call_id"], ids)
        return turn

    def _call(self, call: Mapping[str, Any], ids: dict[str, str]) -> dict[str, Any]:
        function = dict(call["function"])
        if self.json_arguments:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        key = _short_id(call["id"], ids) if self.short_ids else call["id"]
        return {**call, "id": key, "function": function}


def _short_id(key: str, ids: dict[str, str]) -> str:
    if len(key) == len(_SHORT_ID) and key.isalnum():
        return key
    return ids.setdefault(key, f"call{len(ids) + 1:05}")


# ---- samples ----------------------------------------------------------------------------------


def _user() -> Message:
    return {"role": "user", "content": "?"}


_ANSWERED: tuple[Message, ...] = (
    {"role": "tool", "content": "r", "name": _NAME, "tool_call_id": _LONG_ID},
    {"role": "assistant", "content": "a"},
)


def _calling(json_arguments: bool, no_content: bool, key: str) -> Message:
    arguments: Any = {_KEY: _VALUE}
    if json_arguments:
        arguments = json.dumps(arguments)
    function = {"name": _NAME, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None if no_content else "",
        "tool_calls": [{"type": "function", "id": key, "function": function}],
    }


def _shows_call(text: str) -> bool:
    """Return whether a rendering shows the call, with its arguments encoded once."""
    return all(part in text for part in (_NAME, _KEY, _VALUE)) and f'\\"{_KEY}' not in text


def _thinks(tokenizer: PreTrainedTokenizerBase, template: str, key: str) -> bool:
    answer = {"role": "assistant", "content": "a", key: _VALUE}
    return _VALUE in _try(tokenizer, template, [_user(), answer], [])


def _try(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
) -> str:
    """Return the rendering; "": the template refuses the sample."""
    try:
        return render(tokenizer, template, messages, tools)
    except MisfitError:
        return ""


# ---- rendering --------------------------------------------------------------------------------


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    prompt: bool = False,
) -> str:
    """Return the rendering of turns in the template's own shape. `prompt`: with the generation
    prompt. Raises MisfitError if the template refuses the conversation."""
    schemas: list[Any] | None = [dict(tool) for tool in tools] or None
    specials: dict[str, Any] = tokenizer.special_tokens_map
    # Not `apply_chat_template`: it removes fields that are None, and a template can test for None.
    texts, _ = guarded(
        lambda: render_jinja_template(
            [list(messages)],
            tools=schemas,
            chat_template=template,
            add_generation_prompt=prompt,
            **specials,
        )
    )
    return str(texts[0])


def guarded(act: Callable[[], Any]) -> Any:
    """Return what `act` returns. Raises MisfitError for the errors of templates."""
    try:
        return act()
    except _TEMPLATE_ERRORS as error:
        raise MisfitError(f"the chat template refuses the conversation: {error}") from error


def common_prefix(a: str, b: str) -> int:
    """Return the length of the longest common start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a.startswith(b[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix(a: str, b: str) -> int:
    """Return the length of the longest common end."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a.endswith(b[len(b) - middle :]):
            low = middle
        else:
            high = middle - 1
    return low
