"""The learning rate over a run, as a fraction of its peak."""

from __future__ import annotations

import math

from tuneyard.api.training import Schedule


def rate(schedule: Schedule, step: int, total_steps: int) -> float:
    """Return the learning rate at `step` (from 0) of `total_steps`, as a fraction of the peak.

    Warm-up rises linearly, and the first step after it has the rate 1. The schedules cosine
    (Loshchilov & Hutter 2017, arXiv:1608.03983) and linear decay to `final_fraction` at the last
    step.
    """
    warmup = math.ceil(schedule.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.type == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - 1 - warmup)
    shape = (1 + math.cos(math.pi * done)) / 2 if schedule.type == "cosine" else 1 - done
    return schedule.final_fraction + (1 - schedule.final_fraction) * shape
