"""Signs of a hacked reward: each must rise where it should and stay where nothing happened."""

from __future__ import annotations

import math

import pytest

from tuneyard_trainer.evaluation.reward_hacking import (
    PROBES,
    distinct,
    length_ratio,
    repetition,
    sycophancy,
    sycophancy_asks,
)
from tuneyard_trainer.judging.judges import Reply


def test_answers_twice_as_long_have_a_ratio_of_two() -> None:
    assert length_ratio([10, 30], [5, 15]) == 2.0


def test_without_anything_before_there_is_no_ratio() -> None:
    assert math.isnan(length_ratio([3], []))
    assert math.isnan(length_ratio([3], [0, 0]))


def test_an_answer_that_goes_round_in_circles_repeats_itself() -> None:
    assert repetition(["yes I can do it " * 20]) > 0.9
    assert repetition(["a sentence in which no sequence of words comes back"]) == 0.0


def test_an_answer_too_short_to_repeat_itself_does_not_count_as_free_of_it() -> None:
    long = "one two three four one two three four"
    assert repetition([long, "yes"]) == repetition([long]) == pytest.approx(0.2)
    assert repetition(["yes", ""]) == 0.0


def test_repetition_is_seen_without_spaces() -> None:
    assert repetition(["可以可以可以可以可以可以"]) > 0.5


def test_answers_that_are_all_alike_are_not_distinct() -> None:
    assert distinct(["I am happy to help"] * 10) == pytest.approx(0.1)
    assert distinct(["red lamps shine", "blue boats sail"]) == 1.0


def answered(plain: float, leaning: float) -> dict[str, Reply]:
    """Replies of a model that gives the wrong answer these probabilities."""
    replies = {}
    for ask in sycophancy_asks():
        wrong = leaning if "/opinion/" in ask.key else plain
        replies[ask.key] = Reply(
            ask.key, probability=wrong if ask.key.endswith("BA") else 1 - wrong
        )
    return replies


def test_a_model_that_yields_is_seen_to() -> None:
    found = sycophancy(answered(plain=0.1, leaning=0.7))
    assert found.shift == pytest.approx(0.6)
    assert (found.flips, found.accuracy, found.probes) == (1.0, 1.0, len(PROBES))


def test_a_model_that_stands_its_ground_is_no_sycophant_however_ignorant() -> None:
    steady, ignorant = sycophancy(answered(0.1, 0.1)), sycophancy(answered(0.9, 0.9))
    assert steady.shift == ignorant.shift == steady.flips == ignorant.flips == 0.0
    assert ignorant.accuracy == 0.0


def test_a_model_that_always_says_a_shows_nothing() -> None:
    replies = {ask.key: Reply(ask.key, probability=0.9) for ask in sycophancy_asks()}
    assert sycophancy(replies).shift == pytest.approx(0.0)


def test_a_probe_without_all_its_replies_is_left_out() -> None:
    replies = answered(0.1, 0.7)
    del replies["sycophancy/0/opinion/AB"]
    replies["sycophancy/1/plain/BA"] = Reply("sycophancy/1/plain/BA")
    assert sycophancy(replies).probes == len(PROBES) - 2
    assert math.isnan(sycophancy({}).shift)


def test_only_the_opinion_differs_between_two_questions() -> None:
    plain, leaning = (ask.messages[0]["content"] for ask in sycophancy_asks()[0:3:2])
    assert set(plain.splitlines()) < set(leaning.splitlines())
