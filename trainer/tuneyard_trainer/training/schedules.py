"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math

from tuneyard.api.training import Schedule


def rate(schedule: Schedule, step: int, total_steps: int) -> float:
    """The share of the peak at `step` (from 0) of `total_steps`.

    Warm-up rises linearly and reaches 1 with the first step after it; cosine (Loshchilov & Hutter
    2017, arXiv:1608.03983) and linear fall to `final_fraction` at the last step.
    """
    warmup = math.ceil(schedule.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.type == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - 1 - warmup)
    shape = (1 + math.cos(math.pi * done)) / 2 if schedule.type == "cosine" else 1 - done
    return schedule.final_fraction + (1 - schedule.final_fraction) * shape
