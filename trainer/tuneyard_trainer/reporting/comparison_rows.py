"""The comparisons of the models as rows of text, for the console and the model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from tuneyard.api.report import Comparison
from tuneyard_trainer.reporting import words
from tuneyard_trainer.reporting.formatting import number, percent, signed

UNCLEAR = "no clear difference"
NOT_FINITE = "not a number"

RowVerdict = Literal["better", "worse", "unclear", ""]


@dataclass(frozen=True)
class ComparisonRow:
    """One row of the table that compares the base model with the tuned model."""

    label: str
    base: str
    tuned: str
    change: str
    verdict: RowVerdict
    """Whether the tuned model is better or worse. unclear: the 95% interval of the difference
    contains 0, which `change` says. "": equal, or no direction is better."""

    @classmethod
    def of(cls, each: Comparison) -> Self:
        """Return the row of a metric. Of a suite the values have four digits, since its metrics
        have any unit."""
        verdict = _verdict(each)
        notes = (_change(each), UNCLEAR if verdict == "unclear" else "")
        base, tuned = _shown(each.base, each), _shown(each.tuned, each)
        if each.base_is_chance:
            base = f"{base} by chance"
        return cls(
            label=each.label,
            base=base,
            tuned=NOT_FINITE if each.tuned is None else tuned,
            change=", ".join(filter(None, notes)),
            verdict=verdict,
        )


def right_answers(share: float | None, questions: float | None) -> str:
    """Return right answers as counts, or as a share if the number of questions is unknown."""
    if share is None or not questions:
        return percent(share)
    return f"{round(share * questions)}/{round(questions)}"


def _verdict(each: Comparison) -> RowVerdict:
    if each.tuned is None and each.base is not None and each.higher_is_better is not None:
        return "worse"  # the tuned model diverged
    return "" if each.verdict == "equal" or each.verdict == "none" else each.verdict


def _shown(value: float | None, each: Comparison) -> str:
    if each.scope == "suite":
        return number(value)
    if _counts(each):
        return right_answers(value, each.items)
    return words.shown(value, each)


def _change(each: Comparison) -> str:
    """Return the change of right answers in answers, and that of a loss in percent of it."""
    if each.difference is None:
        return ""
    if _counts(each):
        if each.items:
            return signed(each.difference * each.items)
        return f"{signed(100 * each.difference)} points"
    is_loss = each.scope == "heldOut" and each.higher_is_better is False
    return f"{signed(100 * each.difference / each.base)} %" if is_loss and each.base else ""


def _counts(each: Comparison) -> bool:
    return each.scope == "heldOut" and each.metric.startswith("answerAccuracy")
