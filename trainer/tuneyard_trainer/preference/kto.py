"""KTO: learning from single completions that are labeled good or bad (arXiv:2402.01306).

Shapes: N completions, K metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from tuneyard.api.stage_settings import DpoSettings
from tuneyard_trainer.preference.dataset import Comparisons
from tuneyard_trainer.preference.losses import kto_loss
from tuneyard_trainer.preference.micro_batches import chunks, logprobs, over_all
from tuneyard_trainer.preference.reference import (
    ReferencedPreferences,
    validation_of,
)
from tuneyard_trainer.training.batches import Indices, share
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.training.seeds import derive_seed
from tuneyard_trainer.worker import Worker


@dataclass(frozen=True)
class UnpairedPreferences:
    """KTO: the mean loss of a batch of single answers, both thumbs with equal weight in the data
    (the paper's section 4.2 balances them so)."""

    model: nn.Module
    forward: Forward
    settings: DpoSettings
    worker: Worker
    learnt: ReferencedPreferences
    figures: tuple[str, ...] = ("loss", "accuracy", "kl")

    @property
    def holds_out(self) -> bool:
        return self.learnt.validation is not None

    def backward(self, groups: Indices, step: int) -> Tensor:
        """(3,) this worker's share of the loss, of the answers on their side of the reference point
        and of that point, the KL."""
        train, rank = self.learnt.train, self.worker.rank
        mine = share(groups, train.groups.tokens, rank, self.worker.world_size)
        kl = self._reference_point(mine, len(groups))
        means_K = torch.zeros(len(self.figures), device=self.worker.device)
        means_K[2] = kl / self.worker.world_size
        self.model.train()
        for index, chunk in enumerate(chunks(train.groups, mine, self.forward.max_tokens)):
            torch.manual_seed(derive_seed(self.settings.training.seed, step, rank, index))
            members = train.groups.members(chunk)
            found_N = logprobs(self.model, train.groups.rows, members, self.forward)
            ratios_N = found_N - torch.from_numpy(train.reference[members]).to(found_N)
            sums_K = self._sums(ratios_N, train.groups.labels[chunk], kl) / len(groups)
            sums_K[0].backward()
            means_K[:2] += sums_K.detach()
        return means_K

    @torch.no_grad()
    def _reference_point(self, mine: Indices, count: int) -> Tensor:
        """The KL of the policy from the reference, on the prompts of a batch with other prompts'
        answers; the same on every worker."""
        rows, reference = self.learnt.mismatched, self.learnt.mismatched_reference
        if rows is None or reference is None:
            raise ValueError("KTO needs mismatched rows")
        self.model.eval()
        total = torch.zeros((), device=self.worker.device)
        for chunk in chunks(self.learnt.train.groups, mine, self.forward.max_tokens):
            found_N = logprobs(self.model, rows, chunk, self.forward)
            total += (found_N - torch.from_numpy(reference[chunk]).to(found_N)).sum() / count
        if self.worker.world_size > 1:
            dist.all_reduce(total)
        return total.clamp(min=0)

    def _sums(self, ratios_N: Tensor, labels: NDArray[np.float32], kl: Tensor) -> Tensor:
        """(2,) summed over the answers."""
        good_N = torch.from_numpy(labels > 0.5).to(ratios_N.device)
        up, down = self._weights
        weights_N = torch.where(good_N, up, down).to(ratios_N)
        loss_N = kto_loss(ratios_N, good_N, kl.to(ratios_N), beta=self.settings.beta) * weights_N
        right_N = ((ratios_N > kl) == good_N).to(ratios_N)
        return torch.stack([loss_N.sum(), right_N.sum()])

    @property
    def _weights(self) -> tuple[float, float]:
        """Of thumbs up and down: each kind weighs half of the training data."""
        labels = self.learnt.train.groups.labels
        share_up = float(np.mean(labels > 0.5))
        return 0.5 / share_up, 0.5 / (1 - share_up)

    def held_out(self) -> dict[str, float]:
        """At the reference point 0, so that evaluations compare."""
        groups, reference = validation_of(self.learnt)
        found = over_all(logprobs, self.model, groups.rows, self.forward, self.worker)
        return self._figures(found - reference, groups)

    def _figures(self, ratios: NDArray[np.float64], groups: Comparisons) -> dict[str, float]:
        sums = self._sums(torch.from_numpy(ratios), groups.labels, torch.zeros(()))
        good = groups.labels > 0.5
        figures = {
            "validationLoss": float(sums[0]) / len(groups),
            "preferenceAccuracy": float(sums[1]) / len(groups),
        }
        if good.any() and not good.all():
            apart = ratios[good].mean() - ratios[~good].mean()
            figures["preferenceMargin"] = float(self.settings.beta * apart)
        return figures

    def baseline(self) -> dict[str, float]:
        """Of the reference, by its own measure: no pass is needed."""
        groups, reference = validation_of(self.learnt)
        return self._figures(np.zeros(len(reference)), groups)

    def num_tokens(self, groups: Indices) -> int:
        return int(self.learnt.train.groups.tokens[groups].sum())
