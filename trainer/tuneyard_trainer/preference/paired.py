"""The objective of DPO and its variants: the mean loss of pairs, and of the pairs of rankings.

Shapes: G groups, R rows, P pairs, K metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tuneyard.api.stage_settings import DpoSettings
from tuneyard.errors import StageError
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.losses import PairLoss, pair_loss
from tuneyard_trainer.preference.metrics import pair_metrics
from tuneyard_trainer.preference.objective import ReferencedObjective
from tuneyard_trainer.training.batches import Indices


def require_shape(settings: DpoSettings, data: Preferences) -> None:
    """Raise StageError WrongPreferences if the loss does not fit the preferences."""
    if data.labeled != (settings.loss == "kto"):
        found = "single completions labeled good or bad" if data.labeled else "pairs"
        raise StageError(
            "WrongPreferences",
            f"the preferences are {found}, and optimize.dpo.loss is {settings.loss}.",
            advice="Set optimize.dpo.loss to kto for single completions, or to another loss for "
            "pairs.",
        )


@dataclass(frozen=True)
class Paired(ReferencedObjective):
    """The mean loss of a batch of pairs and rankings. A ranking's loss is the mean over its
    pairs."""

    metrics: tuple[str, ...] = ("loss", "accuracy", "chosenReward", "rejectedReward")

    def backward(self, groups: Indices, step: int) -> Tensor:
        """Add the gradient. The rewards are the implicit ones (Rafailov et al. 2023, section 4)."""

        def sums_of(chosen: Indices) -> Tensor:
            return self._sums(self.log_ratios(chosen), self.data.train, chosen)

        return self.accumulate(sums_of, groups, step, len(self.metrics))

    def _sums(self, ratios_R: Tensor, comparisons: Comparisons, groups: Indices) -> Tensor:
        """Return the metrics (4,), summed over the groups."""
        pairs = _pairs(comparisons, groups, ratios_R.device)
        chosen_P, rejected_P = ratios_R[pairs.better], ratios_R[pairs.worse]
        loss_P = self._loss(ratios_R, comparisons, groups, pairs)
        right_P = (chosen_P > rejected_P).to(loss_P) + 0.5 * (chosen_P == rejected_P)
        beta = self.settings.beta
        metrics_KP = torch.stack([loss_P, right_P, beta * chosen_P, beta * rejected_P])
        return (metrics_KP * pairs.weights).sum(dim=1)

    def _loss(
        self, ratios_R: Tensor, comparisons: Comparisons, groups: Indices, pairs: _Pairs
    ) -> Tensor:
        """Return the loss of each pair (P,)."""
        kind: PairLoss = self.settings.loss  # type: ignore[assignment]
        if kind == "ipo":  # the mean over a completion's tokens, as in TRL
            targets = comparisons.rows.targets[comparisons.members(groups)]
            ratios_R = ratios_R / torch.from_numpy(targets).to(ratios_R)
        return pair_loss(
            kind,
            ratios_R[pairs.better],
            ratios_R[pairs.worse],
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
            labels_P=pairs.labels if bool((pairs.labels < 1).any()) else None,
        )

    def held_out(self) -> dict[str, float]:
        ratios_R = self.held_out_log_ratios()
        agreement = pair_metrics("preference", self.settings.beta * ratios_R, self.held_out_groups)
        kept = ("preferenceAccuracy", "preferenceMargin")
        return {
            "validationLoss": self._held_out_loss(torch.from_numpy(ratios_R)),
            **{name: value for name, value in agreement.items() if name in kept},
        }

    def baseline(self) -> dict[str, float]:
        """Return the metrics of the reference. Its log-ratios are 0: no forward pass is needed."""
        zeros_R = torch.zeros(len(self.held_out_groups.rows), dtype=torch.float64)
        return {"validationLoss": self._held_out_loss(zeros_R), "preferenceAccuracy": 0.5}

    def _held_out_loss(self, ratios_R: Tensor) -> float:
        groups = self.held_out_groups
        return float(self._sums(ratios_R, groups, np.arange(len(groups)))[0]) / len(groups)


class _Pairs(NamedTuple):
    """Every pair of some groups; (P,) each."""

    better: Tensor
    """The position of the better row among the rows of the groups."""
    worse: Tensor
    """The position of the worse row."""
    weights: Tensor
    """The weights of a group's pairs sum to 1."""
    labels: Tensor
    """The probability that the order is right."""


def _pairs(comparisons: Comparisons, groups: Indices, device: torch.device) -> _Pairs:
    pairs: list[tuple[int, int, float, float]] = []
    start = 0
    for group in groups:
        size, label = int(comparisons.sizes[group]), float(comparisons.labels[group])
        weight = 2 / (size * (size - 1))
        pairs += [
            (start + i, start + j, weight, label) for i in range(size) for j in range(i + 1, size)
        ]
        start += size
    return _Pairs(*(torch.tensor(column, device=device) for column in zip(*pairs, strict=True)))
