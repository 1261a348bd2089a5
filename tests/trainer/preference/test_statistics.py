"""Statistics of preferences, against counts by hand and a straight loop."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tuneyard.api.sources import FieldMap
from tuneyard_trainer.data.reading.example import Message
from tuneyard_trainer.data.reading.rows import Row
from tuneyard_trainer.preference.rows import Preference, parse_preferences
from tuneyard_trainer.preference.statistics import MIN_COMPARISONS, PreferenceStatistics
from tuneyard_trainer.reporting.preferences import statistic_lines


def preference(prompt: str, *answers: str, **changes: Any) -> Preference:
    completions = tuple(Message("assistant", answer) for answer in answers)
    return Preference(1, (Message("user", prompt),), completions, **changes)


def counted(*preferences: Preference) -> PreferenceStatistics:
    statistics = PreferenceStatistics()
    for each in preferences:
        statistics.add(each, [len(completion.text) for completion in each.completions])
    return statistics


def test_agreement_is_the_share_of_pairs_of_verdicts_that_agree() -> None:
    statistics = counted(
        preference("Which?", "red", "blue"),
        preference("Which?", "red", "blue"),
        preference("Which?", "blue", "red"),
        preference("Other?", "red", "blue"),  # one verdict only
    )
    assert statistics.agreement == (pytest.approx(1 / 3), 1)  # of 3 pairs of verdicts, 1 agrees
    assert statistics.repeated == 1
    assert any("1 of 1 comparisons that were made again" in note for note in statistics.notes())


def test_the_same_verdict_again_is_agreement_and_no_contradiction() -> None:
    statistics = counted(*[preference("Which?", "red", "blue")] * 2)
    assert statistics.agreement == (1.0, 1)
    assert not any("contradicting" in note for note in statistics.notes())


def test_a_longer_answer_that_always_wins_is_named_as_a_bias() -> None:
    pairs = [preference(f"Ask {i}", "a long answer", "short") for i in range(MIN_COMPARISONS)]
    statistics = counted(*pairs)
    assert statistics.longer_wins == (1.0, MIN_COMPARISONS)
    assert any("the longer answer wins 100% of 50" in note for note in statistics.notes())


def test_no_bias_is_named_in_few_comparisons_or_where_half_are_won() -> None:
    few = counted(*[preference(f"Ask {i}", "a long answer", "short") for i in range(9)])
    assert few.notes() == []
    sides = [("long answer", "short"), ("short", "long answer")]
    even = counted(*[preference(f"Ask {i}", *sides[i % 2]) for i in range(100)])
    assert even.notes() == []


def test_for_single_completions_it_is_the_chance_that_a_good_one_is_longer_than_a_bad_one() -> None:
    chance = random.Random(3)
    good = [chance.randint(1, 9) for _ in range(40)]
    bad = [chance.randint(1, 12) for _ in range(30)]
    statistics = counted(
        *[preference(f"Good {i}", "x" * n, label=1.0) for i, n in enumerate(good)],
        *[preference(f"Bad {i}", "x" * n, label=0.0) for i, n in enumerate(bad)],
    )
    wins = sum((g > b) + (g == b) / 2 for g in good for b in bad) / (len(good) * len(bad))
    assert statistics.longer_wins == (pytest.approx(wins), 30)
    assert statistics.details()["rejected"] == 30


def test_ties_are_counted_and_compared_with_nothing() -> None:
    statistics = counted(preference("Which?", "red lamp", "blue", label=0.5))
    assert statistics.ties == 1
    assert statistics.longer_wins is None
    assert statistics.agreement is None


def test_answers_of_equal_score_are_counted_and_margins_are_differences_of_score() -> None:
    row = {"prompt": "Which?", "answers": ["red", "blue", "green"], "scores": [7.5, 2.0, 2.0]}
    (found,) = parse_preferences(Row(1, row), FieldMap(), labeled=False)
    assert (found.tied, found.margin) == (1, 5.5)
    details = counted(found).details()
    assert details["tiedAnswers"] == 1
    assert details["margins"] == [5.5] * 3


def test_ranks_have_no_margin_and_the_scores_of_a_pair_have_one() -> None:
    ranked = {"prompt": "Which?", "answers": ["red", "blue"], "ranks": [2, 1]}
    (found,) = parse_preferences(Row(1, ranked), FieldMap(), labeled=False)
    assert found.margin is None
    scored = {"prompt": "W?", "chosen": "red", "rejected": "b"}
    scored |= {"score_chosen": 8, "score_rejected": 6.5}
    (found,) = parse_preferences(Row(1, scored), FieldMap(), labeled=False)
    assert found.margin == 1.5


def test_a_ranking_compares_neighbors() -> None:
    statistics = counted(preference("Which?", "aaa", "bb", "c"))
    assert statistics.longer_wins == (1.0, 2)


def test_every_number_has_a_line() -> None:
    rows = [preference("Which?", "aaa", "bb", label=0.75, margin=2.0, tied=1)] * 2
    shown = dict(statistic_lines(counted(*rows).details(), "words"))
    assert shown == {
        "Preferences": "2",
        "Different prompts": "1",
        "By number of completions": "2: 2",
        "Equal to earlier ones": "1",
        "Ties": "0",
        "Answers left out for an equal score": "2",
        "Agreement of verdicts": "100% of 1 made again",
        "Mean probability": "0.75",
        "The longer one wins": "100% of 2",
        "Mean words, better and worse": "3.0 and 2.0",
        "Margin of score: 10%, 50%, 90%": "2, 2 and 2",
    }


def test_the_command_shows_the_statistics_of_preferences(tmp_path: Path) -> None:
    from tuneyard_trainer.local.check import row_statistics

    file = tmp_path / "pairs.jsonl"
    line = '{"prompt": "Which?", "chosen": "the red lamp", "rejected": "blue"}\n'
    file.write_text(line * 2 + '{"prompt": "Which?", "chosen": "red", "rejected": "red"}\n')
    shown = dict(row_statistics(file, "auto", FieldMap()))
    assert shown["Rows"] == "3"
    assert shown["Invalid rows"] == "1 IdenticalSides"
    assert shown["Preferences"] == "2"
    assert shown["Mean words, better and worse"] == "3.0 and 1.0"


def test_one_answer_with_both_labels_is_no_repetition() -> None:
    good, bad = (preference("Which?", "red", label=label) for label in (1.0, 0.0))
    assert counted(good, bad).repeated == 0
    assert counted(good, bad, good).repeated == 1
