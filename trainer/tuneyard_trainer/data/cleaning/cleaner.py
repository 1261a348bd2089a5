"""The rules of a data set in their order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tuneyard.api.cleaning import Clean
from tuneyard_trainer.data.cleaning.encoding import Encoding
from tuneyard_trainer.data.cleaning.findings import Cleaned, Finding, Rule
from tuneyard_trainer.data.cleaning.language import Language
from tuneyard_trainer.data.cleaning.length import Length
from tuneyard_trainer.data.cleaning.quality import fineweb, gopher
from tuneyard_trainer.data.cleaning.repetition import repetition
from tuneyard_trainer.data.cleaning.search import Search
from tuneyard_trainer.data.reading.example import Example

_QUALITY: dict[str, Rule] = {"repetition": repetition, "gopher": gopher, "fineweb": fineweb}


@dataclass(frozen=True)
class Cleaner:
    """Applies rules to rows, one after another."""

    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, clean: Clean | None) -> Cleaner:
        """Return the cleaner of a manifest's rules. Raises StageError MissingExtra."""
        return cls(tuple(_rules(clean)) if clean else ())

    def __call__(self, example: Example) -> Cleaned:
        """Return the row after all rules, or after the first rule that removes it."""
        findings: list[Finding] = []
        for rule in self.rules:
            cleaned = rule(example)
            example = cleaned.example
            findings += cleaned.findings
            if cleaned.removed_by is not None:
                break
        return Cleaned(example, tuple(findings))


def _rules(clean: Clean) -> Iterable[Rule]:
    """Yield the rules: repairs first, then the cheap ones, and personal data in what is left."""
    if clean.repair_encoding:
        yield Encoding()
    if clean.min_words is not None or clean.max_words is not None:
        yield Length(clean.min_words, clean.max_words)
    yield from (rule for name, rule in _QUALITY.items() if name in (clean.quality or ()))
    if clean.languages is not None:
        yield Language(tuple(clean.languages))
    if clean.personal_data is not None:
        yield Search.of(clean.personal_data)
