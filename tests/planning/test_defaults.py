"""The rules behind `auto`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from tuneyard.api.adapters import Adapter
from tuneyard.planning import defaults

DOC = Path(__file__).parents[2] / "docs" / "defaults.md"
WAYS = ("full", *Adapter.members())


@pytest.mark.parametrize("tuning", WAYS)
@pytest.mark.parametrize("method", get_args(defaults.Method))
def test_every_way_of_tuning_has_exactly_one_rule_for_each_method(
    method: defaults.Method, tuning: str
) -> None:
    rules = [r for r in defaults.RULES if r.tuning == tuning and method in r.methods]
    assert rules == [defaults.rule(method, tuning)]


def test_no_rule_is_for_a_way_of_tuning_that_does_not_exist() -> None:
    assert {rule.tuning for rule in defaults.RULES} == set(WAYS)


def test_lora_learns_ten_times_as_fast_as_full_fine_tuning() -> None:
    full, lora = defaults.rule("sft", "full"), defaults.rule("sft", "lora")
    assert lora.learning_rate == pytest.approx(10 * full.learning_rate)


def test_the_documentation_shows_the_rules_that_the_code_applies() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert defaults.table() in text
    assert f"{defaults.EPOCHS:g} epochs" in text


@pytest.mark.parametrize("tuning", WAYS)
@pytest.mark.parametrize("method", get_args(defaults.AlignmentMethod))
def test_alignment_learns_more_slowly_than_fine_tuning(
    method: defaults.AlignmentMethod, tuning: str
) -> None:
    aligned, tuned = defaults.alignment_rule(method, tuning), defaults.rule("sft", tuning)
    assert 0 < aligned.learning_rate <= tuned.learning_rate / 2


def test_the_documentation_shows_the_rules_of_alignment() -> None:
    assert defaults.alignment_table() in DOC.read_text(encoding="utf-8")
