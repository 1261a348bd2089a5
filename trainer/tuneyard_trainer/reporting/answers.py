"""The rule by which an answer is right: it contains the words of an expected text.

Texts are compared as sequences of words, as SQuAD's metric does (Rajpurkar et al. 2016,
arXiv:1606.05250): without case, punctuation and the articles a, an and the. The answer is a
sentence here, so the words are searched in it. Therefore punctuation separates words, where SQuAD
removes it ("Paris—the capital"), and a number is a word of its own ("26cm"), with its sign and its
decimal point and without thousands separators. A hyphen after a word is no sign ("3-5"). In scripts
without spaces each character is a word, as in MLQA's metric (Lewis et al. 2020, arXiv:1910.07475).

"four" and "4" are different words: list both as expected texts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

_ARTICLES = frozenset(("a", "an", "the"))
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Han
)
_NUMBER = r"(?:(?<![^ ])-)?(?:(?<![^ -])\.)?\d+(?:[.,]\d+)*"
_WORD = re.compile(rf"{_NUMBER}|[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^ .,-])+")


def is_right(completion: str, expected: Sequence[str]) -> bool:
    """Return whether a completion contains the words of any expected text, one after another."""
    return any(_contains(completion, text) for text in expected)


def _contains(completion: str, text: str) -> bool:
    words, wanted = _words(completion), _words(text)
    if not wanted:  # a text of symbols has no words
        return bool(text.strip()) and text in completion
    if not _ARTICLES.issuperset(wanted):  # the choice "A" is no article
        words, wanted = _without_articles(words), _without_articles(wanted)
    count = len(wanted)
    return any(words[at : at + count] == wanted for at in range(len(words) - count + 1))


@lru_cache(maxsize=1 << 12)  # an answer is searched for each class
def _words(text: str) -> Sequence[str]:
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    spaced = "".join(char if _is_kept(char) else " " for char in _SEPARATOR.sub("", folded))
    return _WORD.findall(spaced)


def _is_kept(char: str) -> bool:
    """Return whether a character is part of words or numbers. Scripts such as Devanagari write
    vowels as marks (categories Mn and Mc)."""
    return char.isalnum() or char in ".,-" or unicodedata.category(char).startswith("M")


def _without_articles(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in _ARTICLES]
