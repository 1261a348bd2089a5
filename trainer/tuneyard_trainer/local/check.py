"""The faults and the statistics of a file of rows. Nothing here needs a model."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from tuneyard.api.cleaning import Clean, PersonalData
from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard_trainer.data.cleaning.cleaner import Cleaner
from tuneyard_trainer.data.cleaning.duplicates import Duplicates
from tuneyard_trainer.data.cleaning.findings import Finding, Findings
from tuneyard_trainer.data.cleaning.language import identifier, prose
from tuneyard_trainer.data.cleaning.text import as_written, conversation, written
from tuneyard_trainer.data.cleaning.words import words
from tuneyard_trainer.data.leaks import find_leaks
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.example import Example, RowError
from tuneyard_trainer.data.reading.rows import read_data
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN, Examples, RowFault, examples
from tuneyard_trainer.data.texts import Texts
from tuneyard_trainer.local.feedback_log import FeedbackLog, is_log
from tuneyard_trainer.local.rated import RatedRows
from tuneyard_trainer.preference.rows import are_rated, parse_preferences, rates_one
from tuneyard_trainer.preference.statistics import PreferenceStatistics
from tuneyard_trainer.reporting.preferences import statistic_lines

BATCH_ROWS = 512
LANGUAGES_SHOWN = 5
QUANTILES = (0.5, 0.9, 0.99)


class Fault(NamedTuple):
    """A kind of faults."""

    name: str
    rows: int
    of: int
    """The rows that were searched."""
    examples: list[str]
    """The first rows."""


class Report(NamedTuple):
    """The result of a check."""

    title: str
    faults: list[Fault]
    notes: list[str]
    """What was not checked, and why, and the columns that nothing reads."""


class RowProof(Protocol):
    """A further search of each row: `local.token_check` reads it as a model does."""

    def add(self, place: str, examples: Sequence[Example]) -> None:
        """Search a row. `examples`: the row, or each completion of a preference."""

    def faults(self) -> list[Fault]:
        """Return the faults of all rows."""

    def notes(self) -> list[str]:
        """Return what else is known of them."""


@dataclass
class _Rows:
    """The rows of a file, written as text once they are read."""

    texts: Texts
    rated: bool = False
    """Whether they are preferences."""
    format: str = ""
    read: int = 0
    """Rows of the file."""
    invalid: int = 0
    faults: tuple[RowFault, ...] = ()
    """The first invalid rows."""
    unread: tuple[str, ...] = ()
    """The columns that nothing reads."""
    absent: tuple[str, ...] = ()
    """The fields whose columns no row has."""
    places: list[str] = field(default_factory=list)


@dataclass
class _Search:
    """The searches in the rows of a file."""

    cleaner: Cleaner
    proof: RowProof | None
    findings: Findings = field(default_factory=Findings)
    duplicates: Duplicates = field(default_factory=lambda: Duplicates("near", None))

    def add(self, place: str, row: _Row) -> None:
        for finding in self.cleaner(row.whole).findings:
            self.findings.add(finding, place)
        if self.proof is not None:
            self.proof.add(place, row.examples)


class _Row(NamedTuple):
    """A row to search."""

    whole: Example
    """All of its text: of a preference, the prompt and all of its answers."""
    examples: Sequence[Example]
    """What it is trained on: of a preference, each answer with the prompt."""


def check_rows(
    file: Path,
    layout: DataFormat,
    fields: FieldMap,
    held_out: Path | None,
    proof: RowProof | None = None,
) -> Report:
    """Return the faults of a file's rows. Raises StageError if no row can be read.

    `held_out`: a file whose rows must not be in `file`. None: there is none. `proof`: what else is
    searched for. None: nothing.
    """
    has_ftfy = importlib.util.find_spec("ftfy") is not None
    cleaner = Cleaner.of(Clean(repair_encoding=has_ftfy, personal_data=PersonalData()))
    search = _Search(cleaner, proof)
    with tempfile.TemporaryDirectory() as folder:
        rows = _read(file, layout, fields, Path(folder) / "rows", search)
        # An edit is much like its answer, and the preferences of a tree share a prompt.
        related = rows.rated or rows.format == "feedback"
        for found in search.duplicates.found(rows.texts.__getitem__):
            if related and rows.places[found.row] == rows.places[found.of]:
                continue
            note = f"{found.similarity:.0%} as in {rows.places[found.of]}"
            text = written(rows.texts[found.row])[1]
            finding = Finding(f"duplicates.{found.kind}", "reported", text, note=note)
            search.findings.add(finding, rows.places[found.row])
        faults = [*_invalid(rows), *_found(search.findings, len(rows.texts))]
        if held_out is not None:
            others = _read(held_out, layout, fields, Path(folder) / "held-out")
            faults += _leaks(others, rows)
    title = f"{file}: {rows.read:,} rows of the layout {rows.format}"
    missing = "The character encoding was not checked: install tuneyard[cleaning]."
    notes = [] if has_ftfy else [missing]
    if rows.format == "feedback":
        notes.append("The answers and edits were searched, also those that nobody rated.")
    if rows.unread:
        notes.append(f"Nothing reads the columns {', '.join(rows.unread)}.")
    if rows.absent:
        notes.append(f"No row has the columns of {', '.join(rows.absent)}.")
    if proof is not None:
        faults += proof.faults()
        notes += proof.notes()
    return Report(title, faults, notes)


def is_rated(file: Path, layout: DataFormat, fields: FieldMap) -> bool:
    """Return whether a file holds preferences, and not the log from which they are made."""
    return not is_log(file, layout, fields) and are_rated(file, layout, fields)


def _read(
    file: Path, layout: DataFormat, fields: FieldMap, copy: Path, search: _Search | None = None
) -> _Rows:
    """Read a file's rows into `copy`. None: they are not searched."""
    rows = _Rows(Texts(copy), is_rated(file, layout, fields))
    source = (_rated if rows.rated else _plain)(rows, file, layout, fields)
    batch: list[dict[str, object]] = []
    with rows.texts:
        for row in source:
            rows.places.append(f"{row.whole.file} row {row.whole.row}".strip())
            text = as_written(row.whole)
            rows.texts.append(text)
            if search is None:
                continue
            search.add(rows.places[-1], row)
            batch.append(text)
            if len(batch) == BATCH_ROWS:
                search.duplicates.add(batch)
                batch = []
        if search is not None and batch:
            search.duplicates.add(batch)
    return rows


def _plain(rows: _Rows, file: Path, layout: DataFormat, fields: FieldMap) -> Iterator[_Row]:
    """Yield rows to train on, and count them in `rows` at the end."""
    stream = _examples(file, _settings(layout, fields))
    for example in stream:
        yield _Row(example, (example,))
    found = stream.summary
    rows.format, rows.read, rows.invalid = found.format, found.rows, found.skipped
    rows.faults, rows.unread, rows.absent = found.faults, found.unread, found.absent


def _rated(rows: _Rows, file: Path, layout: DataFormat, fields: FieldMap) -> Iterator[_Row]:
    """Yield preferences, and count them in `rows` at the end."""
    stream = RatedRows(file, layout, fields)
    for each in stream:
        turns = (*each.prompt, *each.completions)
        yield _Row(
            Example(each.row, "chat", turns, file=each.file, tools=each.tools), each.examples
        )
    rows.format, rows.read, rows.invalid = stream.format, stream.rows, stream.invalid
    rows.faults, rows.unread = tuple(stream.faults), stream.unread
    rows.absent = stream.absent


def _settings(layout: DataFormat, fields: FieldMap) -> DatasetSettings:
    return DatasetSettings(format=layout, fields=fields, weight=1.0, limit=None)


def _examples(file: Path, settings: DatasetSettings) -> Examples:
    return examples(file, settings, on_invalid="skip", name=str(file), whole_logs=True)


def _invalid(rows: _Rows) -> Iterator[Fault]:
    if rows.invalid:
        yield Fault("invalid rows", rows.invalid, rows.read, [str(fault) for fault in rows.faults])


def _found(findings: Findings, num_rows: int) -> Iterator[Fault]:
    for rule, count in sorted(findings.rows.items()):
        shown = [f"{example['where']}: {example['text']}" for example in findings.examples[rule]]
        yield Fault(rule, count, num_rows, shown)


def _leaks(held_out: _Rows, rows: _Rows) -> Iterator[Fault]:
    found = find_leaks(held_out.texts, rows.texts, np.ones(len(rows.texts), np.bool_))
    if found.rows:
        shown = [
            f"{held_out.places[leak.held_out]} is in {rows.places[leak.training]} with "
            f"{leak.span_words} of its {leak.row_words} words in sequence: {leak.span}"
            for leak in found.shown[:FAULTS_SHOWN]
        ]
        yield Fault("held-out rows in the training data", found.rows, found.checked, shown)


# ---- statistics ---------------------------------------------------------------------------------


def row_statistics(file: Path, layout: DataFormat, fields: FieldMap) -> list[tuple[str, str]]:
    """Return labels and values. Raises StageError if no row can be read."""
    if is_log(file, layout, fields):
        return _log_statistics(FeedbackLog(file, fields))
    if are_rated(file, layout, fields):
        return _preference_statistics(file, layout, fields)
    has_languages = importlib.util.find_spec("py3langid") is not None
    languages = identifier() if has_languages else None
    stream = _examples(file, _settings(layout, fields))
    lengths: list[int] = []
    roles: Counter[str] = Counter()
    found: Counter[str] = Counter()
    prompts: set[int] = set()
    for example in stream:
        text = conversation(example)
        lengths.append(len(words(text)))
        roles.update(turn.role for turn in example.messages)
        prompts.add(hash(tuple(turn.text for turn in example.messages[:-1]) or text))
        if languages is not None:
            found[languages.classify(prose(text))[0]] += 1
    summary = stream.summary
    return [
        ("Rows", f"{summary.rows:,}"),
        ("Layout", summary.format),
        ("Invalid rows", f"{summary.skipped:,}"),
        ("Examples", f"{len(lengths):,}"),
        ("Different prompts", f"{len(prompts):,}"),
        *[(f"Turns by {role}", f"{count:,}") for role, count in roles.most_common()],
        ("Words", f"{sum(lengths):,}"),
        ("Words of a row", spread(lengths)),
        ("Languages", _shares(found) if has_languages else "install tuneyard[cleaning]"),
    ]


def _preference_statistics(
    file: Path, layout: DataFormat, fields: FieldMap
) -> list[tuple[str, str]]:
    """Return labels and values of rated completions: of all, and of each file of several. Lengths
    are in words."""
    statistics, faults, number = PreferenceStatistics(), Counter[str](), 0
    by_file: dict[str, PreferenceStatistics] = {}
    for row in layouts.joined(read_data(file), layout, fields):
        number += 1
        try:
            found = parse_preferences(row, fields, labeled=rates_one(row, fields), chosen=layout)
        except RowError as error:
            faults[error.fault] += 1
            continue
        for preference in found:
            lengths = [len(words(completion.text)) for completion in preference.completions]
            for each in (statistics, by_file.setdefault(row.file, PreferenceStatistics())):
                each.add(preference, lengths)
    parts = by_file.items() if len(by_file) > 1 else ()
    return [
        ("Rows", f"{number:,}"),
        ("Invalid rows", _by_reason(faults)),
        *_statistics(statistics),
        *[
            (f"{name}: {label}", value)
            for name, part in parts
            for label, value in _statistics(part)
        ],
    ]


def _statistics(found: PreferenceStatistics) -> list[tuple[str, str]]:
    return [
        *statistic_lines(found.details(), "words"),
        *[("Note", note) for note in found.notes()],
    ]


def _log_statistics(log: FeedbackLog) -> list[tuple[str, str]]:
    """Return labels and values of a feedback log: what it becomes, and the statistics of its pairs,
    or of its labels if it has no pairs."""
    pairs, labels = PreferenceStatistics(), PreferenceStatistics()
    for _, uses in log.uses():
        for statistics, found in ((pairs, uses.pairs), (labels, uses.labels)):
            for preference in found:
                lengths = [len(words(completion.text)) for completion in preference.completions]
                statistics.add(preference, lengths)
    shown = pairs if log.pairs else labels
    return [
        ("Rows", f"{log.rows:,}"),
        ("Layout", "feedback"),
        ("Invalid rows", _by_reason(log.faults)),
        ("Answers", f"{log.answers:,}"),
        (
            "They become",
            f"{log.conversations:,} conversations for sft, {log.pairs:,} pairs, and "
            f"{log.labels_shown}",
        ),
        *(_statistics(shown) if shown.preferences else []),
    ]


def _by_reason(faults: Counter[str]) -> str:
    return ", ".join(f"{count:,} {fault}" for fault, count in faults.most_common()) or "0"


def spread(lengths: Sequence[int]) -> str:
    """Return quantiles of lengths."""
    middle, most, nearly = np.quantile(lengths, QUANTILES, method="lower").tolist()
    return f"half at most {middle:,}, 90% at most {most:,}, 99% at most {nearly:,}, longest " + (
        f"{max(lengths):,}"
    )


def _shares(found: Counter[str]) -> str:
    total = sum(found.values())
    shown = found.most_common(LANGUAGES_SHOWN)
    rest = total - sum(count for _, count in shown)
    parts = [f"{language} {count / total:.1%}" for language, count in shown]
    return ", ".join([*parts, *([f"others {rest / total:.1%}"] if rest else [])])
