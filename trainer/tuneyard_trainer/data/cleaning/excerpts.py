"""Excerpts of rows for logs, records and reports: short, on one line, without secrets."""

from __future__ import annotations

from tuneyard_trainer.data.cleaning.personal_data import without_personal_data
from tuneyard_trainer.logs.redaction import Redactor

EXCERPT = 120
"""Most characters of an excerpt."""
LONGEST_READ = 1 << 16
"""Characters around a place in which secrets are searched: none reaches out of them."""
_redact = Redactor({})


def excerpt(text: str, start: int = 0, end: int = 0) -> str:
    """Return the text around a span, with placeholders for personal data and secrets."""
    first = max(0, start - LONGEST_READ)
    around = harmless(text[first : end + LONGEST_READ])
    place = min(len(harmless(text[first:start])), len(around))
    room = max(0, EXCERPT - (end - start)) // 2
    shown = around[max(0, min(place - room, len(around) - EXCERPT)) :][: 2 * EXCERPT]
    line = " ".join(shown.split())
    return line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…"


def harmless(text: str) -> str:
    """Return the text with placeholders for personal data and secrets."""
    return _redact(without_personal_data(text))
