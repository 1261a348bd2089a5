"""Seeds: every random number is a function of the job's seed, a purpose and a position.

A resumed run therefore draws the same numbers, and no generator's state is saved.
"""

from __future__ import annotations

import numpy as np

EPOCH_ORDER, SOURCE_ROWS, FISHER_ROWS = 0, 1, 2
"""Purposes in `row_generator(seed, purpose, index)`: the order of an epoch's rows; the extra
rows of a data set with a fractional weight; the rows of the Fisher information."""
COMPLETION, MEASUREMENT = 1, 2
"""Purposes in `derive_seed(seed, purpose, ...)`: the sampled completions of an update; those of
an evaluation, which are drawn from the same seeds at every step."""
MINIBATCHES = 3
"""Purpose in `generator(seed, purpose, update, epoch)`: the order of a rollout's rows."""
GENERAL_DROPOUT, FISHER_LABELS = 4, 5
"""Purposes in `derive_seed(seed, purpose, ...)`: the dropout of a general micro-batch; the labels
that are sampled for a row of the Fisher information."""


def derive_seed(*numbers: int) -> int:
    """Return one 63-bit seed derived from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def row_generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Return a generator of row orders. Philox is counter-based: different keys give independent
    streams."""
    return np.random.Generator(np.random.Philox(key=[seed, (purpose << 32) | index]))


def generator(*numbers: int) -> np.random.Generator:
    """Return a generator seeded by `numbers`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))
