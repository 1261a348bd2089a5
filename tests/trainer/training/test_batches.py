"""The data order is exact, the same for any number of workers, and a function of the step."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tuneyard_trainer.training.batches import Order, Packing, micro_batches, share

LENGTHS = np.array([5, 90, 17, 40, 3, 64, 12, 12, 33, 250, 8], dtype=np.int64)


def order(rows: int = 11, batch_size: int = 4, seed: int = 7, weight: float = 1.0) -> Order:
    return Order.of(np.zeros(rows, dtype=np.int16), [weight], batch_size, seed)


def test_an_epoch_holds_every_row_exactly_once() -> None:
    batches = list(order().batches(0, 3))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert sorted(np.concatenate(batches)) == list(range(11))


def test_epochs_differ_and_seeds_differ_but_the_same_seed_repeats() -> None:
    assert list(order().epoch(0)) != list(order().epoch(1))
    assert list(order(seed=1).epoch(0)) != list(order(seed=2).epoch(0))
    assert list(order().epoch(5)) == list(order().epoch(5))


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 7])
def test_a_run_resumed_at_any_step_trains_on_the_remaining_rows(step: int) -> None:
    whole = [list(batch) for batch in order().batches(0, 8)]
    assert [list(batch) for batch in order().batches(step, 8)] == whole[step:]


def test_total_steps_rounds_up_and_max_steps_takes_precedence() -> None:
    assert order().steps_per_epoch == 3
    assert order().total_steps(2, None) == 6
    assert order().total_steps(0.5, None) == 2
    assert order().total_steps(0.0001, None) == 1
    assert order().total_steps(None, 5) == 5


@pytest.mark.parametrize(("weight", "copies"), [(1.0, 10), (2.0, 20), (0.5, 5), (1.5, 15)])
def test_a_weight_is_the_number_of_times_an_epoch_holds_a_row(weight: float, copies: int) -> None:
    rows = order(rows=10, weight=weight).rows
    assert len(rows) == copies
    counts = np.bincount(rows, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_a_weight_of_one_half_selects_the_same_rows_in_every_epoch() -> None:
    halved = order(rows=10, weight=0.5)
    assert set(halved.epoch(0)) == set(halved.epoch(1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_workers_share_a_batch_without_overlap_or_loss(world_size: int) -> None:
    rows = np.arange(11)
    shares = [share(rows, LENGTHS, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares)) == list(range(11))


def test_two_workers_get_about_the_same_number_of_tokens() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, size=64)
    tokens = [lengths[share(np.arange(64), lengths, rank, 2)].sum() for rank in range(2)]
    assert abs(tokens[0] - tokens[1]) <= 100


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 100, 300, 5000])
def test_micro_batches_hold_every_row_once_and_stay_within_the_token_limit(
    pack: bool, max_tokens: int
) -> None:
    found = micro_batches(np.arange(11), LENGTHS, capacity=128, max_tokens=max_tokens, pack=pack)
    rows = [row for micro_batch in found for members in micro_batch.bins for row in members]
    assert sorted(rows) == list(range(11))
    for micro_batch in found:
        assert max(sum(LENGTHS[list(members)]) for members in micro_batch.bins) == micro_batch.width
        assert len(micro_batch.bins) == 1 or len(micro_batch.bins) * micro_batch.width <= max_tokens
        assert pack or all(len(members) == 1 for members in micro_batch.bins)


def test_packing_fills_bins_up_to_the_capacity() -> None:
    found = micro_batches(np.arange(8), np.full(8, 30), capacity=100, max_tokens=10_000, pack=True)
    assert [len(members) for micro_batch in found for members in micro_batch.bins] == [3, 3, 2]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("pack", [True, False])
def test_the_packing_counts_the_rows_and_the_padding_of_each_worker(
    world_size: int, pack: bool
) -> None:
    lay_out = partial(micro_batches, lengths=LENGTHS, capacity=128, max_tokens=300, pack=pack)
    found = Packing.of(order().batches(0, 3), LENGTHS, world_size, lay_out)
    laid_out = [
        micro_batch
        for batch in order().batches(0, 3)
        for rank in range(world_size)
        for micro_batch in lay_out(share(batch, LENGTHS, rank, world_size))
    ]
    widths = [each.width for each in laid_out for _ in each.bins]
    assert found == (11, len(widths), LENGTHS.sum(), sum(widths))
    assert found.padding == pytest.approx(1 - LENGTHS.sum() / sum(widths))
    assert (found.rows < found.sequences) == pack


def test_equal_rows_that_fill_their_bins_have_no_padding() -> None:
    lay_out = partial(micro_batches, lengths=np.full(8, 32), capacity=64, max_tokens=999, pack=True)
    packing = Packing.of([np.arange(8)], np.full(8, 32), 1, lay_out)
    assert (packing.rows, packing.padding) == (4, 0)
