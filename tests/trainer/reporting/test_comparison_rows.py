"""The table of comparisons for the console and the model card: text of the report's numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.trainer.finished import record
from tuneyard_trainer.reporting.comparison_rows import ComparisonRow
from tuneyard_trainer.reporting.comparisons import comparisons
from tuneyard_trainer.reporting.results import Results


def row(metrics: dict[str, float], **evidence: Any) -> ComparisonRow:
    """Return the only row of an evaluation with some metrics."""
    (found,) = Results.of({"evaluate": record("evaluate", metrics, evidence=evidence)}).comparisons
    return found


RIGHT = {"answerAccuracy": 0.875, "baseAnswerAccuracy": 0.5}


@pytest.mark.parametrize(
    ("metrics", "evidence", "shown"),
    [
        (RIGHT | {"questions": 16.0}, {}, ("8/16", "14/16", "+6", "better")),
        (RIGHT, {}, ("50 %", "88 %", "+38 points", "better")),
        (
            RIGHT,
            {"answerAccuracy": {"items": 8, "differenceInterval": [-0.1, 0.8]}},
            ("4/8", "7/8", "+3, no clear difference", "unclear"),
        ),
        ({"answerAccuracy": 0.5}, {}, ("\N{EN DASH}", "50 %", "", "")),
        ({"exactMatch": 0.5, "baseExactMatch": 0.5}, {}, ("50 %", "50 %", "", "")),
        ({"bleu": 12.345, "baseBleu": 20.0}, {}, ("20.00", "12.35", "", "worse")),
        ({"winRate": 0.75}, {}, ("50 % by chance", "75 %", "", "better")),
        ({"reward": 1.5, "startReward": 2.0}, {}, ("2.000", "1.500", "", "worse")),
        ({"repetition": 0.9, "startRepetition": 0.1}, {}, ("0.100", "0.900", "", "")),
        (
            {"sense/accuracy": 0.6254, "sense/baseAccuracy": 0.5},
            {"sense/accuracy": {"higherIsBetter": True}},
            ("0.500", "0.625", "", "better"),
        ),
    ],
)
def test_a_row_is_the_text_of_a_comparison(
    metrics: dict[str, float], evidence: dict[str, Any], shown: tuple[str, ...]
) -> None:
    found = row(metrics, **evidence)
    assert (found.base, found.tuned, found.change, found.verdict) == shown


def test_a_model_that_diverged_is_worse_than_any_base() -> None:
    metrics = {"answerAccuracy": math.nan, "baseAnswerAccuracy": 1.0}
    (found,) = map(ComparisonRow.of, comparisons(metrics, {}, per_token=True))
    assert (found.base, found.tuned, found.verdict) == ("100 %", "not a number", "worse")


def test_losses_have_their_relative_change_and_a_perplexity_that_follows_them() -> None:
    """Those that the evaluation does not have are of the training."""
    trained = record("sft", {"validationLoss": 9.0, "baseValidationLoss": 2.0})
    measured = record(
        "evaluate",
        {"validationLoss": 1.0},
        evidence={"validationLoss": {"differenceInterval": [-1.5, 0.1]}},
    )
    for records in ({"evaluate": measured}, {"sft": trained, "evaluate": measured}):
        loss, perplexity = Results.of(records).comparisons
        assert (loss.label, loss.tuned) == ("Held-out loss (nats per token)", "1.000")
        assert perplexity.tuned == "2.718"
        has_base = "sft" in records
        assert loss.base == ("2.000" if has_base else "\N{EN DASH}")
        unclear = ", no clear difference"
        assert loss.change == (f"\N{MINUS SIGN}50 %{unclear}" if has_base else "")
        assert perplexity.change == (f"\N{MINUS SIGN}63 %{unclear}" if has_base else "")


def test_the_loss_of_a_training_on_preferences_is_that_of_no_tokens() -> None:
    trained = record("dpo", {"validationLoss": 0.5, "baseValidationLoss": 0.7})
    (loss,) = Results.of({"dpo": trained}).comparisons
    assert (loss.label, loss.base, loss.tuned) == ("Held-out loss", "0.700", "0.500")
    evaluated = record("evaluate", {"winRate": 0.75})
    rows = Results.of({"dpo": trained, "evaluate": evaluated}).comparisons
    assert [each.label for each in rows] == ["Win rate by the judge"]
