"""A worker that receives a stop request, for tests of resumed runs."""

from __future__ import annotations

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
