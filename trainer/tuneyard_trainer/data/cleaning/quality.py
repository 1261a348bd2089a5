"""Published rules of quality for web documents.

gopher: MassiveText (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1). Its stop words are English.
fineweb: the rules that FineWeb adds (Penedo et al. 2024, arXiv:2406.17557, section 3.6).
"""

from __future__ import annotations

from tuneyard_trainer.data.cleaning.findings import Cleaned, Finding
from tuneyard_trainer.data.cleaning.repetition import repeated_parts
from tuneyard_trainer.data.cleaning.text import conversation
from tuneyard_trainer.data.reading.example import Example

WORDS = (50, 100_000)
MEAN_WORD_LENGTH = (3, 10)
SYMBOLS_PER_WORD = 0.1
"""Hashes, or ellipses, for each word."""
BULLET_LINES, ELLIPSIS_LINES = 0.9, 0.3
WORDS_WITH_A_LETTER = 0.8
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
FEWEST_STOP_WORDS = 2
_BULLETS = ("•", "-", "*", "‣", "●")
_ELLIPSES = ("...", "…")

FINISHED_LINES = 0.12
"""The least share of lines that end with a punctuation mark."""
REPEATED_LINE_CHARACTERS = 0.1
SHORT_LINES, SHORT_LINE = 0.67, 30
_ENDS = (
    *(".", "!", "?", '"', "'", "”", "…", "。", "！", "？", "：", ":", ";"),  # noqa: RUF001
    *("।", "॥", "؟", "۔", "؛", "։", "።", "།", "၊", "။", "។"),  # noqa: RUF001
)
"""Punctuation marks, also those of the scripts of India, Arabic, Urdu, Armenian, Ethiopic, Tibetan,
Burmese and Khmer."""


def gopher(example: Example) -> Cleaned:
    """Remove a row that breaks one of MassiveText's rules of quality."""
    text = conversation(example)
    case = _gopher(text)
    return Cleaned(example, _removed(f"gopher.{case}", text) if case else ())


def _gopher(text: str) -> str | None:
    words = text.split()
    count = len(words)
    if not WORDS[0] <= count <= WORDS[1]:
        return "wordCount"
    if not MEAN_WORD_LENGTH[0] <= sum(map(len, words)) / count <= MEAN_WORD_LENGTH[1]:
        return "meanWordLength"
    if text.count("#") > SYMBOLS_PER_WORD * count:
        return "hashes"
    if sum(map(text.count, _ELLIPSES)) > SYMBOLS_PER_WORD * count:
        return "ellipses"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > BULLET_LINES * len(lines):
        return "bulletLines"
    if sum(line.endswith(_ELLIPSES) for line in lines) > ELLIPSIS_LINES * len(lines):
        return "ellipsisLines"
    if sum(any(map(str.isalpha, word)) for word in words) < WORDS_WITH_A_LETTER * count:
        return "wordsWithoutLetters"
    if len(STOP_WORDS.intersection(map(str.lower, words))) < FEWEST_STOP_WORDS:
        return "stopWords"
    return None


def fineweb(example: Example) -> Cleaned:
    """Remove a row that breaks one of FineWeb's own rules."""
    text = conversation(example)
    case = _fineweb(text)
    return Cleaned(example, _removed(f"fineweb.{case}", text) if case else ())


def _fineweb(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if sum(line.endswith(_ENDS) for line in lines) <= FINISHED_LINES * len(lines):
        return "unfinishedLines"
    repeated = sum(map(len, repeated_parts(lines)))
    if repeated >= REPEATED_LINE_CHARACTERS * sum(map(len, lines)):
        return "repeatedLines"
    if sum(len(line) < SHORT_LINE for line in lines) >= SHORT_LINES * len(lines):
        return "shortLines"
    return None


def _removed(rule: str, text: str) -> tuple[Finding, ...]:
    return (Finding(rule, "removed", text),)
