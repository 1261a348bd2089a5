"""The common part of the objectives of DPO, KTO and reward models: gradients over groups.

Shapes: R rows, K metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tuneyard.api.stage_settings import DpoSettings
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.micro_batches import group_micro_batches
from tuneyard_trainer.preference.reference import ReferencedPreferences
from tuneyard_trainer.training.batches import Indices, share
from tuneyard_trainer.training.losses import Forward, accumulate_gradients
from tuneyard_trainer.worker import Worker


@dataclass(frozen=True)
class GroupObjective:
    """The mean of a loss over a batch of groups, on one worker."""

    model: nn.Module
    data: Preferences
    forward: Forward
    worker: Worker
    seed: int

    @property
    def holds_out(self) -> bool:
        return self.data.validation is not None

    @property
    def held_out_groups(self) -> Comparisons:
        if self.data.validation is None:
            raise ValueError("no held-out preferences")
        return self.data.validation

    def num_tokens(self, groups: Indices) -> int:
        return int(self.data.train.tokens[groups].sum())

    def micro_batches(self, groups: Indices) -> list[Indices]:
        """Return the micro-batches of this worker's share of a batch."""
        mine = self.share(groups)
        return list(group_micro_batches(self.data.train, mine, self.forward.max_tokens))

    def share(self, groups: Indices) -> Indices:
        """Return this worker's share of a batch."""
        return share(groups, self.data.train.tokens, self.worker.rank, self.worker.world_size)

    def accumulate(
        self, sums_of: Callable[[Indices], Tensor], groups: Indices, step: int, num_metrics: int
    ) -> Tensor:
        """Add this worker's share of the gradient of a batch's mean loss.

        `sums_of`: the metrics of a micro-batch, summed (K,); the first one is the loss. Returns the
        worker's share of each metric's mean (K,).
        """
        return accumulate_gradients(
            sums_of,
            self.micro_batches(groups),
            count=len(groups),
            num_metrics=num_metrics,
            seed=(self.seed, step),
            worker=self.worker,
        )


@dataclass(frozen=True)
class ReferencedObjective(GroupObjective):
    """A loss of the log-ratios log pi(y|x) - log ref(y|x) of a policy to its reference."""

    settings: DpoSettings
    references: ReferencedPreferences

    def log_ratios(self, groups: Indices) -> Tensor:
        """Return the log-ratios of the rows of some training groups (R,), with gradients."""
        members = self.data.train.members(groups)
        return self.references.train.log_ratios(self.model, members, self.forward)

    def held_out_log_ratios(self) -> NDArray[np.float64]:
        """Return the log-ratios of all held-out rows (R,), over all workers."""
        if self.references.validation is None:
            raise ValueError("no held-out preferences")
        return self.references.validation.all_log_ratios(self.model, self.forward, self.worker)
