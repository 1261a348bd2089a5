"""Words of texts as hashes, and hashes of word sequences, for whole batches at a time.

Hashes do not depend on the process, so that the same rows always have the same duplicates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.data.texts import text_hash

_EACH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Characters of Japanese and Chinese, which are written without spaces: each counts as a word."""
_MARKS = (
    "\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    "\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"
    "\u0900-\u0903\u093a-\u093c\u093e-\u094f\u0951-\u0957\u0962\u0963"
    "\u0981-\u0983\u09bc\u09be-\u09cd\u09d7\u0a01-\u0a03\u0a3c-\u0a51\u0a70\u0a71"
    "\u0a81-\u0a83\u0abc\u0abe-\u0acd\u0b01-\u0b03\u0b3c\u0b3e-\u0b57\u0b82\u0bbe-\u0bcd"
    "\u0bd7\u0c00-\u0c04\u0c3c\u0c3e-\u0c56\u0c81-\u0c83\u0cbc\u0cbe-\u0cd6"
    "\u0d00-\u0d03\u0d3b\u0d3c\u0d3e-\u0d4d\u0d57\u0d81-\u0d83\u0dca-\u0ddf\u200c\u200d"
)
"""Vowels and other marks of scripts with spaces between words, which are no word characters of
`re`: accents, Hebrew and Arabic points, and the signs of the scripts of India and Sri Lanka."""
_WORD = re.compile(rf"[{_EACH}]|[^\W{_EACH}]+(?:[{_MARKS}]+[^\W{_EACH}]*)*")
_ASCII_WORD = re.compile(r"[a-z0-9_]+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_HALF = np.uint64(33)
MEMORIZED = 1 << 18
"""The most words whose hashes are kept, which takes about 40 MB."""

Hashes = NDArray[np.uint64]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    lowered = text.lower()
    return (_ASCII_WORD if lowered.isascii() else _WORD).findall(lowered)


class WordHashes(dict[str, int]):
    """Maps each word to its hash, and forgets all when it holds MEMORIZED words."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MEMORIZED:
            self.clear()
        found = self[word] = text_hash(word)
        return found


class WordRows(NamedTuple):
    """The words of a batch of rows, as hashes."""

    hashes: Hashes
    """Flat, row after row."""
    lengths: NDArray[np.int64]
    """(R,) words of each row."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[str]], known: WordHashes) -> WordRows:
        """Return the hashes of rows of words. `known` is kept from batch to batch."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = map(known.__getitem__, chain.from_iterable(rows))
        return cls(np.fromiter(flat, np.uint64, int(lengths.sum())), lengths)

    def padded(self, size: int) -> WordRows:
        """Return the rows with zeros at the end of those of fewer than `size` words."""
        lengths = np.maximum(self.lengths, size)
        starts = np.cumsum(lengths) - lengths
        within = np.arange(len(self.hashes)) - np.repeat(
            np.cumsum(self.lengths) - self.lengths, self.lengths
        )
        flat = np.zeros(int(lengths.sum()), np.uint64)
        flat[np.repeat(starts, self.lengths) + within] = self.hashes
        return WordRows(flat, lengths)


class Grams(NamedTuple):
    """The word sequences of a batch of rows."""

    hashes: Hashes
    """(G,) one hash for each sequence."""
    offsets: NDArray[np.uint64]
    """(R + 1,) row i has the sequences offsets[i]:offsets[i + 1], by position."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """(G,) the row of each sequence."""
        ends = self.offsets.astype(np.int64)
        return np.repeat(np.arange(len(ends) - 1), ends[1:] - ends[:-1])


def grams(rows: WordRows, size: int) -> Grams:
    """Return the sequences of `size` words of each row: none of a row of fewer words."""
    flat, lengths = rows
    counts = np.maximum(lengths - size + 1, 0)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.uint64)
    if len(flat) < size:
        return Grams(np.zeros(0, np.uint64), offsets)
    rolled = np.zeros(len(flat) - size + 1, np.uint64)
    for step in range(size):
        rolled = rolled * _PRIME + flat[step : step + len(rolled)]
    ends = np.repeat(np.cumsum(lengths), lengths)[: len(rolled)]
    return Grams(_mixed(rolled[np.arange(len(rolled)) + size <= ends]), offsets)


def _mixed(hashes: Hashes) -> Hashes:
    """Return the hashes with all bits depending on all bits (the finalizer of MurmurHash3)."""
    mixed = (hashes ^ (hashes >> _HALF)) * _MIX
    return mixed ^ (mixed >> _HALF)
