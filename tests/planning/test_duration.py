"""The estimate of time, GPU-hours and price from measured steps."""

from __future__ import annotations

import pytest

from tuneyard.planning.duration import estimate


def test_nothing_is_said_before_three_steps_after_the_warm_up() -> None:
    assert estimate([60.0, 9.0, 2.0, 2.0], 100, devices=1, workers=1) is None


def test_the_other_steps_take_as_long_as_the_typical_step_after_the_warm_up() -> None:
    found = estimate([60.0, 10.0, 2.0, 2.0, 2.0], 105, devices=8, workers=4, price_per_hour=9.0)
    assert found is not None
    assert found.remaining_seconds == pytest.approx(200.0)
    assert found.total_seconds == pytest.approx(276.0)
    assert found.gpu_hours == pytest.approx(8 * 276 / 3600)
    assert found.price == pytest.approx(4 * 9.0 * 276 / 3600)


def test_a_slow_step_among_many_adds_its_share_and_does_not_become_the_typical_one() -> None:
    steps = [1.0] * 2 + [1.0] * 99 + [101.0]
    found = estimate(steps, 202, devices=1, workers=1)
    assert found is not None
    assert found.remaining_seconds == pytest.approx(100 * (1.0 + 0.99))


def test_without_a_price_there_is_none_and_a_job_without_gpus_counts_its_worker() -> None:
    found = estimate([3600.0] * 5, 5, devices=0, workers=1)
    assert found is not None
    assert found.price is None
    assert found.remaining_seconds == 0
    assert found.gpu_hours == pytest.approx(5.0)
