"""The rule that reports, redacts or removes personal data."""

from __future__ import annotations

from tuneyard.api.cleaning import PersonalData, Treatment
from tuneyard_trainer.data.cleaning.findings import Action, Cleaned, Finding
from tuneyard_trainer.data.cleaning.personal_data import KINDS
from tuneyard_trainer.data.cleaning.text import changed, texts
from tuneyard_trainer.data.reading.example import Example

_ACTIONS: dict[Treatment, Action] = {
    "report": "reported",
    "redact": "rewritten",
    "drop": "removed",
}


class Search:
    """Searches all texts of a row for personal data, also the arguments of calls."""

    def __init__(self, treatments: dict[str, Treatment]) -> None:
        """`treatments`: by the name of the kind; a kind that is ignored is left out."""
        self._kinds = tuple(kind for kind in KINDS if kind.name in treatments)
        self._treatments = treatments

    @classmethod
    def of(cls, settings: PersonalData) -> Search:
        """Return the search that the manifest asks for."""
        found: dict[str, Treatment] = {kind.name: getattr(settings, kind.name) for kind in KINDS}
        return cls({name: value for name, value in found.items() if value != "ignore"})

    def __call__(self, example: Example) -> Cleaned:
        findings: list[Finding] = []
        for kind in self._kinds:
            places = ((text, kind.first(text)) for text in texts(example))
            text, span = next((place for place in places if place[1]), ("", None))
            if span is None:
                continue
            action = _ACTIONS[self._treatments[kind.name]]
            findings.append(Finding(f"personalData.{kind.name}", action, text, *span))
            if action == "removed":
                break
            if action == "rewritten":
                example = changed(example, kind.replaced)
        return Cleaned(example, tuple(findings))
