"""The words of an answer that another answer does not have at that place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

MOST_WORDS = 400
"""Longer texts are not compared: the time grows with the square of the words."""
LEAST_ALIKE = 0.4
"""Texts that are less alike are not marked: nearly all of their words differ."""


class Part(NamedTuple):
    """A part of a text."""

    text: str
    differs: bool


def differing(text: str, other: str | None) -> list[Part]:
    """Return the parts of a text, with its words that are not in `other` marked."""
    words, others = _words(text), _words(other or "")
    if other is None or not words or max(len(words), len(others)) > MOST_WORDS:
        return [Part(text, False)]
    matcher = SequenceMatcher(None, others, words, autojunk=False)
    if matcher.ratio() < LEAST_ALIKE:
        return [Part(text, False)]
    blocks = (
        Part("".join(words[start:end]), kind != "equal")
        for kind, _, _, start, end in matcher.get_opcodes()
        if end > start
    )
    return _joined([*blocks])


def _words(text: str) -> list[str]:
    """Return words and the white space between them."""
    return re.findall(r"\s+|\S+", text)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Return the parts without marks of white space alone."""
    return [Part(text, differs and bool(text.strip())) for text, differs in parts]
