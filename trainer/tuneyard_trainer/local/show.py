"""`tuneyard data show`: the first rows of a file as they are read, or as they are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from tuneyard.api.plan import SourceInput
from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data import layouts
from tuneyard_trainer.data.example import Example, RowError
from tuneyard_trainer.data.masks import Run, runs
from tuneyard_trainer.data.rows import Row, read_data
from tuneyard_trainer.data.stream import (
    DETECTED_FROM,
    FAULTS_SHOWN,
    examples,
    read_examples,
)
from tuneyard_trainer.data.tokenization import Encoder, Misfit
from tuneyard_trainer.local.run import cache_folder
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.gguf_unpack import unpacked
from tuneyard_trainer.preference.rows import parse_preferences
from tuneyard_trainer.reporting.formatting import harmless
from tuneyard_trainer.storage import sources


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


def samples(
    file: Path, count: int, model: str | None, chosen: DataFormat, train_on: TrainOn
) -> Iterator[Sample]:
    """Yield the first rows. Raises StageError.

    `model`: a folder or a URI with a tokenizer, by whose chat template rows are rendered. None: the
    turns are shown, with those of the assistant as targets.
    """
    encoder = None if model is None else Encoder(load_tokenizer(_folder(model)), train_on)
    rows = _rows(file, chosen)
    if _is_log(file, chosen):
        yield Sample.of(_log_summary(file), [])
        rows = (
            (f"{row.file} row {row.number} (feedback), {use}", example)
            for row, found in _log_rows(file)
            if not isinstance(found, RowError)
            for use, example in found
        )
    for title, example in islice(rows, count):
        if encoder is None:
            yield Sample.of(title, _turns(example, train_on))
            continue
        (encoded,) = encoder.encode([example])
        if isinstance(encoded, Misfit):
            yield Sample.of(f"{title}: {encoded.message}", [])
        else:
            yield Sample.of(
                f"{title}: {int(encoded.mask.sum())} of {len(encoded.ids)} tokens are trained on",
                runs(encoder.tokenizer, encoded),
            )


def _folder(model: str) -> Path:
    if "://" not in model:
        return Path(model)
    cache = cache_folder()
    source = SourceInput(uri=model, path="--model")
    path = sources.fetch(source, base_dir=Path.cwd(), cache_dir=cache, kind="model")
    return unpacked(path, cache) if path.suffix.lower() == ".gguf" else path


def _rows(file: Path, chosen: DataFormat) -> Iterator[tuple[str, Example]]:
    """Yield each example with its title: of preferences, one for each completion."""
    first = next(iter(read_data(file)), None)
    value = first.value if first is not None and isinstance(first.value, dict) else {}
    rated = chosen if chosen in ("preference", "ranking", "labeled") else "auto"
    layout = layouts.match(value, "preferences", FieldMap())
    if rated != "auto" or (chosen == "auto" and layout is not None and _only_rated(value)):
        yield from _rated(file, rated)
        return
    settings = DatasetSettings(format=chosen, fields=FieldMap(), weight=1.0, limit=None)
    stream = examples(file, settings, on_invalid="skip", name=str(file))
    for example in stream:
        yield f"{example.file} row {example.row} ({stream.summary.format})", example


def _only_rated(value: dict[str, object]) -> bool:
    return layouts.match(value, "training", FieldMap()) is None


def _rated(file: Path, chosen: DataFormat) -> Iterator[tuple[str, Example]]:
    for row in read_data(file):
        try:
            found = parse_preferences(row, FieldMap(), labeled=_rates_one(row), chosen=chosen)
        except RowError as error:
            where = f"{row.file} row {row.number}"
            raise StageError("InvalidPreferences", f"{where}: {error}") from error
        for preference in found:
            for number, example in enumerate(preference.examples, start=1):
                place = f"{number} of {len(preference.completions)}"
                yield f"{row.file} row {row.number}, completion {place}", example


def _rates_one(row: Row) -> bool:
    """Return whether a row rates a single completion."""
    value = row.value if isinstance(row.value, dict) else {}
    layout = layouts.match(value, "preferences", FieldMap())
    return layout is not None and layout.name == "labeled"


# ---- feedback logs ----------------------------------------------------------------------------


def _is_log(file: Path, chosen: DataFormat) -> bool:
    if chosen != "auto":
        return chosen == "feedback"
    head = [row.value for row in islice(read_data(file), DETECTED_FROM)]
    values = (value for value in head if isinstance(value, dict))
    return any(_LOG.matches(value, FieldMap()) for value in values)


_LOG = layouts.layout_of("feedback", "training", FieldMap())
_NAMES = _LOG.names(FieldMap())


def _log_rows(file: Path) -> Iterator[tuple[Row, list[tuple[str, Example]] | RowError]]:
    """Yield each answer of a log with what it becomes, and each invalid row with its fault."""
    for row in layouts.joined(read_data(file), "feedback", FieldMap()):
        try:
            yield row, list(_uses(row))
        except RowError as error:
            yield row, error


def _uses(row: Row) -> Iterator[tuple[str, Example]]:
    """Yield the examples that an answer becomes, each with its use. Raises RowError."""
    for example in read_examples(row, _LOG, _NAMES):
        yield "conversation", example
    for pair in parse_preferences(row, FieldMap(), labeled=False, chosen="feedback"):
        for use, example in zip(("chosen", "rejected"), pair.examples, strict=True):
            yield use, example
    for single in parse_preferences(row, FieldMap(), labeled=True, chosen="feedback"):
        yield f"label {'good' if single.label else 'bad'}", single.examples[0]


def _log_summary(file: Path) -> str:
    """Return what a log becomes, and its first invalid rows."""
    answers = 0
    uses: Counter[str] = Counter()
    faults: list[str] = []
    for row, found in _log_rows(file):
        if isinstance(found, RowError):
            faults.append(f"{row.file} row {row.number}: {found}")
        else:
            answers += 1
            uses.update(use for use, _ in found)
    labels = uses["label good"], uses["label bad"]
    summary = (
        f"{file.name}: {answers} answers of a feedback log become {uses['conversation']} "
        f"conversations for sft, {uses['chosen']} pairs, and {sum(labels)} labeled completions "
        f"({labels[0]} good, {labels[1]} bad)"
    )
    if not faults:
        return summary
    return f"{summary}; invalid rows: {len(faults)}: {'; '.join(faults[:FAULTS_SHOWN])}"


def _turns(example: Example, train_on: TrainOn) -> list[Run]:
    if example.kind == "text":
        return [Run(example.text, trained=True)]
    answers = [i for i, turn in enumerate(example.messages) if turn.role == "assistant"]
    by_job = answers if train_on != "last-assistant" else answers[-1:]
    parts = []
    for index, turn in enumerate(example.messages):
        by_row = turn.train if turn.train is not None else index in by_job
        trained = train_on == "all" or (turn.role == "assistant" and by_row)
        parts += [Run(f"{turn.role}: ", trained=False)]
        if turn.reasoning:
            parts += [Run(f"<{turn.reasoning}> ", trained)]
        parts += [Run(turn.text + "\n", trained)]
    return parts
