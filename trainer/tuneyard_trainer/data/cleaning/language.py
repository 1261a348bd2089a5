"""The language of a row, by py3langid: naive Bayes on byte sequences, 97 languages, no model to
fetch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuneyard.errors import StageError
from tuneyard_trainer.data.cleaning.findings import Cleaned, Finding
from tuneyard_trainer.data.cleaning.text import conversation
from tuneyard_trainer.data.reading.example import Example
from tuneyard_trainer.extras import require_cleaning

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

MIN_LETTERS = 40
"""Letters below which a row's language is not decided."""
MIN_CONFIDENCE = 0.8
"""The probability from which a row counts as of another language."""
MAX_CHARACTERS = 500
"""Characters that are read of a row: more do not change the language."""


def identifier() -> LanguageIdentifier:
    """Return py3langid's identifier with probabilities. Raises StageError MissingExtra."""
    require_cleaning("py3langid")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def prose(text: str) -> str:
    """Return what decides about the language: the text without code blocks, at its start."""
    parts = text.split("```")
    return " ".join(parts[::2])[:MAX_CHARACTERS]


class Language:
    """Removes rows that are surely in a language that is not listed."""

    def __init__(self, keep: tuple[str, ...]) -> None:
        """`keep`: ISO 639 codes. Raises StageError MissingExtra, or UnknownLanguage for a code that
        py3langid does not know."""
        self._identifier = identifier()
        self._keep = frozenset(keep)
        known = set(self._identifier.labels)
        if unknown := sorted(self._keep - known):
            raise StageError(
                "UnknownLanguage",
                f"spec.data.clean.languages names {', '.join(unknown)}, which the language "
                "identifier does not know.",
                advice=f"Choose among {', '.join(sorted(known))}.",
            )

    def __call__(self, example: Example) -> Cleaned:
        text = prose(conversation(example))
        if sum(map(str.isalpha, text)) < MIN_LETTERS:
            return Cleaned(example)
        language, confidence = self._identifier.classify(text)
        if language in self._keep or confidence < MIN_CONFIDENCE:
            return Cleaned(example)
        note = f"{language} ({confidence:.2f})"
        return Cleaned(example, (Finding("language.other", "removed", text, note=note),))
