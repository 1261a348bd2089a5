"""The native training loop of every stage with a fixed data set.

An `Objective` defines the loss. The loss of a step is the mean over its global batch, for any
number of workers and micro-batches: each micro-batch adds its share of the sum, gradients are
summed over the workers, and every worker knows the divisor beforehand. The rows of a step
(`batches`) and the dropout are functions of the seed and the step, so a resumed run trains on the
same samples, and its results are bit for bit equal on the same hardware.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tuneyard.api.stage_settings import LoopSettings
from tuneyard_trainer.training.batches import Indices, Order
from tuneyard_trainer.training.checkpoints import LoopState
from tuneyard_trainer.training.course import Course, Measure, require_finite
from tuneyard_trainer.worker import StageContext


class Objective(Measure, Protocol):
    """A loss over the rows of a data set, on one worker."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `backward` returns, `loss` among them."""
        ...

    def backward(self, rows: Indices, step: int) -> Tensor:
        """Add this worker's share of the gradient of a global batch's mean loss to every
        parameter. Returns the worker's share of each metric's mean (K,)."""
        ...


class Loop(Course):
    """The course of an attempt whose steps are taken here."""

    def __init__(
        self,
        context: StageContext,
        settings: LoopSettings,
        objective: Objective,
        order: Order,
        model: nn.Module,
    ) -> None:
        super().__init__(context, settings, objective, order, model)
        self.objective = objective

    def train(self) -> LoopState:
        """Train from the newest checkpoint, if there is one, to the last step or early stopping.

        Raises Interrupted after a requested stop, and StageError LossNotFinite.
        """
        state = self.begin()
        for rows in self.order.batches(state.step, self.total):
            if self.should_stop_early(state):
                break
            metrics, stop = self._step(rows, state.step)
            state = self.follow(state, rows, metrics, stop=stop)
        return self.finish(state)

    def _step(self, rows: Indices, step: int) -> tuple[dict[str, float], bool]:
        """Take one optimizer step over a global batch. Returns its metrics, among them the loss and
        the gradient norm before clipping, and whether any worker received a stop request."""
        metrics, stop = self.backward(rows, step)
        norm = self._clip()
        require_finite(metrics["loss"], norm, step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**metrics, "gradientNorm": norm}, stop

    def backward(self, rows: Indices, step: int) -> tuple[dict[str, float], bool]:
        """Set the gradient of the global batch's mean loss in every parameter, on every worker.
        Returns the metrics, and whether any worker received a stop request."""
        self.model.train()
        means_K, stop = self._reduce(self.objective.backward(rows, step))
        return dict(zip(self.objective.metrics, means_K.tolist(), strict=True)), stop

    def _reduce(self, means_K: Tensor) -> tuple[Tensor, bool]:
        """Sum gradients, metrics and stop requests over the workers, in one buffer."""
        stop = torch.tensor(float(self.worker.stop()), device=self.worker.device)
        if self.worker.world_size == 1:
            return means_K, bool(stop)
        grads = []
        for parameter in self.parameters.values():
            if parameter.grad is None:  # this worker has no rows of a small batch
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        flat = torch.cat([*(g.reshape(-1).float() for g in grads), means_K, stop[None]])
        dist.all_reduce(flat)
        sizes = [g.numel() for g in grads]
        count = len(means_K)
        for grad, reduced in zip(grads, flat[: -count - 1].split(sizes), strict=True):
            grad.copy_(reduced.view_as(grad))
        return flat[-count - 1 : -1], bool(flat[-1] > 0)

    def _clip(self) -> float:
        """Clip the gradient. Returns its norm before clipping."""
        limit = self.settings.optimizer.max_gradient_norm
        norm = nn.utils.clip_grad_norm_(
            list(self.parameters.values()), math.inf if limit is None else limit
        )
        return float(norm)
