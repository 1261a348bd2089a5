"""An answer is right if it contains the words of an expected text."""

from __future__ import annotations

import pytest

from tuneyard_trainer.reporting.answers import is_right


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("The warranty lasts four years.", "four years"),
        ("It is the LEFT wheel!", "left wheel"),
        ("It is left  \n wheel", "The left wheel"),  # an article more or less
        ("**Paris**—the capital of France", "paris"),
        ("(forty-five days)", "forty five days"),
        ("The newest firmware is 6.2.", "6.2"),
        ("It cuts 26cm wide, 700m² in all", "26 cm"),
        ("It cuts 26cm wide, 700m² in all", "700"),
        ("It costs 1,000 euros", "1000"),
        ("It costs 1000 euros", "1,000"),
        ("It costs 6,25 euros", "6,25"),
        ("The answer is A.", "A"),
        ("a ≤ b", "≤"),
        ("首都是东京。", "东京"),
        ("the ﬁrst", "first"),  # a ligature
        ("It is _four_ years", "four"),  # Markdown
        ("It is \u22125 degrees", "-5"),
        ("pages 3-5", "5"),
        ("COVID-19", "19"),
        ("राजधानी दिल्ली है", "दिल्ली"),
    ],
)
def test_case_punctuation_and_articles_do_not_matter(completion: str, expected: str) -> None:
    assert is_right(completion, ("something else", expected))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("The warranty lasts fourteen years.", "four"),
        ("The warranty lasts four years.", ""),
        ("The warranty lasts four years.", " "),
        ("The PIN is 77889.", "7788"),
        ("The PIN is 7788.", "88"),
        ("The firmware is 6.2.", "6"),
        ("The firmware is 6.2.", "62"),
        ("The firmware is 16.2.", "6.2"),
        ("The code is E4.", "4"),
        ("There is no notice.", "not"),
        ("It is a theory.", "the"),
        ("left, then the other wheel", "left wheel"),
        ("wheel left", "left wheel"),
        ("", "left"),
        ("a", "the"),
        ("four", "4"),
        ("It is -5 degrees", "5"),
        ("It is 5 degrees", "-5"),
        ("It is (-5)", "5"),
        ("It weighs .5 kg", "5"),
        ("उसका नाम कमला है", "कमल"),  # the last vowel is a mark of its own
        ("दिल्ली", "द"),
    ],
)
def test_a_part_of_a_word_or_number_is_no_answer(completion: str, expected: str) -> None:
    """Neither are the words in another order, or apart."""
    assert not is_right(completion, (expected,))


def test_without_an_expected_text_nothing_is_right() -> None:
    assert not is_right("anything", ())
