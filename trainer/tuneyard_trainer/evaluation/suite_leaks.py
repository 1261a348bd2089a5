"""leaks: search the items of suites in the training rows, before anything is trained.

The stage reads the files of the training data again, so that the prepared data and its record stay
as they are when a suite is added. Each row is searched as a whole, and each of its turns alone: a
suite has short questions, which a row with an answer is not like.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import LeaksSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.text import as_written, passages
from tuneyard_trainer.data.leaks import find_leaks
from tuneyard_trainer.data.reading.example import Example
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN, examples
from tuneyard_trainer.data.texts import Texts
from tuneyard_trainer.evaluation.suites.texts import KINDS, item_texts
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome

FOUND = "leaks.json"
_SPOOL = "spool"
_REPORTED_ROWS = 10_000
"""Rows between two reports."""


def run(context: StageContext) -> StageOutcome:
    """Write `leaks.json`: the items of suites whose text is in the training rows.

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
        for number, dataset in enumerate(settings.train):
            role = f"train.{number}"
            name = _name(context, role)
            stream = examples(context.inputs[role], dataset, on_invalid="skip", name=name)
            for row, example in enumerate(stream):
                if not row % _REPORTED_ROWS:
                    _check_stop(context, row, name)
                rows.add(example, name)
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
            "spec.data.leaks: warn.",
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


@dataclass
class _Rows:
    """Training rows as texts, and their places. Memory holds 20 bytes for a text."""

    texts: Texts
    _names: list[str] = field(default_factory=list)
    """Data sets with their files."""
    _files: array[int] = field(default_factory=lambda: array("i"))
    _numbers: array[int] = field(default_factory=lambda: array("q"))
    _known: dict[str, int] = field(default_factory=dict)

    def add(self, example: Example, dataset: str) -> None:
        """Add a row and its passages."""
        name = f"{dataset} {example.file}".strip()
        if name not in self._known:
            self._known[name] = len(self._names)
            self._names.append(name)
        for text in (as_written(example), *_passages(example)):
            self.texts.append(text)
            self._files.append(self._known[name])
            self._numbers.append(example.row)

    def place(self, text: int) -> str:
        """Return the data set, the file and the row of a text."""
        return f"{self._names[self._files[text]]} row {self._numbers[text]}"


def _passages(example: Example) -> Iterator[dict[str, Any]]:
    """Yield the texts that a row consists of, unless there is only one."""
    found = [*passages(example)]
    for text in found if len(found) > 1 else ():
        yield {"text": text}


def _name(context: StageContext, role: str) -> str:
    """Return an input's field in the manifest."""
    source = context.stage.inputs.get(role)
    return source.path.removesuffix(".uri") if isinstance(source, SourceInput) else role


def _check_stop(context: StageContext, rows: int, name: str) -> None:
    context.worker.report(step=rows, message=f"searching {name}")
    if context.worker.stop():
        raise Interrupted(context.stage.name, rows)
