"""The learning rate over a run: warm-up, decay and the final value."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from tuneyard.api.training import Schedule
from tuneyard_trainer.training.schedules import rate


def rates(total: int, **settings: object) -> list[float]:
    schedule = Schedule.model_validate(settings)
    return [rate(schedule, step, total) for step in range(total)]


def test_warm_up_rises_linearly_from_above_zero_to_the_peak() -> None:
    values = rates(100, type="constant", warmup=0.04)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(values[4:]) == {1.0}


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_rate_decays_to_the_final_fraction_at_the_last_step(
    shape: Literal["cosine", "linear"],
) -> None:
    values = rates(50, type=shape, warmup=0.0, finalFraction=0.1)
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)


def test_cosine_equals_torchs_cosine_annealing() -> None:
    """torch's rule decays from 1 to the final fraction over total - 1 steps."""
    total, final = 21, 0.25
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 1, eta_min=final)
    expected = []
    for _ in range(total):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates(total, warmup=0.0, finalFraction=final) == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_have_finite_positive_rates(total: int) -> None:
    for shape in ("cosine", "linear", "constant"):
        values = rates(total, type=shape, warmup=0.5)
        assert all(math.isfinite(value) and value > 0 for value in values)
