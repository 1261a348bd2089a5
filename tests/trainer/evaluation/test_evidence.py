"""Intervals cover the true mean as often as they say, and McNemar's test is exact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from tuneyard_trainer.evaluation import evidence
from tuneyard_trainer.evaluation.evidence import (
    flip_interval,
    mcnemar,
    mean_interval,
    ratio_interval,
    share_interval,
    student_quantile,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]

SIMULATIONS = 1000

DRAWS: dict[str, tuple[float, Draw]] = {
    "normal": (0.3, lambda random, shape: random.normal(0.3, 1, shape)),
    "skewed": (2.0, lambda random, shape: random.gamma(2, 1, shape)),
}


@pytest.mark.parametrize("count", [50, 100, 200])
@pytest.mark.parametrize("name", list(DRAWS))
def test_the_interval_covers_the_true_mean_in_93_to_97_of_100_simulations(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer resamples than in use, which makes an interval vary more, not wider."""
    monkeypatch.setattr(evidence, "RESAMPLES", 1000)
    mean, draw = DRAWS[name]
    values = draw(np.random.default_rng(7), (SIMULATIONS, count))
    covered = sum(mean_interval(values_N).contains(mean) for values_N in values)
    assert 0.93 <= covered / SIMULATIONS <= 0.97


@pytest.mark.parametrize("count", [50, 100, 200])
@pytest.mark.parametrize(("gains", "losses"), [(0.2, 0.1), (0.3, 0.3), (0.1, 0.05), (0.05, 0.0)])
def test_the_interval_of_flipped_answers_covers_the_true_difference(
    gains: float, losses: float, count: int
) -> None:
    """It may be too wide if answers hardly ever flip, but not too narrow."""
    shares = [gains, losses, 1 - gains - losses]
    flips = np.random.default_rng(9).multinomial(count, shares, 20 * SIMULATIONS)
    covered = sum(
        flip_interval(int(gained), int(lost), count).contains(gains - losses)
        for gained, lost, _ in flips
    )
    assert 0.935 <= covered / len(flips) <= (0.97 if losses >= 0.1 else 1.0)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("count", [50, 100, 200])
def test_the_interval_of_a_share_covers_the_true_share(share: float, count: int) -> None:
    rights = np.random.default_rng(10).binomial(count, share, 10 * SIMULATIONS)
    covered = sum(share_interval(int(right), count).contains(share) for right in rights)
    assert 0.93 <= covered / len(rights) <= 0.98


def test_intervals_of_answers_are_those_of_a_textbook_and_a_calculation() -> None:
    """Wilson's of 81 in 263 (Newcombe 1998, Statistics in Medicine 17, table I). The other one by
    hand: 2/23 - 8/23, and 1.96 * sqrt((10/23 - (6/23)**2) / 23)."""
    assert share_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert flip_interval(1, 7, 21) == pytest.approx((-0.50836, -0.01338), abs=1e-4)


def test_answers_that_are_all_alike_still_have_an_interval() -> None:
    assert share_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert share_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    for count in range(1, 200):  # no end is 2.8e-17, which people read as a value
        assert (share_interval(0, count).low, share_interval(count, count).high) == (0.0, 1.0)
    assert flip_interval(0, 0, 24) == pytest.approx((-0.1066, 0.1066), abs=1e-3)
    assert flip_interval(20, 0, 20).high == 1.0
    for interval in (share_interval, lambda right, count: flip_interval(right, 0, count)):
        with pytest.raises(ValueError, match="at least one item"):
            interval(0, 0)


def test_the_interval_of_a_ratio_covers_the_ratio_of_the_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss of a token over rows of different lengths, where longer rows have a lower loss."""
    monkeypatch.setattr(evidence, "RESAMPLES", 1000)
    random = np.random.default_rng(8)
    lengths = random.integers(5, 100, (SIMULATIONS, 100)).astype(float)
    losses = lengths * random.gamma(2, 1, lengths.shape) / np.sqrt(lengths)
    every = np.arange(5, 100, dtype=float)
    truth = 2 * np.sqrt(every).sum() / every.sum()
    pairs = zip(losses, lengths, strict=True)
    covered = sum(ratio_interval(loss, length).contains(truth) for loss, length in pairs)
    assert 0.93 <= covered / SIMULATIONS <= 0.97


def test_the_interval_equals_that_of_a_straight_loop() -> None:
    values_N = np.random.default_rng(1).exponential(1, 30)
    random = np.random.default_rng(evidence.SEED)
    means = []
    for drawn in random.integers(30, size=(evidence.RESAMPLES, 30)):
        means.append(sum(values_N[index] for index in drawn) / 30)
    # Student's t of 29 degrees of freedom, from a table: 2.0452; and the normal tail beyond it.
    tail = math.erfc(math.sqrt(30 / 29) * 2.0452 / math.sqrt(2)) / 2
    assert mean_interval(values_N) == pytest.approx(np.quantile(means, [tail, 1 - tail]), rel=1e-3)


def test_the_interval_agrees_with_scipys_bootstrap_apart_from_its_wider_levels() -> None:
    stats = pytest.importorskip("scipy.stats")
    values_N = np.random.default_rng(2).gamma(2, 1, 150)
    confidence = 1 - 2 * evidence._tail(150)
    theirs = stats.bootstrap(
        (values_N,), np.mean, n_resamples=20000, method="percentile",
        confidence_level=confidence, rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert mean_interval(values_N) == pytest.approx((theirs.low, theirs.high), abs=0.01)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(4, 2.7764), (9, 2.2622), (29, 2.0452), (199, 1.9720)]
)
def test_the_quantile_of_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=0.01 if freedom < 9 else 4e-4)


def test_the_interval_is_the_same_each_time_and_needs_an_item() -> None:
    values_N = np.random.default_rng(4).normal(size=80)
    assert mean_interval(values_N) == mean_interval(values_N)
    assert mean_interval(np.array([2.5])) == (2.5, 2.5)
    with pytest.raises(ValueError, match="at least one item"):
        mean_interval(np.array([]))


def test_drawing_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values_N = np.random.default_rng(5).normal(size=64)
    whole = mean_interval(values_N)
    monkeypatch.setattr(evidence, "CHUNK", 64 * 7)
    assert mean_interval(values_N) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        # Agresti, Categorical Data Analysis: the approval of a prime minister in two surveys, 86
        # and 150 who changed their minds; the exact p-value by R's binom.test(86, 236).
        (86, 150, 3.716e-5),
        # By hand: 2 * (1 + 8) / 2**8, and 2 * (1 + 10 + 45) / 2**10.
        (1, 7, 18 / 256),
        (8, 2, 112 / 1024),
        (5, 5, 1.0),
        (0, 0, 1.0),
        (0, 6, 2 / 64),
    ],
)
def test_mcnemars_test_gives_the_known_p_values(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p_value, rel=2e-3)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_mcnemars_test_of_a_hundred_thousand_flipped_items_takes_seconds() -> None:
    """The sum of binomial coefficients, each computed by itself, takes hours."""
    started = time.monotonic()
    assert mcnemar(50_000, 50_000) == 1.0
    assert 0 < mcnemar(49_000, 51_000) < 1e-9
    assert time.monotonic() - started < 20


def test_mcnemars_test_agrees_with_scipys_binomial_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    for gained in range(0, 30, 3):
        for lost in range(1, 30, 4):
            theirs = stats.binomtest(gained, gained + lost, 0.5).pvalue
            assert mcnemar(gained, lost) == pytest.approx(theirs, rel=1e-9)
