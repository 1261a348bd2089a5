"""Chat templates in the manner of six families of models, and what the assistant writes in each.

`Family.writes` is written by hand from the published formats, and shares no code with the trainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tuneyard_trainer.data.reading.example import Message, ToolCall

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments}"
    " | tojson + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}{{ call.arguments | tojson }}'
    "{{ '}<|eot_id|>' }}{% elif m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
    "+ '<|eot_id|>' }}{% endif %}{% if loop.first and tools %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' + tools | tojson + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{% set loop_messages = messages %}{% set first = '' %}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in loop_messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in loop_messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 == ns.last and tools %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (first if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{% if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{% endif %}{{ {'name': call.function.name, 'arguments': call.function.arguments, "
    "'id': call.id} | tojson }}{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{% endif %}{{ '[TOOL_RESULTS] ' + {'content': m.content, 'call_id': m.tool_call_id} | tojson "
    "+ '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') }}{% for call in m.tool_calls or [] %}"
    "{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{% if call.function.arguments is string %}{{ call.function.arguments }}"
    "{% else %}{{ call.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (
    "{% set ns = namespace(tool=false, system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
    "{{ bos_token + ns.system }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.tool = false %}{{ '<|User|>' + m.content + '<|Assistant|>' }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is none %}{% set ns.tool = false %}"
    "{{ '<|calls_begin|>' }}{% for call in m.tool_calls %}"
    "{{ '<|call_begin|>' + call.type + '<|sep|>' + call.function.name + '\n```json\n' "
    "+ call.function.arguments + '\n```<|call_end|>' }}{% endfor %}"
    "{{ '<|calls_end|>' + eos_token }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is not none %}{% set ns.tool = false %}"
    "{{ m.content + eos_token }}{% endif %}"
    "{% if m.role == 'tool' %}{% set ns.tool = true %}"
    "{{ '<|output_begin|>' + m.content + '<|output_end|>' }}{% endif %}{% endfor %}"
)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _object(call: ToolCall) -> str:
    return _json({"name": call.name, "arguments": dict(call.arguments)})


def _hermes(message: Message) -> str:
    calls = [f"<tool_call>\n{_object(call)}\n</tool_call>" for call in message.calls]
    return "\n".join(filter(None, [message.content, *calls])) + "<|im_end|>"


def _chatml(turns: list[Message]) -> list[str]:
    return [_hermes(turn) for turn in turns if turn.role == "assistant"]


def _llama(turns: list[Message]) -> list[str]:
    return [
        f'{{"name": "{turn.calls[0].name}", "parameters": {_json(dict(turn.calls[0].arguments))}}}'
        "<|eot_id|>"
        if turn.calls
        else turn.content + "<|eot_id|>"
        for turn in turns
        if turn.role == "assistant"
    ]


def _gemma(turns: list[Message]) -> list[str]:
    return [turn.content + "<end_of_turn>" for turn in turns if turn.role == "assistant"]


def _mistral(turns: list[Message]) -> list[str]:
    written, number = [], 0
    for turn in turns:
        calls = []
        for call in turn.calls:
            number += 1
            value = {"name": call.name, "arguments": dict(call.arguments)}
            calls.append(_json({**value, "id": f"call{number:05}"}))
        if turn.role == "assistant":
            text = f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else f" {turn.content}"
            written.append(text + "<|im_end|>")
    return written


def _qwen(turns: list[Message]) -> list[str]:
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    written = []
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            thinks = i > last and (turn.reasoning or i == len(turns) - 1)
            thought = f"<think>\n{turn.reasoning}\n</think>\n\n" if thinks else ""
            written.append(thought + _hermes(turn))
    return written


def _deepseek(turns: list[Message]) -> list[str]:
    def text(call: ToolCall) -> str:
        arguments = _json(dict(call.arguments))
        return f"<|call_begin|>function<|sep|>{call.name}\n```json\n{arguments}\n```<|call_end|>"

    return [
        (
            "<|calls_begin|>" + "".join(map(text, turn.calls)) + "<|calls_end|>"
            if turn.calls
            else turn.content
        )
        + "<|im_end|>"
        for turn in turns
        if turn.role == "assistant"
    ]


@dataclass(frozen=True)
class Family:
    """A chat template, what its conversations may hold, and what the assistant writes."""

    template: str
    writes: Callable[[list[Message]], list[str]]
    """From the turns of a conversation to the text of each of the assistant's turns, up to and with
    the stop token."""
    specials: tuple[str, ...] = ()
    system: bool = True
    calls: int = 2
    """The most calls of a turn."""
    text_beside_calls: bool = False
    reasoning: bool = False


FAMILIES = {
    "chatml": Family(CHATML, _chatml, text_beside_calls=True),
    "llama": Family(
        LLAMA, _llama, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), calls=1
    ),
    "gemma": Family(
        GEMMA, _gemma, ("<start_of_turn>", "<end_of_turn>"), system=False, calls=0
    ),
    "mistral": Family(MISTRAL, _mistral),
    "qwen": Family(QWEN, _qwen, text_beside_calls=True, reasoning=True),
    "deepseek": Family(
        DEEPSEEK,
        _deepseek,
        ("<|User|>", "<|Assistant|>", "<|calls_begin|>", "<|calls_end|>", "<|call_begin|>",
         "<|call_end|>", "<|sep|>", "<|output_begin|>", "<|output_end|>"),
    ),
}  # fmt: skip
