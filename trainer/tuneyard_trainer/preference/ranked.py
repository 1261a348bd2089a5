"""The objective of a reward model: the likelihood of preferences.

Shapes: G groups, K places of the longest group, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneyard.api.stage_settings import RewardSettings
from tuneyard_trainer.preference.losses import reward_loss
from tuneyard_trainer.preference.metrics import pair_metrics
from tuneyard_trainer.preference.micro_batches import evaluate_rows, scores
from tuneyard_trainer.preference.objective import GroupObjective
from tuneyard_trainer.training.batches import Indices


@dataclass(frozen=True)
class Ranked(GroupObjective):
    """The mean loss of a batch of pairs and rankings."""

    settings: RewardSettings
    metrics: tuple[str, ...] = ("loss", "accuracy")

    def backward(self, groups: Indices, step: int) -> Tensor:
        """Add the gradient. `accuracy`: the share of groups whose best row beats the second."""
        train = self.data.train

        def sums_of(chosen: Indices) -> Tensor:
            scores_R = scores(self.model, train.rows, train.members(chosen), self.forward)
            scores_GK, sizes_G = _grid(scores_R, train.sizes[chosen])
            loss_G = self._loss(scores_GK, sizes_G, train.labels[chosen])
            in_order_G = (scores_GK[:, 0] > scores_GK[:, 1]).float()
            return torch.stack([loss_G.sum(), in_order_G.sum()])

        return self.accumulate(sums_of, groups, step, len(self.metrics))

    def _loss(self, scores_GK: Tensor, sizes_G: Tensor, labels: NDArray[np.float32]) -> Tensor:
        """Return the loss of each group (G,)."""
        return reward_loss(
            scores_GK,
            sizes_G,
            torch.from_numpy(np.array(labels)).to(scores_GK.device),
            margin=self.settings.margin,
            centering=self.settings.centering,
        )

    def held_out(self) -> dict[str, float]:
        groups = self.held_out_groups
        scores_R = evaluate_rows(scores, self.model, groups.rows, self.forward, self.worker)
        scores_GK, sizes_G = _grid(torch.from_numpy(scores_R), groups.sizes)
        loss = float(self._loss(scores_GK, sizes_G, groups.labels).mean())
        agreement = pair_metrics("reward", scores_R, groups)
        kept = ("rewardAccuracy", "rewardMargin")
        return {"validationLoss": loss, **{k: v for k, v in agreement.items() if k in kept}}

    def baseline(self) -> dict[str, float]:
        """Return the held-out metrics of the untrained head: training has not begun."""
        return self.held_out()


def _grid(scores_R: Tensor, sizes: Indices) -> tuple[Tensor, Tensor]:
    """Return the scores of consecutive groups, a group per row and padded with 0 (G, K), and the
    sizes of the groups (G,)."""
    filled_GK = torch.from_numpy(np.arange(np.max(sizes))[None, :] < sizes[:, None])
    filled_GK = filled_GK.to(scores_R.device)
    grid_GK = torch.zeros(filled_GK.shape, dtype=scores_R.dtype, device=scores_R.device)
    return grid_GK.masked_scatter(filled_GK, scores_R), torch.from_numpy(sizes).to(scores_R.device)
