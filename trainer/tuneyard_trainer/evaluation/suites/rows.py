"""The rows of a suite's file as items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tuneyard.api.stage_settings import ChatSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.template_style import MisfitError
from tuneyard_trainer.data.prompts import Prompt, is_templated, prompt_text, with_system
from tuneyard_trainer.data.reading.example import RowError, check_encodable
from tuneyard_trainer.data.reading.rows import BrokenRow, Row, read_data
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN

T = TypeVar("T")
_MISFIT = (
    "The chat template must take them: set chatTemplate of the job's data to one that does, or "
    "take the suite out of spec.evaluate.suites."
)


def read_items(
    path: Path,
    parse: Callable[[Mapping[str, Any]], T],
    limit: int | None,
    field: str,
    expected: str,
) -> dict[str, T]:
    """Return the items of a file's first `limit` rows, by file and row. None: of all rows.

    `parse`: returns a row's item or raises RowError. `field`: the file's field in the manifest.
    `expected`: the columns that a row should have. Raises StageError InvalidData, which names the
    first rows that hold no item, EmptyData, and those of `read_data`.
    """
    items: dict[str, T] = {}
    faults: list[str] = []
    for row in islice(read_data(path), limit):
        where = f"{row.file} row {row.number}".strip()
        try:
            items[where] = parse(_columns(row))
        except RowError as error:
            faults.append(f"{where}: {error}")
    _refuse(faults, len(faults) + len(items), field, f"Each needs {expected}.")
    if not items:
        raise StageError(
            "EmptyData", f"{field} holds no rows.", advice=f"Put rows into it, or correct {field}."
        )
    return items


def prompt_texts(
    prompts: Mapping[str, Prompt],
    tokenizer: Any,
    chat: ChatSettings,
    room: int | None,
    field: str,
) -> list[str]:
    """Return what a model continues, of each prompt, by its file and row.

    `room`: the most tokens of a prompt. None: any number. Raises StageError InvalidData for prompts
    that the chat template refuses or that are longer.
    """
    texts: list[str] = []
    faults: list[str] = []
    advice = "Shorten the prompts, or the longest answer."
    special = not is_templated(tokenizer, chat)
    for where, prompt in prompts.items():
        try:
            text = prompt_text(with_system(prompt, chat.system_prompt), tokenizer, chat)
        except MisfitError as error:
            faults.append(f"{where}: {error}")
            advice = _MISFIT
            continue
        tokens = len(tokenizer(text, add_special_tokens=special)["input_ids"])
        if room is not None and tokens > room:
            faults.append(
                f"{where}: the prompt has {tokens} tokens, and beside the answer the model's "
                f"context has room for {max(0, room)}"
            )
        texts.append(text)
    _refuse(faults, len(prompts), field, advice)
    return texts


def _refuse(faults: Sequence[str], rows: int, field: str, advice: str) -> None:
    """Raise StageError InvalidData if there are faults of rows."""
    if faults:
        raise StageError(
            "InvalidData",
            f"{field}: {len(faults)} of {rows} rows are no items of this suite. "
            f"{'; '.join(faults[:FAULTS_SHOWN])}.",
            advice=f"Repair these rows. {advice}",
        )


def text_of(row: Mapping[str, Any], *names: str) -> str | None:
    """Return the first of these columns that holds a text. None: none of them does."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return None


def _columns(row: Row) -> Mapping[str, Any]:
    if isinstance(row.value, BrokenRow):
        raise RowError(row.value.reason, row.value.fault)
    check_encodable(*_texts(row.value))
    return row.value


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value, with the names of columns."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def unfit(row: Mapping[str, Any], expected: str) -> RowError:
    """Return the error of a row whose columns fit nothing that is expected."""
    return RowError(f"the row has {', '.join(row) or 'no fields'}; expected: {expected}")
