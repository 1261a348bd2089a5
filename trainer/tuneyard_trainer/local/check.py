"""The faults and the statistics of a file of rows, without a model."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tuneyard.api.cleaning import Clean, PersonalData
from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard.api.stage_settings import DatasetSettings
from tuneyard_trainer.data import layouts
from tuneyard_trainer.data.cleaning.cleaner import Cleaner
from tuneyard_trainer.data.cleaning.duplicates import Duplicates
from tuneyard_trainer.data.cleaning.findings import Finding, Findings
from tuneyard_trainer.data.cleaning.language import identifier, prose
from tuneyard_trainer.data.cleaning.text import as_written, conversation, written
from tuneyard_trainer.data.cleaning.words import words
from tuneyard_trainer.data.example import RowError
from tuneyard_trainer.data.leaks import find_leaks
from tuneyard_trainer.data.rows import read_data
from tuneyard_trainer.data.stream import FAULTS_SHOWN, Examples, examples
from tuneyard_trainer.data.texts import Texts
from tuneyard_trainer.local.feedback_log import FeedbackLog, is_log
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


@dataclass
class _Rows:
    """The rows of a file, written as text once they are read."""

    stream: Examples
    texts: Texts
    places: list[str] = field(default_factory=list)


def check_rows(file: Path, layout: DataFormat, fields: FieldMap, held_out: Path | None) -> Report:
    """Return the faults of a file's rows. Raises StageError if no row can be read."""
    settings = _settings(layout, fields)
    has_ftfy = importlib.util.find_spec("ftfy") is not None
    cleaner = Cleaner.of(Clean(repair_encoding=has_ftfy, personal_data=PersonalData()))
    findings, duplicates = Findings(), Duplicates("near", None)
    with tempfile.TemporaryDirectory() as folder:
        rows = _read(file, settings, Path(folder) / "rows", cleaner, findings, duplicates)
        is_feedback = rows.stream.summary.format == "feedback"
        for found in duplicates.found(rows.texts.__getitem__):
            if is_feedback and rows.places[found.row] == rows.places[found.of]:
                continue  # an edit is much like its answer
            note = f"{found.similarity:.0%} as in {rows.places[found.of]}"
            text = written(rows.texts[found.row])[1]
            finding = Finding(f"duplicates.{found.kind}", "reported", text, note=note)
            findings.add(finding, rows.places[found.row])
        faults = [*_invalid(rows), *_found(findings, len(rows.texts))]
        if held_out is not None:
            faults += _leaks(_read(held_out, settings, Path(folder) / "held-out"), rows)
    summary = rows.stream.summary
    title = f"{file}: {summary.rows:,} rows of the layout {summary.format}"
    missing = "The character encoding was not checked: install tuneyard[cleaning]."
    notes = [] if has_ftfy else [missing]
    if is_feedback:
        notes.append("The answers and edits were searched, also those that nobody rated.")
    if summary.unread:
        notes.append(f"Nothing reads the columns {', '.join(summary.unread)}.")
    return Report(title, faults, notes)


def _read(
    file: Path,
    settings: DatasetSettings,
    copy: Path,
    cleaner: Cleaner | None = None,
    findings: Findings | None = None,
    duplicates: Duplicates | None = None,
) -> _Rows:
    """Read a file's rows into `copy`, and search them if there is something to search with."""
    stream = _examples(file, settings)
    rows = _Rows(stream, Texts(copy))
    batch: list[dict[str, object]] = []
    with rows.texts:
        for example in stream:
            rows.places.append(f"{example.file} row {example.row}".strip())
            if cleaner and findings is not None:
                for finding in cleaner(example).findings:
                    findings.add(finding, rows.places[-1])
            text = as_written(example)
            rows.texts.append(text)
            batch.append(text)
            if duplicates and len(batch) == BATCH_ROWS:
                duplicates.add(batch)
                batch = []
        if duplicates and batch:
            duplicates.add(batch)
    return rows


def _settings(layout: DataFormat, fields: FieldMap) -> DatasetSettings:
    return DatasetSettings(format=layout, fields=fields, weight=1.0, limit=None)


def _examples(file: Path, settings: DatasetSettings) -> Examples:
    return examples(file, settings, on_invalid="skip", name=str(file), whole_logs=True)


def _invalid(rows: _Rows) -> Iterator[Fault]:
    summary = rows.stream.summary
    if summary.skipped:
        shown = [str(fault) for fault in summary.faults]
        yield Fault("invalid rows", summary.skipped, summary.rows, shown)


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
        ("Words of a row", _spread(lengths)),
        ("Languages", _shares(found) if has_languages else "install tuneyard[cleaning]"),
    ]


def _preference_statistics(
    file: Path, layout: DataFormat, fields: FieldMap
) -> list[tuple[str, str]]:
    """Return labels and values of rated completions. Lengths are in words."""
    statistics, faults, number = PreferenceStatistics(), Counter[str](), 0
    for row in layouts.joined(read_data(file), layout, fields):
        number += 1
        try:
            found = parse_preferences(row, fields, labeled=rates_one(row, fields), chosen=layout)
        except RowError as error:
            faults[error.fault] += 1
            continue
        for preference in found:
            lengths = [len(words(completion.text)) for completion in preference.completions]
            statistics.add(preference, lengths)
    return [
        ("Rows", f"{number:,}"),
        ("Invalid rows", _by_reason(faults)),
        *statistic_lines(statistics.details(), "words"),
        *[("Note", note) for note in statistics.notes()],
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
        *(statistic_lines(shown.details(), "words") if shown.preferences else []),
        *[("Note", note) for note in shown.notes()],
    ]


def _by_reason(faults: Counter[str]) -> str:
    return ", ".join(f"{count:,} {fault}" for fault, count in faults.most_common()) or "0"


def _spread(lengths: list[int]) -> str:
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
