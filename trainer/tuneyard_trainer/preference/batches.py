"""One batch of rated rows: read and encoded, in any process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tuneyard.api.sources import DataFormat, FieldMap
from tuneyard_trainer.data.encoding.chat import transcript
from tuneyard_trainer.data.encoding.tokenization import Encoded, Encoder, Misfit
from tuneyard_trainer.data.reading.example import Example, RowError
from tuneyard_trainer.data.reading.feedback import is_beaten
from tuneyard_trainer.data.reading.rows import Row
from tuneyard_trainer.preference.rows import Preference, parse_preferences


class RatedRows(NamedTuple):
    """Rows of one data set that follow each other."""

    rows: list[Row]
    size: int
    """As `batched` returns it."""
    fields: FieldMap
    format: DataFormat
    """As in `parse_preferences`."""


class EncodedPreference(NamedTuple):
    """A valid preference."""

    preference: Preference
    rows: list[Encoded]
    """One for each completion."""


class Rejected(NamedTuple):
    """A row that states no preference, or a preference that cannot be encoded."""

    fault: str
    where: str
    why: str
    tokens: int = 0


class Unrated(NamedTuple):
    """A valid row that states no preference. A row that another one beats is in a pair of that one,
    and is left out of the results."""


Outcome = EncodedPreference | Rejected | Unrated


@dataclass(frozen=True)
class PreferenceEncoder:
    """Reads and encodes batches. It pickles, and each process has a copy of it."""

    encoder: Encoder
    labeled: bool
    """As in `parse_preferences`."""

    def __call__(self, batch: RatedRows) -> list[Outcome]:
        """Return what becomes of the rows: first of those without a preference, then of the others.
        Raises StageError as `Encoder.encode` does."""
        outcomes: list[Outcome] = []
        preferences: list[Preference] = []
        for row in batch.rows:
            try:
                found = parse_preferences(
                    row, batch.fields, labeled=self.labeled, chosen=batch.format
                )
            except RowError as error:
                outcomes.append(Rejected(error.fault, location(row.file, row.number), str(error)))
                continue
            preferences += found
            if not found and not (is_beaten(row.value) and not self.labeled):
                outcomes.append(Unrated())
        return outcomes + self._encoded(preferences)

    def _encoded(self, preferences: Sequence[Preference]) -> list[Outcome]:
        examples = [example for preference in preferences for example in preference.examples]
        encoded = iter(encode_completions(examples, self.encoder))
        return [
            _outcome(preference, [next(encoded) for _ in preference.completions])
            for preference in preferences
        ]


def _outcome(preference: Preference, found: Sequence[Encoded | Misfit]) -> Outcome:
    where = location(preference.file, preference.row)
    misfit = next((row for row in found if isinstance(row, Misfit)), None)
    rows = [row for row in found if isinstance(row, Encoded)]
    tokens = sum(len(row.ids) for row in rows)
    if misfit is not None:
        return Rejected("ChatTemplate", where, misfit.message, tokens)
    if not all(row.mask.any() for row in rows):
        return Rejected("EmptyCompletion", where, "a completion has no tokens", tokens)
    if len({row.ids.tobytes() for row in rows}) < len(rows):
        return Rejected("IdenticalSides", where, "two completions have the same tokens", tokens)
    return EncodedPreference(preference, rows)


def location(file: str, row: int) -> str:
    """Return the name of a row for messages. `file`: "" for a data set of one file."""
    return f"{file} row {row}".strip()


def encode_completions(examples: Sequence[Example], encoder: Encoder) -> list[Encoded | Misfit]:
    """Return each completion with its prompt, as it is trained on. Raises StageError ChatTemplate
    or NoStopToken if none can be encoded."""
    found = encoder.encode(_by_template(examples, encoder))
    return [_to_stop_token(row) if isinstance(row, Encoded) else row for row in found]


def _by_template(examples: Sequence[Example], encoder: Encoder) -> list[Example]:
    """Return the examples as conversations if the tokenizer has a chat template, else as prompt and
    completion. The prompt is then a transcript, as `data.prompts` writes it."""
    if encoder.tokenizer.chat_template:
        return list(examples)
    return [
        replace(e, kind="completion", prompt=transcript(encoder.turns(e)[:-1])) for e in examples
    ]


def _to_stop_token(row: Encoded) -> Encoded:
    """Return a row without the tokens that a template writes after the completion."""
    targets = np.flatnonzero(row.mask)
    end = int(targets[-1]) + 1 if len(targets) else len(row.ids)
    return Encoded(row.ids[:end], row.mask[:end])
