"""The layout of a step is the one that running jobs see, and keeps to microBatchTokens."""

from __future__ import annotations

import numpy as np
import pytest

from tuneyard_trainer.training.batches import MicroBatch, micro_batches


def layout_of_0_2(
    rows: np.ndarray, lengths: np.ndarray, *, capacity: int, max_tokens: int, pack: bool
) -> list[MicroBatch]:
    """Return the layout of version 0.2.0, by a search over all bins for every row."""
    longest_first = sorted((int(row) for row in rows), key=lambda row: (-lengths[row], row))
    bins: list[list[int]] = []
    used: list[int] = []
    for row in longest_first:
        length = int(lengths[row])
        space = max(capacity, int(lengths[longest_first[0]])) if pack else 0
        fit = next((i for i, tokens in enumerate(used) if tokens + length <= space), None)
        if fit is None:
            bins.append([row])
            used.append(length)
        else:
            bins[fit].append(row)
            used[fit] += length
    groups: list[MicroBatch] = []
    current: list[tuple[int, ...]] = []
    width = 0
    for index in sorted(range(len(bins)), key=lambda i: -used[i]):
        if current and (len(current) + 1) * width > max_tokens:
            groups.append(MicroBatch(tuple(current), width))
            current = []
        if not current:
            width = used[index]
        current.append(tuple(bins[index]))
    if current:
        groups.append(MicroBatch(tuple(current), width))
    return groups


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seed", range(150))
def test_a_running_job_sees_the_same_micro_batches_as_under_0_2(seed: int, pack: bool) -> None:
    """Rows may occur twice. Where bins fit into a micro-batch, the limit changes nothing."""
    random = np.random.default_rng(seed)
    longest = int(random.choice([3, 40, 1000]))
    lengths = random.integers(1, longest + 1, size=200)
    rows = random.integers(0, 200, size=int(random.integers(0, 120)))
    capacity = int(random.choice([1, 64, 1500]))
    least = max(capacity, longest) if pack else 1
    max_tokens = least + int(random.integers(0, 5000))
    settings = {"capacity": capacity, "max_tokens": max_tokens}
    assert micro_batches(rows, lengths, pack=pack, **settings) == layout_of_0_2(
        rows, lengths, pack=pack, **settings
    )


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seed", range(50))
def test_only_a_single_row_that_is_longer_exceeds_the_limit_of_a_micro_batch(
    seed: int, pack: bool
) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 6000, size=100)
    rows = random.permutation(100)[: int(random.integers(1, 100))]
    found = micro_batches(rows, lengths, capacity=32_768, max_tokens=4096, pack=pack)
    assert sorted(row for one in found for row in one.rows) == sorted(rows)
    for one in found:
        assert len(one.rows) == 1 or len(one.bins) * one.width <= 4096
        assert one.width == max(int(lengths[list(members)].sum()) for members in one.bins)


def test_short_rows_that_fill_a_wide_bin_do_not_exceed_the_limit() -> None:
    """On a GPU a bin is as wide as the longest row that the job allows."""
    found = micro_batches(
        np.arange(65), np.full(65, 500), capacity=32_768, max_tokens=4096, pack=True
    )
    assert max(len(one.bins) * one.width for one in found) == 4000
