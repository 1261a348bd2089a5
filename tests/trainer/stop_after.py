"""A worker that receives a stop request, for tests of resumed runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tuneyard_trainer.worker import Worker


class StopAfter:
    """Requests a stop once `step` steps were reported."""

    def __init__(self, step: int) -> None:
        self.step, self.reported = step, 0

    def report(self, *, step: int = 0, **_: Any) -> None:
        self.reported = max(self.reported, step)

    def __call__(self) -> bool:
        return self.reported >= self.step

    def worker(self) -> Worker:
        return Worker(0, 1, torch.device("cpu"), report=self.report, stop=self)


class StopAtCheck:
    """Requests a stop from a numbered check on, whatever the stage does at that moment."""

    def __init__(self, check: int) -> None:
        self.check, self.checks = check, 0

    def __call__(self) -> bool:
        self.checks += 1
        return self.checks >= self.check

    def worker(self) -> Worker:
        return Worker(0, 1, torch.device("cpu"), stop=self)


NEVER = 1 << 60
TIMES = {
    *("tokensPerSecond", "trainingSeconds", "peakMemoryBytes"),
    *("generationSeconds", "scoringSeconds"),
}
"""Metrics that differ between two runs of the same stage."""


def without_times(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name not in TIMES}
