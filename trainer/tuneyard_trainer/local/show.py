"""`tuneyard data show`: the first rows of a file as they are read, or as they are trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.encoding.masks import Run, runs
from tuneyard_trainer.data.encoding.tokenization import Encoder, Misfit
from tuneyard_trainer.data.reading.conversations import template_turns, turn_text
from tuneyard_trainer.data.reading.example import Example, RowError
from tuneyard_trainer.data.reading.rows import read_data
from tuneyard_trainer.data.reading.stream import Examples, examples
from tuneyard_trainer.local.feedback_log import FeedbackLog, is_log
from tuneyard_trainer.local.models import model_folder
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.preference.rows import are_rated, parse_preferences, rates_one
from tuneyard_trainer.reporting.formatting import harmless


@dataclass(frozen=True)
class Sample:
    """One row."""

    title: str
    parts: list[Run]
    """Its text, with the targets marked."""

    @classmethod
    def of(cls, title: str, parts: list[Run]) -> Sample:
        """Return a sample whose text cannot control a terminal."""
        return cls(harmless(title), [Run(harmless(part.text), part.trained) for part in parts])


TrainOn = Literal["assistant", "last-assistant", "all"]


class View(NamedTuple):
    """How rows are read and shown, by the manifest's fields of the same names."""

    format: DataFormat
    fields: FieldMap
    train_on: TrainOn
    reasoning: bool
    """Whether the assistant's reasoning is shown."""


def samples(file: Path, count: int, model: str | None, view: View) -> Iterator[Sample]:
    """Yield the first rows. Raises StageError.

    `model`: a folder or a URI with a tokenizer, by whose chat template rows are rendered. None: the
    turns are shown, with those of the assistant as targets.
    """
    encoder = None
    if model is not None:
        tokenizer = load_tokenizer(model_folder(model))
        encoder = Encoder(tokenizer, view.train_on, reasoning=view.reasoning)
    stream: Examples | None = None
    if is_log(file, view.format, view.fields):
        log = FeedbackLog(file, view.fields)
        deque(log.uses(), maxlen=0)  # counts all of it
        yield Sample.of(log.sentence, [])
        rows = _answers(FeedbackLog(file, view.fields))
    elif are_rated(file, view.format, view.fields):
        rows = _rated(file, view.format, view.fields)
    else:
        settings = DatasetSettings(format=view.format, fields=view.fields, weight=1.0, limit=None)
        stream = examples(file, settings, on_invalid="skip", name=str(file))
        rows = _plain(stream)
    for title, example in islice(rows, count):
        if encoder is None:
            yield Sample.of(title, _turns(example, view))
            continue
        (encoded,) = encoder.encode([example])
        if isinstance(encoded, Misfit):
            yield Sample.of(f"{title}: {encoded.message}", [])
        else:
            yield Sample.of(
                f"{title}: {int(encoded.mask.sum())} of {len(encoded.ids)} tokens are trained on",
                runs(encoder.tokenizer, encoded),
            )
    if stream is not None and stream.summary.skipped:
        found = stream.summary
        left_out = f"{found.skipped} of the first {found.rows} rows are invalid and left out"
        yield Sample.of(f"{left_out}: {'; '.join(map(str, found.faults))}", [])


def _plain(stream: Examples) -> Iterator[tuple[str, Example]]:
    """Yield each row to train on with its title."""
    for example in stream:
        yield f"{example.file} row {example.row} ({stream.summary.format})", example


def _rated(file: Path, chosen: DataFormat, fields: FieldMap) -> Iterator[tuple[str, Example]]:
    """Yield each completion of preferences with its title."""
    for row in read_data(file):
        try:
            labeled = rates_one(row, fields)
            found = parse_preferences(row, fields, labeled=labeled, chosen=chosen)
        except RowError as error:
            where = f"{row.file} row {row.number}"
            raise StageError("InvalidPreferences", f"{where}: {error}") from error
        for preference in found:
            for number, example in enumerate(preference.examples, start=1):
                place = f"{number} of {len(preference.completions)}"
                yield f"{row.file} row {row.number}, completion {place}", example


def _answers(log: FeedbackLog) -> Iterator[tuple[str, Example]]:
    """Yield each text of a log with its title."""
    for row, uses in log.uses():
        for use, example in uses.examples():
            yield f"{row.file} row {row.number} (feedback), {use}", example


def _turns(example: Example, view: View) -> list[Run]:
    if example.kind == "text":
        return [Run(example.text, trained=True)]
    answers = [i for i, turn in enumerate(example.messages) if turn.role == "assistant"]
    by_job = answers if view.train_on != "last-assistant" else answers[-1:]
    parts = []
    for index, turn in enumerate(example.messages):
        by_row = turn.train if turn.train is not None else index in by_job
        trained = view.train_on == "all" or (turn.role == "assistant" and by_row)
        parts += [Run(f"{turn.role}: ", trained=False)]
        if turn.reasoning and view.reasoning:
            parts += [Run(f"<{turn.reasoning}> ", trained)]
        (shown,) = template_turns([turn], reasoning=view.reasoning)
        parts += [Run(turn_text(shown) + "\n", trained)]
    return parts
