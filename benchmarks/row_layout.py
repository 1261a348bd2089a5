"""Measure the layout of rows into micro-batches: 100,000 rows and 1,000,000 rows.

    .venv/bin/python benchmarks/row_layout.py

Prints the seconds of each layout and the ratio of the two sizes, which is near 10 as long as the
cost is near linear: "padded" as before the first step of a preference job, where the reference
scores every row; "packed" as one step over all rows; "groups" as one step over as many pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tuneyard_trainer.data.prepared import Rows
from tuneyard_trainer.preference.dataset import Comparisons
from tuneyard_trainer.preference.micro_batches import group_micro_batches
from tuneyard_trainer.training.batches import micro_batches

SIZES = (100_000, 1_000_000)
MAX_TOKENS = 16_384
CAPACITY = 2_048


def layouts(count: int) -> dict[str, Callable[[], object]]:
    """Return the layouts of `count` rows of 20 to 1,000 tokens, by name."""
    random = np.random.default_rng(0)
    lengths = random.integers(20, 1_000, size=count)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    empty = np.empty(0, dtype=np.int32)
    rows = Rows(empty, empty.astype(np.uint8), offsets, np.zeros(count, dtype=np.int16))
    pairs = Comparisons(rows, np.arange(0, count + 1, 2), np.ones(count // 2, dtype=np.float32))
    chosen = np.arange(count)

    def laid_out(pack: bool) -> object:
        return micro_batches(chosen, lengths, capacity=CAPACITY, max_tokens=MAX_TOKENS, pack=pack)

    return {
        "padded": lambda: laid_out(pack=False),
        "packed": lambda: laid_out(pack=True),
        "groups": lambda: list(group_micro_batches(pairs, np.arange(len(pairs)), MAX_TOKENS)),
    }


def seconds(layout: Callable[[], object]) -> float:
    start = time.perf_counter()
    layout()
    return time.perf_counter() - start


def main() -> None:
    few, many = (layouts(count) for count in SIZES)
    print(f"{'layout':<8} {SIZES[0]:>12,} {SIZES[1]:>12,}  ratio")
    for name in few:
        first, second = seconds(few[name]), seconds(many[name])
        print(f"{name:<8} {first:>10.2f} s {second:>10.2f} s  {second / first:>5.1f}")


if __name__ == "__main__":
    main()
