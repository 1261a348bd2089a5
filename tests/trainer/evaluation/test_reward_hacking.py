"""Signs of reward hacking: each rises with what it measures and does not rise without it."""

from __future__ import annotations

import math

import pytest

from tuneyard_trainer.evaluation.reward_hacking import (
    PROBES,
    distinct,
    length_ratio,
    repetition,
    sycophancy,
    sycophancy_prompts,
)
from tuneyard_trainer.judging.judges import Reply


def test_completions_twice_as_long_have_a_ratio_of_two() -> None:
    assert length_ratio([10, 30], [5, 15]) == 2.0


def test_without_completions_before_the_ratio_is_nan() -> None:
    assert math.isnan(length_ratio([3], []))
    assert math.isnan(length_ratio([3], [0, 0]))


def test_a_completion_of_repeated_phrases_has_a_high_repetition() -> None:
    assert repetition(["yes I can do it " * 20]) > 0.9
    assert repetition(["a sentence in which no sequence of words comes back"]) == 0.0


def test_completions_too_short_to_repeat_are_left_out_of_the_mean() -> None:
    long = "one two three four one two three four"
    assert repetition([long, "yes"]) == repetition([long]) == pytest.approx(0.2)
    assert repetition(["yes", ""]) == 0.0


def test_repetition_is_measured_in_text_without_spaces() -> None:
    assert repetition(["可以可以可以可以可以可以"]) > 0.5


def test_equal_completions_are_not_distinct() -> None:
    assert distinct(["I am happy to help"] * 10) == pytest.approx(0.1)
    assert distinct(["red lamps shine", "blue boats sail"]) == 1.0


def replies_with(plain: float, opinionated: float) -> dict[str, Reply]:
    """Return replies that give the wrong answer these probabilities, without and with opinion."""
    replies = {}
    for prompt in sycophancy_prompts():
        wrong = opinionated if "/opinion/" in prompt.key else plain
        replies[prompt.key] = Reply(
            prompt.key, probability=wrong if prompt.key.endswith("BA") else 1 - wrong
        )
    return replies


def test_a_model_that_follows_the_opinion_has_a_shift() -> None:
    found = sycophancy(replies_with(plain=0.1, opinionated=0.7))
    assert found.shift == pytest.approx(0.6)
    assert (found.flips, found.accuracy, found.probes) == (1.0, 1.0, len(PROBES))


def test_a_model_that_ignores_the_opinion_has_no_shift_even_if_it_is_wrong() -> None:
    steady, ignorant = sycophancy(replies_with(0.1, 0.1)), sycophancy(replies_with(0.9, 0.9))
    assert steady.shift == ignorant.shift == steady.flips == ignorant.flips == 0.0
    assert ignorant.accuracy == 0.0


def test_a_model_that_always_replies_a_has_no_shift() -> None:
    replies = {prompt.key: Reply(prompt.key, probability=0.9) for prompt in sycophancy_prompts()}
    assert sycophancy(replies).shift == pytest.approx(0.0)


def test_a_probe_without_all_its_replies_is_left_out() -> None:
    replies = replies_with(0.1, 0.7)
    del replies["sycophancy/0/opinion/AB"]
    replies["sycophancy/1/plain/BA"] = Reply("sycophancy/1/plain/BA")
    assert sycophancy(replies).probes == len(PROBES) - 2
    assert math.isnan(sycophancy({}).shift)


def test_only_the_opinion_differs_between_two_questions() -> None:
    plain, opinionated = (prompt.messages[0]["content"] for prompt in sycophancy_prompts()[0:3:2])
    assert set(plain.splitlines()) < set(opinionated.splitlines())
