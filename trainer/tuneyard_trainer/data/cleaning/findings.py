"""Findings of rules in rows, the form of a rule, and the counts of each rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from tuneyard_trainer.data.cleaning.excerpts import excerpt
from tuneyard_trainer.data.reading.example import Example

Action = Literal["reported", "rewritten", "removed"]
EXAMPLES_SHOWN = 3
"""The examples that each rule shows."""


class Finding(NamedTuple):
    """A finding of a rule in a row."""

    rule: str
    """Its name: the family, a dot and the case, such as personalData.email."""
    action: Action
    text: str
    """The text in which it was found."""
    start: int = 0
    end: int = 0
    """The span in the text. Both 0: the whole text."""
    note: str = ""
    """What the rule measured. "": nothing."""

    @property
    def excerpt(self) -> str:
        """The note and the place, bounded and without secrets or personal data."""
        shown = excerpt(self.text, self.start, self.end)
        return f"{self.note}: {shown}" if self.note else shown


class Cleaned(NamedTuple):
    """A row after the rules."""

    example: Example
    """The row, rewritten by the rules before the first that removed it."""
    findings: tuple[Finding, ...] = ()

    @property
    def removed_by(self) -> str | None:
        """The rule that removed the row. None: it stays."""
        return next((found.rule for found in self.findings if found.action == "removed"), None)


class Rule(Protocol):
    """One family of rules."""

    def __call__(self, example: Example) -> Cleaned:
        """Return the row with what was found in it. The first finding that removes is the last."""


@dataclass
class Findings:
    """The rows of each rule: how many, and the first EXAMPLES_SHOWN."""

    rows: dict[str, int] = field(default_factory=dict)
    actions: dict[str, Action] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, finding: Finding, where: str) -> None:
        """Count a row. `where`: its data set, file and number."""
        self.rows[finding.rule] = self.rows.get(finding.rule, 0) + 1
        self.actions[finding.rule] = finding.action
        shown = self.examples.setdefault(finding.rule, [])
        if len(shown) < EXAMPLES_SHOWN:
            shown.append({"where": where, "text": finding.excerpt})

    def update(self, later: Findings) -> None:
        """Add the findings in rows that follow."""
        for rule, count in later.rows.items():
            self.rows[rule] = self.rows.get(rule, 0) + count
            self.actions[rule] = later.actions[rule]
            shown = self.examples.setdefault(rule, [])
            shown += later.examples[rule][: EXAMPLES_SHOWN - len(shown)]

    def details(self) -> dict[str, Any]:
        """Return the findings as JSON, by rule."""
        return {
            rule: {
                "action": self.actions[rule],
                "rows": self.rows[rule],
                "examples": self.examples[rule],
            }
            for rule in sorted(self.rows)
        }
