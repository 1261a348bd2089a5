"""Prompt sets: the prompts of data sets of any known format, without their answers.

A prompt is a conversation that ends with the user's turn. A row may hold an answer, which is
ignored, or a field `prompt` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.api.stage_settings import ChatSettings, DatasetSettings, PromptSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.chat import rendered, transcript
from tuneyard_trainer.data.encoding.template_style import MisfitError
from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.data.reading import feedback, layouts, readers
from tuneyard_trainer.data.reading.conversations import Message, template_turns
from tuneyard_trainer.data.reading.example import Message as Turn
from tuneyard_trainer.data.reading.example import RowError, check_turns
from tuneyard_trainer.data.reading.readers import Names
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, read_data
from tuneyard_trainer.data.reading.stream import DETECTED_FROM, FAULTS_SHOWN, examples
from tuneyard_trainer.data.reading.turns import dialogue, side


@dataclass(frozen=True)
class Prompt:
    """One conversation to complete."""

    messages: tuple[Message, ...]
    """An optional system turn, then alternating turns of user and assistant. The last turn is the
    user's."""
    where: str
    """File and row, for messages."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row's fields, for rewards that compare a completion with one of them."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools that the completion may call."""

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and the token ids that the policy continues."""

    prompt: Prompt
    ids: tuple[int, ...]


def read_prompts(
    path: Path, settings: PromptSettings, chat: ChatSettings, *, name: str
) -> list[Prompt]:
    """Return every prompt of a set, in order. Rows without a system turn get the job's.

    `name`: the set's field in the manifest. Raises StageError EmptyData, InvalidData,
    UnknownFormat, UnknownFileType.
    """
    layout = _layout(path, settings)
    if layout == "openassistant":
        prompts = _of_examples(path, settings, name)
    elif layout == "feedback":
        events = feedback.prompts(
            islice(read_data(path), settings.limit), Names(feedback.COLUMNS, settings.fields)
        )
        prompts = _distinct(_of_rows(events, settings, name))
    else:
        prompts = _of_rows(islice(read_data(path), settings.limit), settings, name)
    if not prompts:
        raise StageError(
            "EmptyData", f"{name} holds no prompts.", advice=f"Put rows into it, or change {name}."
        )
    return [with_system(prompt, chat.system_prompt) for prompt in prompts]


def is_templated(tokenizer: PreTrainedTokenizerBase, chat: ChatSettings) -> bool:
    """Return whether a chat template renders prompts, special tokens included."""
    return bool(chat.chat_template or tokenizer.chat_template)


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat: ChatSettings) -> str:
    """Return the prompt rendered by the chat template, or its `transcript` if there is no template.
    Raises MisfitError if the chat template refuses the conversation."""
    if not is_templated(tokenizer, chat):
        return transcript(prompt.messages)
    return rendered(tokenizer, prompt.messages, template=chat.chat_template, tools=prompt.tools)


def tokenize(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat: ChatSettings
) -> TokenizedPrompt | None:
    """Return the prompt with the ids that the policy continues. None: the chat template refuses
    the conversation."""
    try:
        text = prompt_text(prompt, tokenizer, chat)
    except MisfitError:
        return None
    plain = not is_templated(tokenizer, chat)
    return TokenizedPrompt(prompt, tuple(tokenizer(text, add_special_tokens=plain)["input_ids"]))


def completed_rows(
    prompts: Sequence[TokenizedPrompt], completions: Sequence[Sequence[int]]
) -> Rows:
    """Return prompts, at least one, with their completions, whose tokens are the targets."""
    pairs = list(zip([prompt.ids for prompt in prompts], completions, strict=True))
    return Rows.of(
        [[*prompt, *completion] for prompt, completion in pairs],
        [[0] * len(prompt) + [1] * len(completion) for prompt, completion in pairs],
    )


def _of_examples(path: Path, settings: PromptSettings, name: str) -> list[Prompt]:
    dataset = DatasetSettings(
        format="openassistant", fields=settings.fields, weight=1.0, limit=settings.limit
    )
    return [
        Prompt(
            tuple(template_turns(example.messages[:-1], reasoning=settings.reasoning != "drop")),
            f"{example.file} row {example.row}".strip(),
        )
        for example in examples(path, dataset, on_invalid="skip", name=name)
    ]


def _layout(path: Path, settings: PromptSettings) -> DataFormat:
    """Return the layout that is named or detected; auto: the rows may hold prompts alone, which no
    layout covers."""
    if settings.format != "auto":
        return settings.format
    try:
        return layouts.detect(list(islice(read_data(path), DETECTED_FROM)), settings.fields)
    except StageError:
        return "auto"


def _distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return each prompt once, as it is first asked."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(repr((prompt.messages, prompt.tools)), prompt)
    return list(found.values())


def _of_rows(rows: Iterable[Row], settings: PromptSettings, name: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    faults: list[str] = []
    names = Names(layouts.PROMPTS, settings.fields)
    for row in rows:
        where = f"{row.file} row {row.number}".strip()
        try:
            turns, tools = _turns(row, names, reasoning=settings.reasoning != "drop")
        except RowError as error:
            faults.append(f"{where}: {error}")
        else:
            value = row.value if isinstance(row.value, dict) else {}
            prompts.append(Prompt(turns, where, value, tools))
    if faults:
        raise StageError(
            "InvalidData",
            f"{name}: {len(faults)} of {len(faults) + len(prompts)} rows hold no valid prompt. "
            f"{'; '.join(faults[:FAULTS_SHOWN])}.",
            advice=f"Repair these rows, or name the field beside {name}: fields: {{prompt: ...}}.",
        )
    return prompts


# ---- one row ----------------------------------------------------------------------------------


def _turns(
    row: Row, names: Names, *, reasoning: bool
) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
    """Return the row's turns up to the last one of the user, and its tools. Raises RowError."""
    if isinstance(row.value, BrokenRow):
        raise RowError(row.value.reason, row.value.fault)
    return prompt_turns(row.value, names, reasoning=reasoning)


def prompt_turns(
    value: Mapping[str, Any], names: Names | None = None, *, reasoning: bool = True
) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
    """Return the turns of a row's columns up to the last one of the user, and its tools.

    `names`: the columns. None: those of the published layouts. `reasoning`: whether that of
    earlier answers is kept. Raises RowError.
    """
    found, tools = _row_turns(value, names or Names(layouts.PROMPTS, FieldMap()))
    while found and found[-1].role != "user":
        found.pop()
    if not found:
        raise RowError(f"no turn is by a user; the row has {', '.join(value) or 'no fields'}")
    check_turns(found)
    return tuple(template_turns(found, reasoning=reasoning)), tools


def _row_turns(
    value: Mapping[str, Any], names: Names
) -> tuple[list[Turn], tuple[Mapping[str, Any], ...]]:
    found, tools = readers.prompt(value, names, turns_first=True)
    if found:
        return list(found), tools
    text = names.value("text", value)
    if isinstance(text, str):
        given = readers.input_text(value, names.of("input", value)) if names.maps("input") else ""
        return [Turn("user", readers.with_input(text, given))], tools
    chosen = names.value("chosen", value)  # preferences whose sides hold the prompt
    if isinstance(chosen, str) and not dialogue(chosen):
        asked = readers.beginning(value, names).strip()
        return [Turn("user", asked)] if asked else [], tools
    return (side(chosen, "chosen", "assistant") if chosen is not None else []), tools


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """Return a prompt with a system turn if it has none. None: as it is."""
    if system is None or prompt.messages[0]["role"] == "system":
        return prompt
    return replace(prompt, messages=(_message("system", system), *prompt.messages))


def as_text(messages: Sequence[Message]) -> str:
    """Return the conversation as text. Several turns each begin with their role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)
