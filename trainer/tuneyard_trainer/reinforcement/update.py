"""The passes that improve a policy on an update's answers: epochs of shuffled minibatches.

A minibatch is the same whatever the number of workers and passes: everybody knows which answers it
has and how many tokens they hold, each worker adds its share of the gradient pass by pass, and the
shares are summed. Shapes: B answers of this worker, R of all.
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
from tuneyard_trainer.reinforcement.actor import Actor, Texts
from tuneyard_trainer.reinforcement.method import Experience, Method
from tuneyard_trainer.reinforcement.rollouts import ProcessGroup, Rollouts
from tuneyard_trainer.training.loop import adamw, not_finite
from tuneyard_trainer.training.seeds import MINIBATCHES, generator

VALUE_HEAD_RATE = 10.0
"""The value head's learning rate over the policy's: it starts from nothing (OpenRLHF: critics at
9e-6 beside actors at 5e-7)."""


@dataclass(frozen=True)
class PolicyOptimizer:
    """AdamW over the policy and, at its own rate, the value head."""

    actor: Actor
    method: Method
    settings: LoopSettings
    peers: ProcessGroup
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(
        cls, actor: Actor, method: Method, settings: LoopSettings, peers: ProcessGroup
    ) -> PolicyOptimizer:
        optimizer = adamw(layers.trainable(actor.model), settings)
        if actor.value_head:
            head = list(actor.value_head.parameters())
            optimizer.add_param_group(
                {"params": head, "weight_decay": 0.0, "scale": VALUE_HEAD_RATE}
            )
        return cls(actor, method, settings, peers, actor.parameters, optimizer)

    def improve(
        self, experience: Experience, rollouts: Rollouts, update: int, learning_rate: float
    ) -> tuple[dict[str, float], int]:
        """All epochs over an update's answers. Returns what was watched, as means over tokens and
        epochs, and the number of optimizer steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("scale", 1.0)
        self.actor.train()
        place = {answer: own for own, answer in enumerate(rollouts.owned)}
        sums = torch.zeros(len(self.method.watched), device=self.actor.device)
        norms: list[float] = []
        for chosen in self._minibatches(len(rollouts.lengths_R), update):
            lengths = rollouts.lengths_R[torch.from_numpy(chosen).to(self.actor.device)]
            own = [place[int(answer)] for answer in chosen if int(answer) in place]
            sums += self._backward(experience, rollouts.texts, own, self.method.divisor(lengths))
            norms.append(self._step(update))
        seen_tokens = rollouts.num_tokens * self.method.optimization_epochs
        means = (self.peers.sum(sums) / seen_tokens).tolist()
        watched = dict(zip(self.method.watched, means, strict=True))
        return {**watched, "gradientNorm": sum(norms) / len(norms)}, len(norms)

    def _minibatches(self, count: int, update: int) -> list[np.ndarray]:
        """Which of the R answers each has; every epoch has each answer once."""
        size = self.settings.batch_size
        found = []
        for epoch in range(self.method.optimization_epochs):
            shuffled = generator(self.settings.seed, MINIBATCHES, update, epoch).permutation(count)
            found += [shuffled[start : start + size] for start in range(0, count, size)]
        return found

    def _backward(
        self, experience: Experience, texts: Texts, own: Sequence[int], divisor: Tensor
    ) -> Tensor:
        """Adds the gradient of this worker's part of a minibatch, pass by pass. Returns what the
        method watches, summed."""
        sums = torch.zeros(len(self.method.watched), device=self.actor.device)
        for layout in self.actor.passes(texts.take(own)):
            rows = [own[i] for i in layout]
            now = self.actor.score(texts.take(rows), with_entropy=self.method.rewards_entropy)
            loss = self.method.loss(now, experience.take(rows))
            (loss.total / divisor).backward()
            sums += torch.stack([loss.watched[name].detach() for name in self.method.watched])
        return sums

    def _step(self, update: int) -> float:
        """Sums the workers' gradients and steps. Returns the norm before clipping."""
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # a worker without a part in this minibatch
                parameter.grad = torch.zeros_like(parameter)
        if self.peers.world_size > 1:
            self._sum([p.grad for p in parameters if p.grad is not None])
        limit = self.settings.optimizer.max_gradient_norm
        norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))
        if not math.isfinite(norm):
            raise not_finite(f"the gradient's norm became {norm} in update {update + 1}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _sum(self, gradients: Sequence[Tensor]) -> None:
        """Over the workers, in one buffer, in place."""
        flat = self.peers.sum(torch.cat([gradient.reshape(-1).float() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))
