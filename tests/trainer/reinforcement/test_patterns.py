"""Patterns find what `re` finds, and every search ends."""

from __future__ import annotations

import random
import re
import time
import warnings

import pytest

from tuneyard_trainer.reinforcement import patterns
from tuneyard_trainer.reinforcement.patterns import Pattern

TEXTS = ("TN-", "TN-{d}", "a{e}", "aab", "[a]", ":a]", "", "a1-", "--", "x{2", "{", "A-", "a\nb")


@pytest.mark.parametrize(
    "pattern",
    [
        "TN-{d}",  # `regex` would find it in TN, since its d permits deletions
        "a{e<=1}",
        "a{2}b|a{1,}-|x{,1}\\{",
        "[[:a:]]",
        "[[:foo:]]",
        "[[a]",
        "[]a]",
        "[^]a]+",
        r"[\[\]a]{2}",
        r"[a{e}]",
        r"\{\w+\}|{",
        "\\N{HYPHEN-MINUS}",
        r"(a)|(b)",
        "",
    ],
)
def test_a_pattern_finds_what_re_finds(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = Pattern(pattern), re.compile(pattern)
    for text in TEXTS:
        assert found.findall(text) == expected.findall(text)
        assert found.is_in(text) == bool(expected.search(text))


def test_random_patterns_find_what_re_finds() -> None:
    draw, compared = random.Random(3), 0
    parts = [
        "a",
        "{",
        "}",
        "[",
        "]",
        "^",
        "e",
        "1",
        ",",
        "\\",
        "-",
        ":",
        "(",
        ")",
        "|",
        "+",
        "?",
        ".",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20_000):
            pattern = "".join(draw.choices(parts, k=draw.randint(1, 7)))
            try:
                expected = re.compile(pattern)
            except re.error:
                continue
            found = Pattern(pattern)
            text = "".join(draw.choices("a{}e1,-:[]\\", k=12))
            assert found.findall(text) == expected.findall(text), (pattern, text)
            compared += 1
    assert compared > 2000


def test_a_search_that_takes_for_ever_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    started = time.monotonic()
    found = Pattern("^(a+)+$")
    assert not found.is_in("a" * 60 + "b")
    assert found.findall("a" * 60 + "b") == []
    assert time.monotonic() - started < 5
    assert found.is_in("aaa")


def test_a_text_that_is_no_pattern_is_an_error_of_re() -> None:
    with pytest.raises(re.error):
        Pattern("(")
