"""The time, the GPU-hours and the price of a training stage, from its first steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

WARM_UP_STEPS = 2
"""Steps that are left out: they compile kernels and fill caches."""
FEWEST_STEPS = 3
"""Steps after the warm-up without which nothing is said."""
SECONDS_PER_HOUR = 3600.0


class Duration(NamedTuple):
    """The time and the price of a stage."""

    remaining_seconds: float
    total_seconds: float
    gpu_hours: float
    """Hours of the whole stage times GPUs; hours of workers in a job without GPUs."""
    price: float | None
    """Price of the whole stage, in the currency of `pricePerHour`. None: no price is known."""


def estimate(
    step_seconds: Sequence[float],
    total_steps: int,
    *,
    devices: int,
    workers: int,
    price_per_hour: float | None = None,
) -> Duration | None:
    """Return what a stage takes if its other steps take as long as those so far. None: too few
    steps were measured.

    `step_seconds`: the time of each step from the first one on, evaluations and checkpoints
    included where they happened. `devices`: GPUs of all workers. `price_per_hour`: of one worker.

    The median decides, so that one slow step does not; what evaluations and checkpoints take beyond
    it is spread over all steps.
    """
    measured = step_seconds[WARM_UP_STEPS:]
    if len(measured) < FEWEST_STEPS:
        return None
    typical = statistics.median(measured)
    extra = sum(max(0.0, seconds - 2 * typical) for seconds in measured) / len(measured)
    remaining = max(0, total_steps - len(step_seconds)) * (typical + extra)
    total = sum(step_seconds) + remaining
    hours = total / SECONDS_PER_HOUR
    price = None if price_per_hour is None else hours * workers * price_per_hour
    return Duration(remaining, total, hours * max(1, devices), price)
