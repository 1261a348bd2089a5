"""A feedback log as the conversations, pairs and labels that it becomes, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard_trainer.data.reading import layouts
from tuneyard_trainer.data.reading.example import Example, RowError
from tuneyard_trainer.data.reading.rows import Row, read_data
from tuneyard_trainer.data.reading.stream import DETECTED_FROM, FAULTS_SHOWN, read_examples
from tuneyard_trainer.preference.rows import Preference, parse_preferences


class Uses(NamedTuple):
    """The examples that an answer of a log becomes."""

    conversations: list[Example]
    pairs: list[Preference]
    labels: list[Preference]
    """Single completions."""

    def examples(self) -> Iterator[tuple[str, Example]]:
        """Yield each text with its use."""
        for example in self.conversations:
            yield "conversation", example
        for pair in self.pairs:
            yield from zip(("chosen", "rejected"), pair.examples, strict=True)
        for single in self.labels:
            yield f"label {'good' if single.label else 'bad'}", single.examples[0]


@dataclass
class FeedbackLog:
    """A feedback log. Its counts are final when `uses` is exhausted."""

    file: Path
    fields: FieldMap
    rows: int = 0
    answers: int = 0
    conversations: int = 0
    pairs: int = 0
    labels: Counter[float] = field(default_factory=Counter)
    """Single completions by their label: 1.0 good, 0.0 bad."""
    faults: Counter[str] = field(default_factory=Counter)
    """Invalid rows, by reason."""
    shown: list[str] = field(default_factory=list)
    """The first invalid rows."""

    def uses(self) -> Iterator[tuple[Row, Uses]]:
        """Yield each answer with what it becomes. Invalid rows are counted. Raises StageError for
        fields that a log does not have. Call it once."""
        layout = layouts.layout_of("feedback", "training", self.fields)
        names = layout.names(self.fields)
        for row in layouts.joined(self._counted(), "feedback", self.fields):
            try:
                conversations = read_examples(row, layout, names)
                pairs, labels = (
                    parse_preferences(row, self.fields, labeled=labeled, chosen="feedback")
                    for labeled in (False, True)
                )
            except RowError as error:
                self.faults[error.fault] += 1
                if len(self.shown) < FAULTS_SHOWN:
                    self.shown.append(f"{row.file} row {row.number}: {error}")
                continue
            self.answers += 1
            self.conversations += len(conversations)
            self.pairs += len(pairs)
            self.labels.update(single.label for single in labels)
            yield row, Uses(conversations, pairs, labels)

    def _counted(self) -> Iterator[Row]:
        for row in read_data(self.file):
            self.rows += 1
            yield row

    @property
    def labels_shown(self) -> str:
        """The numbers of labels."""
        good, bad = self.labels[1.0], self.labels[0.0]
        return f"{good + bad:,} labeled completions ({good:,} good, {bad:,} bad)"

    @property
    def sentence(self) -> str:
        """The amounts that the log becomes, and its first invalid rows."""
        summary = (
            f"{self.file.name}: {self.answers:,} answers of a feedback log become "
            f"{self.conversations:,} conversations for sft, {self.pairs:,} pairs, and "
            f"{self.labels_shown}"
        )
        if not self.faults:
            return summary
        return f"{summary}; invalid rows: {self.faults.total():,}: {'; '.join(self.shown)}"


def is_log(file: Path, chosen: DataFormat, fields: FieldMap) -> bool:
    """Return whether a file is a feedback log, by `chosen` or else by its first rows."""
    if chosen != "auto":
        return chosen == "feedback"
    (layout,) = (each for each in layouts.layouts("training") if each.name == "feedback")
    head = (row.value for row in islice(read_data(file), DETECTED_FROM))
    return any(layout.matches(value, fields) for value in head if isinstance(value, dict))
