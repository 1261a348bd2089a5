"""Repair of text that was decoded with a wrong character encoding, by ftfy."""

from __future__ import annotations

from tuneyard_trainer.data.cleaning.findings import Cleaned, Finding
from tuneyard_trainer.data.cleaning.text import changed, texts
from tuneyard_trainer.data.reading.example import Example
from tuneyard_trainer.extras import require_cleaning


class Encoding:
    """Repairs mojibake. It changes nothing else: not quotes, not HTML, and no code."""

    def __init__(self) -> None:
        """Raises StageError MissingExtra."""
        require_cleaning("ftfy")
        from ftfy import fix_encoding

        self._repair = fix_encoding

    def __call__(self, example: Example) -> Cleaned:
        if all(text.isascii() for text in texts(example)):
            return Cleaned(example)
        repaired = changed(example, self._repair)
        if repaired is example:
            return Cleaned(example)
        before, after = next(
            (old, new)
            for old, new in zip(texts(example), texts(repaired), strict=True)
            if old != new
        )
        start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
        found = Finding("encoding.mojibake", "rewritten", before, start, start + 1)
        return Cleaned(repaired, (found,))
