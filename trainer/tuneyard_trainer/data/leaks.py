"""Leaks: held-out rows whose text is also in the training rows.

Two searches find them. overlap: 13 words in sequence are in both (Brown et al. 2020,
arXiv:2005.14165, appendix C). A sequence that occurs in training more than 10 times is a common
phrase and counts as none, as in that paper; the same holds for one that many held-out rows share.
near: the rows have nearly the same words, which also finds short rows and copies. System turns are
left out, since rows share them by design.

Memory holds 16 bytes for each held-out word and 70 for each held-out row; training rows stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.data.cleaning.excerpts import excerpt, harmless
from tuneyard_trainer.data.cleaning.signatures import (
    SIMILARITY,
    Bands,
    bands,
    similarity,
    word_rows,
)
from tuneyard_trainer.data.cleaning.text import written
from tuneyard_trainer.data.cleaning.words import Grams, Hashes, WordHashes, WordRows, grams, words
from tuneyard_trainer.data.texts import Texts

SEQUENCE = 13
"""Words of a sequence."""
COMMON = 10
"""Occurrences in training above which a sequence is a common phrase, as in the paper; also the most
held-out rows that may share one."""
LEAKS_SHOWN = 10
"""The leaks that are shown with their spans."""
BATCH_ROWS = 512
_FILTER_BITS = 22
"""Bits of an address in the filter that spares most lookups; it takes 4 MB."""
_COMPARED_WORDS = 2000
"""Words of a row in which the longest common span is searched."""


class Leak(NamedTuple):
    """A held-out row and a training row that it was found in."""

    held_out: int
    """Number of the held-out row, from 0."""
    training: int
    """Number of the training row, from 0."""
    kind: Literal["overlap", "near"]
    span: str
    """The longest sequence of words that is in both rows, bounded and without secrets."""
    span_words: int
    """Words of that sequence."""
    row_words: int
    """Words of the held-out row: a short span of a long row is hardly a leak."""


class Leaks(NamedTuple):
    """The leaks of a split."""

    checked: int
    """Held-out rows."""
    rows: int
    """Held-out rows with a leak."""
    overlap: int
    """Held-out rows that share a sequence with training."""
    near: int
    """Held-out rows with nearly the words of a training row."""
    shown: tuple[Leak, ...]
    """The first leaks, one for each held-out row."""


def find_leaks(held_out: Texts, training: Texts, trained: NDArray[np.bool_]) -> Leaks:
    """Return the leaks. `trained`: (R,) True for the rows of `training` that are trained on."""
    search = _Search(held_out, training)
    for numbers in _batches(np.flatnonzero(trained)):
        search.add(numbers)
    overlap = search.overlapping()
    near = search.near >= 0
    leaking = np.flatnonzero((overlap >= 0) | near)
    shown = []
    for row in leaking[:LEAKS_SHOWN].tolist():
        kind: Literal["overlap", "near"] = "near" if near[row] else "overlap"
        of = int(search.near[row] if near[row] else overlap[row])
        shown.append(_leak(row, of, kind, held_out[row], training[of]))
    return Leaks(
        checked=len(held_out),
        rows=len(leaking),
        overlap=int((overlap >= 0).sum()),
        near=int(near.sum()),
        shown=tuple(shown),
    )


class _Search:
    """The held-out rows, and the training rows that they were found in so far."""

    def __init__(self, held_out: Texts, training: Texts) -> None:
        self._held_out, self._training = held_out, training
        self._known = WordHashes()
        sequences: list[Hashes] = []
        parts: list[Bands] = []
        for numbers in _batches(np.arange(len(held_out))):
            rows = self._read(held_out, numbers)
            found = grams(rows, SEQUENCE)
            pairs = np.stack((found.hashes, found.rows.astype(np.uint64)), axis=1)
            sequences.append(np.unique(pairs, axis=0)[:, 0])
            parts.append(bands(rows))
        self._keys: Hashes = _uncommon(sequences)
        self._counts = np.zeros(len(self._keys), np.uint32)
        self._first = np.zeros(len(self._keys), np.uint32)
        self._filter = np.zeros(1 << _FILTER_BITS, np.bool_)
        self._filter[_addresses(self._keys)] = True
        every = np.concatenate(parts)
        self._band_rows = np.argsort(every, axis=0, kind="stable").astype(np.uint32)
        self._bands = np.take_along_axis(every, self._band_rows.astype(np.int64), axis=0)
        self.near: NDArray[np.int64] = np.full(len(held_out), -1)
        """(H,) the training row with nearly the words of each held-out row. -1: none yet."""

    def add(self, numbers: NDArray[np.int64]) -> None:
        """Search training rows, in ascending order."""
        rows = self._read(self._training, numbers)
        found = grams(rows, SEQUENCE)
        keys, places = self._lookup(found)
        first = np.zeros(len(self._keys), np.bool_)
        first[keys[self._counts[keys] == 0]] = True
        # The last assignment to an element stays: in reverse order, that of the first row.
        fresh = first[keys][::-1]
        self._first[keys[::-1][fresh]] = numbers[found.rows[places]][::-1][fresh]
        np.add.at(self._counts, keys, 1)
        for training, row in self._meetings(numbers, bands(rows)):
            if self.near[row] < 0 and self._similarity(row, training) >= SIMILARITY:
                self.near[row] = training

    def overlapping(self) -> NDArray[np.int64]:
        """Return (H,) a training row that shares a sequence with each held-out row: the first for
        the first such sequence that is no common phrase. -1: there is none."""
        rows = np.full(len(self._held_out), -1)
        for numbers in _batches(np.arange(len(self._held_out))):
            found = grams(self._read(self._held_out, numbers), SEQUENCE)
            keys, places = self._lookup(found)
            counts = self._counts[keys]
            leaks = (counts > 0) & (counts <= COMMON)
            reverse = slice(None, None, -1)
            rows[numbers[found.rows[places[leaks]]][reverse]] = self._first[keys[leaks]][reverse]
        return rows

    def _read(self, texts: Texts, numbers: NDArray[np.int64]) -> WordRows:
        return word_rows((written(texts[number])[1] for number in numbers.tolist()), self._known)

    def _lookup(self, found: Grams) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (M,) the keys that sequences are equal to, and (M,) the places of these."""
        places = np.flatnonzero(self._filter[_addresses(found.hashes)])
        if not len(self._keys):
            return places[:0], places[:0]
        keys = np.searchsorted(self._keys, found.hashes[places])
        keys[keys == len(self._keys)] = 0
        equal = self._keys[keys] == found.hashes[places]
        return keys[equal], places[equal]

    def _meetings(self, numbers: NDArray[np.int64], signed: Bands) -> Iterator[tuple[int, int]]:
        """Yield each training row and held-out row that share a band, in the order of `numbers`."""
        pairs: set[tuple[int, int]] = set()
        for band in range(signed.shape[1]):
            ours, theirs = self._bands[:, band], signed[:, band]
            starts = np.searchsorted(ours, theirs, "left")
            ends = np.searchsorted(ours, theirs, "right")
            for each in np.flatnonzero(ends > starts).tolist():
                rows = self._band_rows[starts[each] : ends[each], band].tolist()
                pairs.update((int(numbers[each]), row) for row in rows if self.near[row] < 0)
        yield from sorted(pairs)

    def _similarity(self, row: int, training: int) -> float:
        texts = (written(self._held_out[row])[1], written(self._training[training])[1])
        return similarity(word_rows(texts, self._known))


def _leak(
    row: int,
    training: int,
    kind: Literal["overlap", "near"],
    held_out: Mapping[str, Any],
    trained: Mapping[str, Any],
) -> Leak:
    # Without their punctuation, addresses and keys would not be found in the span.
    ours, theirs = (words(harmless(written(text)[1])) for text in (held_out, trained))
    start, size = _common_span(ours, theirs)
    span = excerpt(" ".join(ours[start : start + size]))
    return Leak(row, training, kind, span, size, len(ours))


def _common_span(ours: Sequence[str], theirs: Sequence[str]) -> tuple[int, int]:
    """Return the start and the length of the longest sequence of `ours` that is in `theirs`, or of
    one that goes on from a common sequence where the rows are long."""
    known = set(zip(*(theirs[i:] for i in range(SEQUENCE)), strict=False))
    best = (0, 0)
    start = None
    sequences = [*zip(*(ours[i:] for i in range(SEQUENCE)), strict=False), ()]
    for place, sequence in enumerate(sequences):
        if sequence in known:
            start = place if start is None else start
        elif start is not None:
            best = max(best, (start, place - start + SEQUENCE - 1), key=lambda span: span[1])
            start = None
    if best[1]:
        return best
    matcher = SequenceMatcher(None, ours[:_COMPARED_WORDS], theirs[:_COMPARED_WORDS], False)
    match = matcher.find_longest_match()
    return match.a, match.size


def _uncommon(sequences: list[Hashes]) -> Hashes:
    """Return the hashes that occur COMMON times at most, sorted, and empty the list. They take most
    of the memory of a search, and are sorted in place."""
    hashes = np.concatenate(sequences)
    sequences.clear()
    hashes.sort()
    kept = np.ones(len(hashes), np.bool_)
    kept[1:] = hashes[1:] != hashes[:-1]
    kept[:-COMMON] &= hashes[:-COMMON] != hashes[COMMON:]
    return hashes[kept]


def _addresses(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _batches(numbers: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(numbers), BATCH_ROWS):
        yield numbers[start : start + BATCH_ROWS]
