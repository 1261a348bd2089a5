"""KTO: training on single completions that are labeled good or bad (arXiv:2402.01306).

Shapes: N completions, K metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tuneyard_trainer.models.sharding import in_step
from tuneyard_trainer.preference.losses import kto_loss
from tuneyard_trainer.preference.objective import ReferencedObjective
from tuneyard_trainer.training.batches import Indices, micro_batches
from tuneyard_trainer.training.losses import spare_batch


@dataclass(frozen=True)
class UnpairedPreferences(ReferencedObjective):
    """KTO's mean loss. Good and bad completions have equal total weight in the training data, as
    section 4.2 of the paper balances them."""

    metrics: tuple[str, ...] = ("loss", "accuracy", "kl")

    def backward(self, groups: Indices, step: int) -> Tensor:
        """Add the gradient. `accuracy`: the share of completions on the right side of `kl`."""
        kl = self.reference_point(groups)
        self.model.train()

        def sums_of(chosen: Indices) -> Tensor:
            return self._sums(self.log_ratios(chosen), self.data.train.labels[chosen], kl)

        means_K = self.accumulate(sums_of, groups, step, num_metrics=2)
        return torch.cat([means_K, kl[None] / self.worker.world_size])

    @torch.no_grad()
    def reference_point(self, groups: Indices) -> Tensor:
        """Return the KL of the policy from the reference, on a batch's prompts with completions of
        other prompts; the same on every worker."""
        mismatched = self.references.mismatched
        if mismatched is None:
            raise ValueError("KTO needs mismatched rows")
        self.model.eval()
        kl = torch.zeros((), device=self.worker.device)
        batches = micro_batches(
            self.share(groups),  # a group is one row here
            mismatched.rows.lengths,
            capacity=0,
            max_tokens=self.forward.max_tokens,
            pack=False,
        )
        spare = spare_batch(batches, mismatched.rows)
        for micro_batch, is_own in in_step(self.model, batches, spare):
            ratios_N = mismatched.log_ratios(self.model, micro_batch.rows, self.forward)
            kl += ratios_N.sum() / len(groups) if is_own else 0.0
        if self.worker.world_size > 1:
            dist.all_reduce(kl)
        return kl.clamp(min=0)

    def _sums(self, ratios_N: Tensor, labels: NDArray[np.float32], kl: Tensor) -> Tensor:
        """Return the loss and the accuracy (2,), summed over the completions."""
        good_N = torch.from_numpy(labels > 0.5).to(ratios_N.device)
        good_weight, bad_weight = self.weights
        weights_N = torch.where(good_N, good_weight, bad_weight).to(ratios_N)
        loss_N = kto_loss(ratios_N, good_N, kl.to(ratios_N), beta=self.settings.beta) * weights_N
        right_N = ((ratios_N > kl) == good_N).to(ratios_N)
        return torch.stack([loss_N.sum(), right_N.sum()])

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of good and of bad completions: each kind weighs half of the data."""
        good = float(np.mean(self.data.train.labels > 0.5))
        return 0.5 / good, 0.5 / (1 - good)

    def held_out(self) -> dict[str, float]:
        """Return the held-out metrics at the reference point 0, so that evaluations compare."""
        return self._evaluate(self.held_out_log_ratios())

    def baseline(self) -> dict[str, float]:
        """Return the metrics of the reference. Its log-ratios are 0: no forward pass is needed."""
        return self._evaluate(np.zeros(len(self.held_out_groups)))

    def _evaluate(self, ratios_N: NDArray[np.float64]) -> dict[str, float]:
        labels = self.held_out_groups.labels
        sums = self._sums(torch.from_numpy(ratios_N), labels, torch.zeros(()))
        good_N = labels > 0.5
        metrics = {
            "validationLoss": float(sums[0]) / len(labels),
            "preferenceAccuracy": float(sums[1]) / len(labels),
        }
        if good_N.any() and not good_N.all():
            margin = ratios_N[good_N].mean() - ratios_N[~good_N].mean()
            metrics["preferenceMargin"] = float(self.settings.beta * margin)
        return metrics
