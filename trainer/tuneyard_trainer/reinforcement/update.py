"""The update of a policy on its completions: epochs of shuffled minibatches.

A minibatch does not depend on the number of workers or micro-batches. Every worker knows which
completions a minibatch has and how many tokens they hold, and adds its share of the gradient
micro-batch by micro-batch; the shares are summed. Shapes: B completions of this worker, R of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tuneyard.api.stage_settings import LoopSettings
from tuneyard_trainer.models import layers
from tuneyard_trainer.reinforcement.actor import Actor, Sequences
from tuneyard_trainer.reinforcement.method import Experience, Method
from tuneyard_trainer.reinforcement.rollouts import ProcessGroup, Rollouts
from tuneyard_trainer.training.course import adamw, not_finite
from tuneyard_trainer.training.seeds import MINIBATCHES, generator

VALUE_HEAD_RATE = 10.0
"""The value head's learning rate as a multiple of the policy's: the head starts at zero (OpenRLHF:
9e-6 for critics, 5e-7 for actors)."""


@dataclass(frozen=True)
class PolicyOptimizer:
    """AdamW over the policy and, at its own rate, the value head."""

    actor: Actor
    method: Method
    settings: LoopSettings
    group: ProcessGroup
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(
        cls, actor: Actor, method: Method, settings: LoopSettings, group: ProcessGroup
    ) -> PolicyOptimizer:
        optimizer = adamw(layers.trainable(actor.model), settings)
        if actor.value_head:
            head = list(actor.value_head.parameters())
            optimizer.add_param_group(
                {"params": head, "weight_decay": 0.0, "scale": VALUE_HEAD_RATE}
            )
        return cls(actor, method, settings, group, actor.parameters, optimizer)

    def improve(
        self, experience: Experience, rollouts: Rollouts, update: int, learning_rate: float
    ) -> tuple[dict[str, float], int]:
        """Train for all epochs on an update's completions.

        Returns the loss metrics and the gradient norm, as means over tokens and epochs, and the
        number of optimizer steps.
        """
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = learning_rate * param_group.get("scale", 1.0)
        self.actor.train()
        row_of = {completion: row for row, completion in enumerate(rollouts.owned)}
        sums = torch.zeros(len(self.method.loss_metrics), device=self.actor.device)
        norms: list[float] = []
        for chosen in self._minibatches(len(rollouts.lengths_R), update):
            lengths = rollouts.lengths_R[torch.from_numpy(chosen).to(self.actor.device)]
            rows = [row_of[int(i)] for i in chosen if int(i) in row_of]
            divisor = self.method.divisor(lengths)
            sums += self._backward(experience, rollouts.sequences, rows, divisor)
            norms.append(self._step(update))
        trained_tokens = rollouts.num_tokens * self.method.optimization_epochs
        means = (self.group.sum(sums) / trained_tokens).tolist()
        metrics = dict(zip(self.method.loss_metrics, means, strict=True))
        return {**metrics, "gradientNorm": sum(norms) / len(norms)}, len(norms)

    def _minibatches(self, count: int, update: int) -> list[np.ndarray]:
        """Return the indices (among R) of each minibatch; every epoch has each completion once."""
        size = self.settings.batch_size
        found = []
        for epoch in range(self.method.optimization_epochs):
            shuffled = generator(self.settings.seed, MINIBATCHES, update, epoch).permutation(count)
            found += [shuffled[start : start + size] for start in range(0, count, size)]
        return found

    def _backward(
        self, experience: Experience, sequences: Sequences, rows: Sequence[int], divisor: Tensor
    ) -> Tensor:
        """Add the gradient of this worker's share of a minibatch, micro-batch by micro-batch.

        `rows`: of this worker's B completions. Returns the sums of the loss metrics.
        """
        sums = torch.zeros(len(self.method.loss_metrics), device=self.actor.device)
        for members in self.actor.micro_batches(sequences.take(rows)):
            chosen = [rows[i] for i in members]
            now = self.actor.score(sequences.take(chosen), with_entropy=self.method.rewards_entropy)
            loss = self.method.loss(now, experience.take(chosen))
            (loss.total / divisor).backward()
            sums += torch.stack([loss.metrics[name].detach() for name in self.method.loss_metrics])
        return sums

    def _step(self, update: int) -> float:
        """Sum the workers' gradients and step. Returns the norm before clipping; raises StageError
        LossNotFinite."""
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # a worker without a share of this minibatch
                parameter.grad = torch.zeros_like(parameter)
        if self.group.world_size > 1:
            self._sum([p.grad for p in parameters if p.grad is not None])
        limit = self.settings.optimizer.max_gradient_norm
        norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))
        if not math.isfinite(norm):
            raise not_finite(f"the gradient norm became {norm} in update {update + 1}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _sum(self, gradients: Sequence[Tensor]) -> None:
        """Sum the gradients over the workers, in one buffer, in place."""
        flat = self.group.sum(torch.cat([gradient.reshape(-1).float() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))
