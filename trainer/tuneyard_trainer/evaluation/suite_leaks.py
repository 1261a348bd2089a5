"""leaks: search the items of suites in the training data, before anything is trained.

The training data is the rows of fine-tuning, preferences with all of their completions, and prompts
that completions are sampled for. The stage reads their files again, so that the prepared data and
its record stay as they are when a suite is added. Each row is searched as a whole, and each of its
turns alone: a suite has short questions, which a row with an answer is not like.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import (
    ChatSettings,
    DatasetSettings,
    LeaksSettings,
    PromptSettings,
)
from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.text import as_written, passages, said
from tuneyard_trainer.data.leaks import find_leaks
from tuneyard_trainer.data.prompts import read_prompts
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.example import Example, RowError
from tuneyard_trainer.data.reading.rows import read_data
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN, examples
from tuneyard_trainer.data.texts import Texts
from tuneyard_trainer.evaluation.suites.texts import KINDS, item_texts
from tuneyard_trainer.preference.rows import parse_preferences, rates_one
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome

FOUND = "leaks.json"
_SPOOL = "spool"
_REPORTED_ROWS = 10_000
"""Rows between two reports."""
_NO_CHAT = ChatSettings(system_prompt=None, chat_template=None)

Searched = Iterator[tuple[str, list[dict[str, Any]]]]
"""The file and the row of each row, and its texts: the whole, and the parts."""


def run(context: StageContext) -> StageOutcome:
    """Write `leaks.json`: the items of suites whose text is in the training data.

    Raises StageError DataLeak if there are any and the job refuses them, and those of rows that
    cannot be read.
    """
    spool = context.workdir / _SPOOL
    shutil.rmtree(spool, ignore_errors=True)
    try:
        return _search(context, spool)
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _search(context: StageContext, spool: Path) -> StageOutcome:
    settings = context.settings(LeaksSettings)
    items, names = _items(context, settings, spool / "items.jsonl")
    rows = _Rows(Texts(spool / "train.jsonl"))
    with rows.texts:
        for name, source in _training_data(context, settings):
            for row, (where, texts) in enumerate(source):
                if not row % _REPORTED_ROWS:
                    _check_stop(context, row, name)
                rows.add(f"{name} {where}", texts)
    found = find_leaks(items, rows.texts, np.ones(len(rows.texts), np.bool_))
    shown = [
        {
            "item": names[leak.held_out],
            "training": rows.place(leak.training),
            "kind": leak.kind,
            "span": leak.span,
            "spanWords": leak.span_words,
            "itemWords": leak.row_words,
        }
        for leak in found.shown
    ]
    leaks = {"checked": found.checked, "items": found.rows, "examples": shown}
    if found.rows:
        _tell(context, leaks, fails=settings.leaks == "error")
    (context.workdir / FOUND).write_text(json.dumps(leaks, indent=2, ensure_ascii=False) + "\n")
    metrics = {"searchedItems": float(found.checked), "leakedItems": float(found.rows)}
    return StageOutcome(metrics, {"leaks": leaks}, contents=(FOUND,))


def _tell(context: StageContext, leaks: Mapping[str, Any], *, fails: bool) -> None:
    """Report the leaks. Raises StageError if the job fails on them."""
    first = "; ".join(
        f"{leak['item']} is in {leak['training']} with {leak['spanWords']} of its "
        f"{leak['itemWords']} words in sequence: {leak['span']}"
        for leak in leaks["examples"][:FAULTS_SHOWN]
    )
    message = (
        f"{leaks['items']} of {leaks['checked']} items of suites have text that is also in the "
        f"training data. {first}"
    )
    if fails:
        raise StageError(
            "DataLeak",
            message,
            advice="Remove these rows from the training data or from the suite, or set "
            f"{_policy(context)}: warn.",
        )
    context.worker.report(message=message)


def _items(context: StageContext, settings: LeaksSettings, path: Path) -> tuple[Texts, list[str]]:
    """Return the texts of the items of all suites, and the suite and the row of each."""
    texts, names = Texts(path), []
    with texts:
        for number, suite in enumerate(settings.suites):
            role = f"suite.{number}"
            if suite.kind not in KINDS:
                continue  # a task: its documents are the harness's
            for where, text in item_texts(suite, context.inputs[role], _name(context, role)):
                texts.append({"text": text})
                names.append(f"the suite {suite.name}, {where}")
    return texts, names


def _policy(context: StageContext) -> str:
    """Return the field in the manifest that decides about leaks."""
    aligns = context.worker.manifest.get("kind") == "AlignmentJob"
    return "spec.leaks" if aligns else "spec.data.leaks"


# ---- training data ------------------------------------------------------------------------------


def _training_data(
    context: StageContext, settings: LeaksSettings
) -> Iterator[tuple[str, Searched]]:
    """Yield the field and the rows of each data set. Invalid rows are left out: the stages that
    train on them report them. Raises StageError InvalidData for an invalid prompt."""
    for number, dataset in enumerate(settings.train):
        path, name = _place(context, f"train.{number}")
        yield name, _rows(path, dataset, name)
    for number, dataset in enumerate(settings.preferences or ()):
        path, name = _place(context, f"preferences.{number}")
        yield name, _preferences(path, dataset)
    for number, prompts in enumerate(settings.prompts or ()):
        path, name = _place(context, f"prompts.{number}")
        yield name, _prompts(path, prompts, name)


def _place(context: StageContext, role: str) -> tuple[Path, str]:
    return context.inputs[role], _name(context, role)


def _rows(path: Path, dataset: DatasetSettings, name: str) -> Searched:
    """Yield the rows of fine-tuning."""
    for example in examples(path, dataset, on_invalid="skip", name=name):
        parts = [{"text": each} for each in passages(example)]
        yield _where(example), [as_written(example), *_several(parts)]


def _preferences(path: Path, dataset: DatasetSettings) -> Searched:
    """Yield preferences: the prompt with each of the completions."""
    rows = islice(read_data(path), dataset.limit)
    for row in layouts.joined(rows, dataset.format, dataset.fields):
        rates_single = rates_one(row, dataset.fields)
        try:
            found = parse_preferences(
                row, dataset.fields, labeled=rates_single, chosen=dataset.format
            )
        except RowError:
            continue
        for preference in found:
            wholes = preference.examples
            texts = dict.fromkeys(text for each in wholes for text in passages(each))
            parts = [{"text": text} for text in texts]
            yield _where(wholes[0]), [*map(as_written, wholes), *_several(parts)]


def _prompts(path: Path, settings: PromptSettings, name: str) -> Searched:
    """Yield prompts."""
    for prompt in read_prompts(path, settings, _NO_CHAT, name=name):
        parts = [{"text": said(turn)} for turn in prompt.messages if turn["role"] != "system"]
        yield prompt.where, [{"messages": list(prompt.messages)}, *_several(parts)]


def _where(example: Example) -> str:
    return f"{example.file} row {example.row}".strip()


def _several(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts of a row. []: there is one, which is the whole."""
    return parts if len(parts) > 1 else []


@dataclass
class _Rows:
    """Training rows as texts, and their places. Memory holds 20 bytes for a text."""

    texts: Texts
    _names: list[str] = field(default_factory=list)
    """Data sets with their files."""
    _files: array[int] = field(default_factory=lambda: array("i"))
    _numbers: array[int] = field(default_factory=lambda: array("q"))
    _known: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, texts: list[dict[str, Any]]) -> None:
        """Add the texts of a row. `where`: the data set, the file and, last, the row's number."""
        name, _, number = where.rpartition(" ")
        if name not in self._known:
            self._known[name] = len(self._names)
            self._names.append(name)
        for text in texts:
            self.texts.append(text)
            self._files.append(self._known[name])
            self._numbers.append(int(number))

    def place(self, text: int) -> str:
        """Return the data set, the file and the row of a text."""
        return f"{self._names[self._files[text]]} {self._numbers[text]}"


def _name(context: StageContext, role: str) -> str:
    """Return an input's field in the manifest."""
    source = context.stage.inputs.get(role)
    return source.path.removesuffix(".uri") if isinstance(source, SourceInput) else role


def _check_stop(context: StageContext, rows: int, name: str) -> None:
    context.worker.report(step=rows, message=f"searching {name}")
    if context.worker.stop():
        raise Interrupted(context.stage.name, rows)
