"""The ledger of a data set: the outcome of each row that was read, and of each token.

Each row has one outcome and each token too, so that the amounts of all outcomes add up to what came
in. `Ledger.check` proves it before a stage ends, so that nothing is left out without being counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Outcome = Literal[
    "invalid", "filtered", "duplicate", "dropped", "trained", "heldOut", "general", "guard"
]
"""Outcomes of a row. invalid: it cannot be read or encoded. filtered: a rule removed it. duplicate:
it repeats an earlier row. dropped: it is too long. The others: the split that it is in."""
LOST: tuple[Outcome, ...] = ("invalid", "filtered", "duplicate", "dropped")
"""The outcomes of rows that are in no split. They have a cause each, except dropped."""
SPLIT_OUTCOMES: Mapping[str, Outcome] = {
    "train": "trained",
    "validation": "heldOut",
    "general": "general",
    "guard": "guard",
}
GENERAL_OUTCOMES: tuple[Outcome, ...] = ("general", "guard")
"""The outcomes of general data, which only jobs with defenses against forgetting have."""


class Entry(NamedTuple):
    """An outcome and its cause."""

    outcome: Outcome
    cause: str = ""
    """The rule, or the reason of the refusal. "": the outcome has one cause only."""


@dataclass
class Ledger:
    """The rows and tokens of one data set, by outcome.

    A row is what can become one example: an invalid row, a row that its format leaves out, or an
    example. It has tokens once it is encoded. The tokens of kept rows are those of their sequences;
    what was cut off, and pieces without a target, are counted apart.
    """

    role: str = ""
    """The input of the stage: train.0, validation.1, preferences.0, ..."""
    name: str = ""
    """The field path in the manifest."""
    read: int = 0
    """Rows of the files. OpenAssistant's flat files have several for one example."""
    rows_in: int = 0
    tokens_in: int = 0
    kept: int = 0
    """Rows of which sequences were written, before duplicates are removed and splits assigned."""
    rows: Counter[Entry] = field(default_factory=Counter)
    tokens: Counter[Entry] = field(default_factory=Counter)
    """Tokens of the rows. Of trained and heldOut: those of their sequences."""
    targets: Counter[Outcome] = field(default_factory=Counter)
    """Tokens with loss among those of trained and heldOut. The other ones are context."""
    sequences: Counter[Outcome] = field(default_factory=Counter)
    cut_tokens: int = 0
    """Tokens behind the end of truncated rows."""
    context_only_tokens: int = 0
    """Tokens of the pieces of split rows that have no target and are left out."""
    added_tokens: int = 0
    """Tokens that filling in the middle adds to the trained sequences."""
    changes: Counter[str] = field(default_factory=Counter)
    """Rows that stay and were truncated, split, rewritten or reported, by the name of the change.
    A row can have several."""

    # ---- entries ------------------------------------------------------------------------------

    def lose(self, outcome: Outcome, cause: str = "", *, rows: int = 1, tokens: int = 0) -> None:
        """Count rows that came in and are in no split. `tokens`: 0 for rows without an encoding."""
        self.rows_in += rows
        self.tokens_in += tokens
        self.rows[Entry(outcome, cause)] += rows
        self.tokens[Entry(outcome, cause)] += tokens

    def keep(self, tokens: int, *, cut: int = 0, context_only: int = 0) -> None:
        """Count a row that came in and whose sequences were written. `tokens`: all of the row."""
        self.rows_in += 1
        self.tokens_in += tokens
        self.kept += 1
        self.cut_tokens += cut
        self.context_only_tokens += context_only

    def settle(
        self,
        outcome: Outcome,
        cause: str = "",
        *,
        rows: int,
        tokens: int,
        targets: int = 0,
        sequences: int = 0,
    ) -> None:
        """Count the final outcome of kept rows. `tokens`: those of their sequences."""
        self.rows[Entry(outcome, cause)] += rows
        self.tokens[Entry(outcome, cause)] += tokens
        if outcome in SPLIT_OUTCOMES.values():
            self.targets[outcome] += targets
            self.sequences[outcome] += sequences

    def add(self, other: Ledger) -> None:
        """Add the amounts of another ledger, such as that of a batch of rows."""
        self.read += other.read
        self.rows_in += other.rows_in
        self.tokens_in += other.tokens_in
        self.kept += other.kept
        self.cut_tokens += other.cut_tokens
        self.context_only_tokens += other.context_only_tokens
        self.added_tokens += other.added_tokens
        self.rows.update(other.rows)
        self.tokens.update(other.tokens)
        self.targets.update(other.targets)
        self.sequences.update(other.sequences)
        self.changes.update(other.changes)

    # ---- sums ---------------------------------------------------------------------------------

    def num_rows(self, outcome: Outcome) -> int:
        """Return the rows of an outcome, over all causes."""
        return sum(count for cause, count in self.rows.items() if cause.outcome == outcome)

    def num_tokens(self, outcome: Outcome) -> int:
        """Return the tokens of an outcome, over all causes."""
        return sum(count for cause, count in self.tokens.items() if cause.outcome == outcome)

    def check(self) -> None:
        """Raise ArithmeticError unless the outcomes add up to the rows and tokens that came in."""
        rows = sum(self.rows.values())
        tokens = sum(self.tokens.values()) + self.cut_tokens + self.context_only_tokens
        tokens_in = self.tokens_in + self.added_tokens
        if (rows, tokens) != (self.rows_in, tokens_in):
            raise ArithmeticError(
                f"the ledger of {self.name or 'all data sets'} does not balance: {self.rows_in} "
                f"rows and {tokens_in} tokens came in, and the outcomes have {rows} and "
                f"{tokens}"
            )

    @classmethod
    def total(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """Return the sum of the ledgers."""
        total = cls()
        for each in ledgers:
            total.add(each)
        return total

    # ---- records ------------------------------------------------------------------------------

    def details(self) -> dict[str, Any]:
        """Return the ledger as JSON, for `data.json`, the stage's record and the report."""
        return {
            **({"role": self.role, "name": self.name} if self.role else {}),
            "read": self.read,
            "rows": {"in": self.rows_in, **_by_outcome(self.rows)},
            "tokens": {
                "in": self.tokens_in,
                **_by_outcome(self.tokens),
                "cut": self.cut_tokens,
                "contextOnly": self.context_only_tokens,
                "added": self.added_tokens,
            },
            "targets": _by_split(self.targets),
            "sequences": _by_split(self.sequences),
            "changes": {name: self.changes[name] for name in sorted(self.changes)},
        }

    def metrics(self) -> dict[str, float]:
        """Return the few numbers that the job's status shows."""
        return {
            "readRows": self.rows_in,
            "filteredRows": self.num_rows("filtered"),
            "duplicateRows": self.num_rows("duplicate"),
            "contextTokens": self.num_tokens("trained") - self.targets["trained"],
            "lostTokens": sum(self.num_tokens(outcome) for outcome in LOST)
            + self.cut_tokens
            + self.context_only_tokens,
        }


def ledger_details(ledgers: Iterable[Ledger]) -> dict[str, Any]:
    """Return the ledgers of a stage's data sets and their sum as JSON."""
    found = list(ledgers)
    return {
        "sources": [ledger.details() for ledger in found],
        "total": Ledger.total(found).details(),
    }


def _by_split(counts: Mapping[Outcome, int]) -> dict[str, int]:
    """Return the counts of the splits; of general data only if there are any."""
    return {
        name: counts[name]
        for name in SPLIT_OUTCOMES.values()
        if name not in GENERAL_OUTCOMES or counts[name]
    }


def _by_outcome(counts: Mapping[Entry, int]) -> dict[str, Any]:
    """Return the counts by outcome. Outcomes with causes map each cause to its count."""
    found: dict[str, Any] = {
        outcome: {
            cause.cause: counts[cause]
            for cause in sorted(counts)
            if cause.outcome == outcome and counts[cause]
        }
        for outcome in ("invalid", "filtered", "duplicate")
    }
    for outcome in ("dropped", "trained", "heldOut", *GENERAL_OUTCOMES):
        count = sum(n for cause, n in counts.items() if cause.outcome == outcome)
        if count or outcome not in GENERAL_OUTCOMES:
            found[outcome] = count
    return found
