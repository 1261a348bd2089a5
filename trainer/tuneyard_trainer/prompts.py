"""What a policy answers: the prompts of a data set, rendered and tokenized as the policy sees them.

Rows of every format will do, with or without answers: an answer is never looked at. A row without
one is read as if it had one, so that formats, field names and checks are those of `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tuneyard.api.plan import ChatSettings, PromptSettings
from tuneyard.api.sources import FieldMap
from tuneyard.errors import StageError
from tuneyard_trainer.chat import Message
from tuneyard_trainer.datasets import BrokenRow, Example, Row, data_files, detect, read_rows
from tuneyard_trainer.datasets.example import RowError
from tuneyard_trainer.datasets.formats import Names
from tuneyard_trainer.datasets.reading import link_messages, read
from tuneyard_trainer.datasets.stream import DETECTED_FROM
from tuneyard_trainer.tokenization import Encoder

ANSWER = "?"
"""Stands where an answer is missing; never rendered."""
FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Prompt:
    """One thing to answer."""

    text: str
    """As the policy reads it: the chat template's rendering up to the answer, or plain text."""
    ids: tuple[int, ...]
    """`text` as tokens, with those that the tokenizer puts before a plain text."""
    messages: tuple[Message, ...] = ()
    """The turns that were rendered; () of plain text."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row as it was in the file: what rules look up."""
    number: int = 0
    """The row's number in its file, from 1."""


def read_prompts(
    path: Path,
    settings: PromptSettings,
    chat: ChatSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    name: str = "prompts",
) -> list[Prompt]:
    """The prompts, in the file's order. `tokenizer`: the policy's; its chat template is replaced by
    `chat`'s in what is rendered here. `max_length`: the most tokens of a prompt.

    `name` is the field's name in the manifest, for messages. Raises StageError EmptyData,
    InvalidData, PromptTooLong, ChatTemplate or what `datasets` raises.
    """
    encoder = Encoder(tokenizer, "last-assistant", chat.system_prompt)
    prompts: list[Prompt] = []
    faults: list[str] = []
    for row, examples in _examples(path, settings, faults):
        for example in examples:
            try:
                prompts.append(_prompt(row, example, encoder, chat.chat_template))
            except Exception as error:  # a template may raise anything on a row it does not fit
                faults.append(f"{row.file} row {row.number}: the chat template says: {error}")
    _check(prompts, faults, max_length, name)
    return prompts


def _examples(
    path: Path, settings: PromptSettings, faults: list[str]
) -> Iterator[tuple[Row, list[Example]]]:
    rows = [
        Row(row.number, _answered(row.value, settings.fields), file)
        for file, row in islice(_rows(path), settings.limit)
    ]
    if not rows:
        return
    head = [row for row in rows if not isinstance(row.value, BrokenRow)][:DETECTED_FROM]
    chosen = settings.format
    if chosen == "auto":
        chosen = detect(head, settings.fields)
    names = Names(chosen, settings.fields)
    for row in link_messages(rows) if chosen == "openassistant" else rows:
        try:
            yield row, read(row, chosen, names)
        except RowError as error:
            faults.append(f"{row.file} row {row.number}: {error}")


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    for name, file in data_files(path):
        for row in read_rows(file):
            yield name, row


def _answered(value: dict[str, Any] | BrokenRow, names: FieldMap) -> dict[str, Any] | BrokenRow:
    """The row with an answer where it has none."""
    if isinstance(value, BrokenRow):
        return value
    for prompt, completion in (
        (names.prompt or "prompt", names.completion or "completion"),
        ("instruction", "output"),
        ("inputs", "targets"),
    ):
        if value.get(prompt) is not None and value.get(completion) is None:
            if isinstance(value[prompt], dict) or "instances" in value:  # a tree, or Alpaca's seeds
                return value
            return value | {completion: ANSWER}
    for field_name in (names.messages or "messages", "conversations", "data"):
        turns = value.get(field_name)
        if isinstance(turns, list) and turns:
            return value | {field_name: [*turns, *_last_turn(turns)]}
    return value


def _last_turn(turns: Sequence[Any]) -> list[Any]:
    """The answer that is missing after `turns`; [] where none is."""
    last = turns[-1]
    if isinstance(last, str):
        return [ANSWER] if len(turns) % 2 else []
    if isinstance(last, dict) and last.get("role") in ("user", "tool"):
        return [{"role": "assistant", "content": ANSWER}]
    if isinstance(last, dict) and last.get("from") in ("human", "user"):
        return [{"from": "gpt", "value": ANSWER}]
    return []


def _prompt(row: Row, example: Example, encoder: Encoder, template: str | None) -> Prompt:
    tokenizer = encoder.tokenizer
    values = row.value if isinstance(row.value, dict) else {}
    turns = encoder.conversation(example)
    if turns is None and template and example.messages:
        turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
    if turns is None:
        text = example.prompt or example.text
        ids = tokenizer(text, add_special_tokens=True)["input_ids"]
        return Prompt(text, tuple(ids), (), values, row.number)
    asked = turns[:-1]
    text = tokenizer.apply_chat_template(
        asked, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(str(text), tuple(ids), tuple(asked), values, row.number)


def _check(
    prompts: Sequence[Prompt], faults: Sequence[str], max_length: int | None, name: str
) -> None:
    if faults:
        shown = "; ".join(faults[:FAULTS_SHOWN])
        raise StageError(
            "InvalidData",
            f"{name}: {len(faults)} rows hold no prompt. {shown}.",
            advice=f"Repair these rows, or set {name}.format or {name}.fields.",
        )
    if not prompts:
        raise StageError("EmptyData", f"{name} holds no rows.", advice=f"Put prompts into {name}.")
    long = [prompt for prompt in prompts if max_length and len(prompt.ids) > max_length]
    if long:
        longest = max(len(prompt.ids) for prompt in long)
        raise StageError(
            "PromptTooLong",
            f"{name}: {len(long)} of {len(prompts)} prompts leave no room for an answer in the "
            f"model's context: the longest (row {long[0].number} is the first) has {longest} "
            f"tokens, and {max_length} fit.",
            advice=f"Lower sampling.maxNewTokens, or take these rows out of {name}.",
        )
