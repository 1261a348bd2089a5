"""Metrics of a step that TRL does not log: sums over its micro-batches and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tuneyard_trainer.trl_engine.following import Following
from tuneyard_trainer.worker import Worker


class StepSums:
    """The sums of K metrics over the rows of a step's batch, on this worker."""

    def __init__(self, names: Sequence[str], worker: Worker) -> None:
        self._names, self._worker = names, worker
        self._sums_K = torch.zeros(len(names), device=worker.device)

    def add(self, sums_K: Tensor) -> None:
        """Add the sums over the rows of a micro-batch (K,)."""
        self._sums_K += sums_K

    def means(self, count: int) -> dict[str, float]:
        """Return the means over the `count` rows of the global batch, and begin the next step.
        Called by all ranks."""
        sums_K, self._sums_K = self._sums_K, torch.zeros_like(self._sums_K)
        if self._worker.world_size > 1:
            dist.all_reduce(sums_K)
        return dict(zip(self._names, (sums_K / count).tolist(), strict=True))


class SummingFollowing(Following):
    """Follow each step with the means of what its micro-batches added to `sums`."""

    def __init__(self, sums: StepSums, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sums = sums

    def other_metrics(
        self,
        logs: dict[str, Any],  # noqa: ARG002  of the step
        count: int,
    ) -> dict[str, float]:
        """Return the means over the `count` rows of the step's batch."""
        return self.sums.means(count)
