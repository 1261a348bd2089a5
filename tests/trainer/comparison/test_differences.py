"""The difference between two jobs: paired by item, against independent references."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tuneyard_trainer.comparison.differences import Measured, Values, difference
from tuneyard_trainer.evaluation.evidence import Interval, share_interval

stats = pytest.importorskip("scipy.stats")


def measured(
    values: list[float], keys: str | None = None, weights: list[float] | None = None
) -> Measured:
    """Return a metric with these values. `keys`: a letter for each item; None: not known."""
    of = Values(
        None if keys is None else tuple(keys),
        np.array(values, dtype=np.float64),
        None if weights is None else np.array(weights),
    )
    mean = float(np.average(values, weights=weights))
    return Measured(mean, Interval(mean - 0.1, mean + 0.1), of)


def letters(count: int) -> str:
    return "".join(chr(256 + number) for number in range(count))


def share(right: int, count: int) -> Measured:
    return Measured(right / count, share_interval(right, count))


# ---- paired -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [30, 200])
def test_the_interval_of_paired_values_is_that_of_the_paired_t_test(count: int) -> None:
    generator = np.random.default_rng(3)
    easy = generator.normal(2, 1, count)
    a, b = easy + generator.normal(0, 0.2, count), easy - 0.1 + generator.normal(0, 0.2, count)
    found = difference(measured([*a], letters(count)), measured([*b], letters(count)))
    low, high = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert found.basis == "paired"
    assert found.items == count
    assert found.value == pytest.approx(np.mean(b - a))
    assert found.interval == pytest.approx((low, high), abs=0.05 * (high - low))
    apart = stats.ttest_ind(b, a).confidence_interval(0.95)  # shared difficulty widens this one
    assert found.interval.high - found.interval.low < 0.5 * (apart.high - apart.low)


def test_the_interval_of_weighted_values_is_that_of_a_bootstrap_of_the_ratio() -> None:
    generator = np.random.default_rng(4)
    a, weights = generator.gamma(4, 0.3, 80), generator.integers(1, 60, 80).astype(float)
    b = a - generator.normal(0.1, 0.3, 80)
    keys = letters(80)
    found = difference(measured([*a], keys, [*weights]), measured([*b], keys, [*weights]))

    def ratio(gain: np.ndarray, weight: np.ndarray, axis: int = -1) -> np.ndarray:
        return (gain * weight).sum(axis) / weight.sum(axis)

    reference = stats.bootstrap(
        (b - a, weights), ratio, paired=True, vectorized=True, n_resamples=9999, rng=5,
        method="percentile",
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(ratio(b - a, weights))
    width = reference.high - reference.low
    assert found.interval == pytest.approx((reference.low, reference.high), abs=0.06 * width)


def test_right_and_wrong_answers_have_the_interval_of_flipped_items() -> None:
    a = [1.0] * 10 + [0.0] * 10
    b = [0.0] * 2 + [1.0] * 16 + [0.0] * 2
    found = difference(measured(a, letters(20)), measured(b, letters(20)))
    up, down = (8 + 1) / 22, (2 + 1) / 22  # Bonett and Price 2012: one flip of each kind is added
    half = stats.norm.ppf(0.975) * math.sqrt((up + down - (up - down) ** 2) / 22)
    assert found.value == pytest.approx(6 / 20)
    assert found.interval == pytest.approx((up - down - half, up - down + half))


def test_items_are_paired_by_key_and_not_by_place() -> None:
    a = measured([1.0, 2.0, 3.0, 4.0], "abcd")
    b = measured([4.5, 3.5, 2.5, 1.5], "dcba")
    found = difference(a, b)
    assert found == ("paired", pytest.approx(0.5), pytest.approx((0.5, 0.5)), 4)


def test_only_items_of_both_jobs_are_compared() -> None:
    found = difference(measured([1.0, 2.0, 9.0], "abx"), measured([7.0, 1.5, 2.5], "yab"))
    assert found.items == 2
    assert found.value == pytest.approx(0.5)


# ---- not paired ---------------------------------------------------------------------------------


def test_the_unpaired_interval_of_shares_is_the_published_one() -> None:
    """Newcombe 1998, Statistics in Medicine 17(8), Table II, column (a), method 10."""
    found = difference(share(48, 80), share(56, 70))
    assert found.basis == "unpaired"
    assert found.value == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_items_of_unknown_content_are_not_paired() -> None:
    found = difference(measured([1.0, 2.0]), measured([1.0, 2.0], "ab"))
    assert (found.basis, found.items) == ("unpaired", None)
    assert found.interval == pytest.approx((-0.1 * math.sqrt(2), 0.1 * math.sqrt(2)))


def test_items_that_have_nothing_in_common_are_of_other_rows() -> None:
    found = difference(measured([1.0, 2.0], "ab"), measured([3.0, 4.0], "cd"))
    assert (found.basis, found.items, found.value) == ("otherRows", None, pytest.approx(2.0))


@pytest.mark.parametrize("weights", [[3.0, 5.0], None])
def test_the_same_rows_with_other_tokens_have_no_difference(weights: list[float] | None) -> None:
    a, b = measured([1.0, 2.0], "ab", [3.0, 4.0]), measured([1.0, 2.0], "ab", weights)
    assert difference(a, b) == ("otherUnit", None, None, None)


def test_values_that_are_not_finite_are_not_paired() -> None:
    a = Measured(math.nan, None, Values(("a",), np.array([math.nan])))
    found = difference(a, measured([1.0], "a"))
    assert (found.value, found.interval) == (None, None)


def test_values_without_an_interval_have_a_difference_without_one() -> None:
    assert difference(Measured(1.0), Measured(3.0)) == ("unpaired", 2.0, None, None)


def test_values_near_the_largest_float_have_no_interval_instead_of_an_infinite_one() -> None:
    ends = Interval(-1.7e308, 1.7e308)
    found = difference(Measured(1.0, ends), Measured(2.0, ends))
    assert (found.basis, found.value, found.interval) == ("unpaired", 1.0, None)
