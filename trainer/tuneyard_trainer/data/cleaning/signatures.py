"""MinHash signatures of rows, by rensa, and the bands by which similar rows meet.

A row's set is its sequences of SHINGLE words. Two rows whose sets have the Jaccard index s share a
band with the probability 1 - (1 - s^8)^14: 0.99 for s = 0.85, 0.92 for 0.8, 0.5 for 0.72, 0.05 for
0.5. These are the values of FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.4). A pair
with a common band is only a candidate: its sets are compared exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from tuneyard_trainer.data.cleaning.words import (
    Grams,
    WordHashes,
    WordRows,
    grams,
    words,
)
from tuneyard_trainer.data.texts import text_hash

SHINGLE = 5
BANDS, HASHES_PER_BAND = 14, 8
SIMILARITY = 0.8
"""The default least Jaccard index of near duplicates."""
_SEED = 42
_PRIME = np.uint64(0x9E3779B97F4A7C15)

Bands = NDArray[np.uint32]
"""(R, BANDS) a hash of each band of each row."""


def word_rows(texts: Iterable[str], known: WordHashes) -> WordRows:
    """Return the words of texts. A text without words, such as "?", is one word."""
    return WordRows.of([words(text) or [text] for text in texts], known)


def bands(rows: WordRows, systems: Sequence[str] | None = None) -> Bands:
    """Return the bands of rows. `systems`: their system texts. None: they do not matter."""
    if not len(rows.lengths):
        return np.zeros((0, BANDS), np.uint32)
    sets = _sets(rows, systems)
    count = BANDS * HASHES_PER_BAND
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(sets.hashes, sets.offsets, count, _SEED)
    digests = np.array(matrix.to_rows(), np.uint64).reshape(-1, BANDS, HASHES_PER_BAND)
    found = np.zeros(digests.shape[:2], np.uint64)
    for each in range(HASHES_PER_BAND):
        found = found * _PRIME + digests[:, :, each]
    return np.asarray(found >> np.uint64(32), np.uint32)


def similarity(rows: WordRows, systems: Sequence[str] | None = None) -> float:
    """Return the Jaccard index of two rows."""
    hashes, offsets = _sets(rows, systems)
    one, other = set(hashes[: offsets[1]].tolist()), set(hashes[offsets[1] :].tolist())
    return len(one & other) / len(one | other)


def _sets(rows: WordRows, systems: Sequence[str] | None) -> Grams:
    """Return the sets of rows; a row of fewer words than SHINGLE has one element. Rows with another
    system text have no element in common: they teach another behavior."""
    sets = grams(rows.padded(SHINGLE), SHINGLE)
    if systems is None or not any(systems):
        return sets
    keys = np.array([text_hash(system) if system else 0 for system in systems], np.uint64)
    return Grams(sets.hashes ^ keys[sets.rows], sets.offsets)
