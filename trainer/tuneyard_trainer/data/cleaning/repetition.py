"""Repetition inside a row: lines, paragraphs and word sequences that occur again.

The thresholds are those of MassiveText (Rae et al. 2021, arXiv:2112.11446, table A1), which were
chosen for documents of at least 50 words. Shorter rows are not judged: one word repeats itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tuneyard_trainer.data.cleaning.findings import Cleaned, Finding
from tuneyard_trainer.data.cleaning.text import conversation
from tuneyard_trainer.data.reading.example import Example

MIN_WORDS = 50
LINES, LINE_CHARACTERS = 0.30, 0.20
PARAGRAPHS, PARAGRAPH_CHARACTERS = 0.30, 0.20
TOP_SEQUENCE = {2: 0.20, 3: 0.18, 4: 0.16}
"""The most characters of the commonest word sequence, as a share of the text, by its length."""
SEQUENCES = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""The most characters of repeated word sequences, as a share of the text, by their length."""


def repetition(example: Example) -> Cleaned:
    """Remove a row that repeats itself."""
    text = conversation(example)
    words = text.split()
    if len(words) < MIN_WORDS:
        return Cleaned(example)
    for case, share in _repeated(text, words):
        note = f"{share:.0%} repeated"
        return Cleaned(example, (Finding(f"repetition.{case}", "removed", text, note=note),))
    return Cleaned(example)


def _repeated(text: str, words: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield each case whose threshold is exceeded, with the share that is repeated."""
    for case, parts, most, most_characters in (
        ("lines", text.split("\n"), LINES, LINE_CHARACTERS),
        ("paragraphs", text.split("\n\n"), PARAGRAPHS, PARAGRAPH_CHARACTERS),
    ):
        parts = [part.strip() for part in parts if part.strip()]
        again = repeated_parts(parts)
        shares = (
            len(again) / len(parts),
            sum(map(len, again)) / sum(map(len, parts)),
        )
        if shares[0] > most or shares[1] > most_characters:
            yield case, max(shares)
    characters = len(text)
    for size, most in TOP_SEQUENCE.items():
        sequence, count = Counter(zip(*(words[i:] for i in range(size)), strict=False)).most_common(
            1
        )[0]
        share = count * (sum(map(len, sequence)) + size - 1) / characters
        if count > 1 and share > most:
            yield f"top{size}Words", share
    for size, most in SEQUENCES.items():
        repeated = _repeated_characters(words, size)
        if not repeated:
            return  # longer sequences do not repeat either
        if repeated / characters > most:
            yield f"sequences{size}Words", repeated / characters


def repeated_parts(parts: Sequence[str]) -> list[str]:
    """Return the parts that equal an earlier one."""
    if len(set(parts)) == len(parts):
        return []
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def _repeated_characters(words: Sequence[str], size: int) -> int:
    """Return the characters of the word sequences that occurred before, without overlap."""
    sequences = list(zip(*(words[i:] for i in range(size)), strict=False))
    if len(set(sequences)) == len(sequences):
        return 0
    seen: set[tuple[str, ...]] = set()
    characters = index = 0
    while index < len(sequences):
        if sequences[index] in seen:
            characters += sum(map(len, sequences[index])) + size - 1
            index += size
        else:
            seen.add(sequences[index])
            index += 1
    return characters
