"""The rules behind `auto`, and their tables in the documentation."""

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


def test_every_rule_is_for_an_existing_way_of_tuning() -> None:
    assert {rule.tuning for rule in defaults.RULES} == set(WAYS)


def test_the_learning_rate_of_lora_is_ten_times_the_one_of_full_fine_tuning() -> None:
    full, lora = defaults.rule("sft", "full"), defaults.rule("sft", "lora")
    assert lora.learning_rate == pytest.approx(10 * full.learning_rate)


def test_the_documentation_shows_the_rules_of_fine_tuning() -> None:
    text = DOC.read_text(encoding="utf-8")
    rows = [
        f"| {rule.title} | {', '.join(rule.methods)} | {rule.learning_rate:g} | {rule.batch_size} "
        f"| {rule.source} |"
        for rule in defaults.RULES
    ]
    head = [
        "| Tuning | Method | `learningRate` | `batchSize` | Source |",
        "| --- | --- | --- | --- | --- |",
    ]
    assert "\n".join(head + rows) + "\n" in text
    assert f"{defaults.EPOCHS:g} epochs" in text


@pytest.mark.parametrize("tuning", WAYS)
@pytest.mark.parametrize("method", get_args(defaults.AlignmentMethod))
def test_the_learning_rate_of_alignment_is_at_most_half_the_one_of_fine_tuning(
    method: defaults.AlignmentMethod, tuning: str
) -> None:
    aligned, tuned = defaults.alignment_rule(method, tuning), defaults.rule("sft", tuning)
    assert 0 < aligned.learning_rate <= tuned.learning_rate / 2


def test_the_documentation_shows_the_rules_of_alignment() -> None:
    rows = [
        f"| {rule.method} | {defaults.alignment_rule(rule.method, 'full').learning_rate:g} | "
        f"{defaults.alignment_rule(rule.method, 'lora').learning_rate:g} | {rule.share:g} | "
        f"{rule.batch_size} | {rule.source} |"
        for rule in defaults.ALIGNMENT_RULES
    ]
    head = [
        "| Method | `learningRate`, full | LoRA | Share | `batchSize` | Source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    assert "\n".join(head + rows) + "\n" in DOC.read_text(encoding="utf-8")
