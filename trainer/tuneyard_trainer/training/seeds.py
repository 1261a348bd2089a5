"""Seeds: every random number is a function of the job's seed, a purpose and a position.

A run that was killed therefore continues with the same numbers, and no generator's state is saved.
"""

from __future__ import annotations

import numpy as np

EPOCH_ORDER, SOURCE_ROWS = 0, 1
"""Purposes in `row_generator(seed, purpose, index)`: the order of an epoch's rows; the rows of a
source whose weight is not 1."""
COMPLETION, MEASUREMENT = 1, 2
"""Purposes in `derive_seed(seed, purpose, ...)`: sampled completions of an update; those of a
measurement, which are the same at every step."""
MINIBATCHES = 3
"""Purpose in `generator(seed, purpose, update, epoch)`: the order of a rollout's rows."""


def derive_seed(*numbers: int) -> int:
    """Return one well-mixed 63-bit seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def row_generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Return a generator of row orders. Philox is counter-based: different keys give independent
    streams."""
    return np.random.Generator(np.random.Philox(key=[seed, (purpose << 32) | index]))


def generator(*numbers: int) -> np.random.Generator:
    """Return a generator whose numbers are a function of `numbers`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))
