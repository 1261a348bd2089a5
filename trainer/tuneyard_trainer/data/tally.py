"""The tally of a data set: its ledger, the lengths of its rows, and its first faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tuneyard_trainer.data.ledger import SPLIT_OUTCOMES, Entry, Ledger
from tuneyard_trainer.data.reading.stream import FAULTS_SHOWN

OVERLENGTH_OUTCOMES = ("dropped", "truncated", "split")
"""The outcomes of rows that are longer than a sequence."""


@dataclass
class Tally:
    """The ledger of one data set, with its lengths and its first faults."""

    ledger: Ledger = field(default_factory=Ledger)
    format: str = ""
    context_only_pieces: int = 0
    """Pieces of split rows without a target, which are left out."""
    longest: int = 0
    """Tokens of the longest row, before it is truncated or split."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Rows by length in tokens, rounded up to a power of two."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """The first three rows refused for each reason."""
    unread: tuple[str, ...] = ()
    """The columns that nothing reads."""
    augmented: bool = False
    """Whether an earlier stage made the rows from other rows. A row that cannot be used is left
    out."""

    @property
    def role(self) -> str:
        """The input of the stage."""
        return self.ledger.role

    @property
    def name(self) -> str:
        """The field path in the manifest."""
        return self.ledger.name

    def refuse(self, reason: str, where: str, problem: str, tokens: int = 0) -> None:
        """Count a refused row."""
        self.ledger.lose("invalid", reason, tokens=tokens)
        shown = self.faults.setdefault(reason, [])
        if len(shown) < FAULTS_SHOWN:
            shown.append(f"{where}: {problem}")

    def refused(self, reason: str) -> int:
        """Return the number of rows refused for a reason."""
        return self.ledger.rows[Entry("invalid", reason)]

    def measure(self, length: int) -> None:
        """Count a row's length in tokens."""
        self.longest = max(self.longest, length)
        self.lengths[1 << (length - 1).bit_length()] += 1

    def add(self, later: Tally) -> None:
        """Add the tally of rows that follow."""
        self.ledger.add(later.ledger)
        self.context_only_pieces += later.context_only_pieces
        self.longest = max(self.longest, later.longest)
        self.lengths.update(later.lengths)
        for reason, faults in later.faults.items():
            shown = self.faults.setdefault(reason, [])
            shown += faults[: FAULTS_SHOWN - len(shown)]

    @property
    def skipped(self) -> int:
        """Rows refused. In a finished stage these are the skipped rows."""
        return self.ledger.num_rows("invalid")

    def outcome(self, name: str) -> int:
        """Return the number of rows of one of OVERLENGTH_OUTCOMES."""
        return self.ledger.num_rows("dropped") if name == "dropped" else self.ledger.changes[name]

    def details(self) -> dict[str, Any]:
        """Return the record of the data set for `data.json` and the stage's details."""
        ledger = self.ledger
        return {
            "role": ledger.role,
            "name": ledger.name,
            "format": self.format,
            "rows": ledger.read,
            "kept": sum(map(ledger.num_rows, SPLIT_OUTCOMES.values())),
            "skipped": self.skipped,
            **{name: self.outcome(name) for name in OVERLENGTH_OUTCOMES},
            "filtered": ledger.num_rows("filtered"),
            "duplicates": ledger.num_rows("duplicate"),
            "contextOnlyPieces": self.context_only_pieces,
            "longest": self.longest,
            "unreadColumns": list(self.unread),
            **({"augmented": True} if self.augmented else {}),
            "lengths": {str(bound): self.lengths[bound] for bound in sorted(self.lengths)},
        }
