"""The training loop of every stage with a fixed data set: steps, held-out losses, checkpoints.

An `Objective` defines the loss. The loss of a step is the mean over its global batch, for any
number of workers and micro-batches: each micro-batch adds its share of the sum, gradients are
summed over the workers, and every worker knows the divisor beforehand. The rows of a step
(`batches`) and the dropout are functions of the seed and the step, so a resumed run trains on the
same samples, and its results are bit for bit equal on the same hardware.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tuneyard.api.stage_settings import LoopSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import base, layers
from tuneyard_trainer.models.base import precision_of
from tuneyard_trainer.training.batches import Indices, Order
from tuneyard_trainer.training.checkpoints import METRICS, Checkpoints, LoopState
from tuneyard_trainer.training.history import History
from tuneyard_trainer.training.schedules import rate
from tuneyard_trainer.worker import Interrupted, StageContext, Worker


class Objective(Protocol):
    """A loss over the rows of a data set, on one worker."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `backward` returns, `loss` among them."""
        ...

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out rows."""
        ...

    def backward(self, rows: Indices, step: int) -> Tensor:
        """Add this worker's share of the gradient of a global batch's mean loss to every
        parameter. Returns the worker's share of each metric's mean (K,)."""
        ...

    def held_out(self) -> dict[str, float]:
        """Return the metrics of the held-out rows, `validationLoss` among them, over all
        workers."""
        ...

    def baseline(self) -> dict[str, float]:
        """Return the same metrics of the baseline: the model that training must improve on."""
        ...

    def num_tokens(self, rows: Indices) -> int:
        """Return the number of tokens of a batch, padding excluded."""
        ...


@dataclass
class Loop:
    """The training loop of one attempt."""

    stage: str
    settings: LoopSettings
    worker: Worker
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    objective: Objective
    order: Order
    checkpoints: Checkpoints[LoopState]
    history: History
    base_loss: float | None = None
    """The held-out loss of the baseline; None: not measured."""
    resumed_at: int | None = None
    """The step after which this attempt resumed; None: it started from step 0."""

    @classmethod
    def of(
        cls,
        context: StageContext,
        settings: LoopSettings,
        objective: Objective,
        order: Order,
        model: nn.Module,
    ) -> Loop:
        """Return a loop over `order` that trains the trainable parameters of `model`."""
        parameters = layers.trainable(model)
        optimizer = adamw(parameters, settings)
        return cls(
            stage=context.stage.name,
            settings=settings,
            worker=context.worker,
            model=model,
            parameters=parameters,
            optimizer=optimizer,
            objective=objective,
            order=order,
            checkpoints=Checkpoints(context, LoopState, parameters, optimizer),
            history=History(context.workdir / METRICS, enabled=context.worker.is_main),
        )

    # ---- the run ------------------------------------------------------------------------------

    def train(self) -> LoopState:
        """Train from the newest checkpoint, if there is one, to the last step or early stopping.

        Raises Interrupted after a requested stop, and StageError LossNotFinite.
        """
        total = self.order.total_steps(self.settings.epochs, self.settings.max_steps)
        state = self._resume(total)
        if state.unmeasured:
            state = self._evaluate_late(state, total)
        mark = time.monotonic()
        for rows in self.order.batches(state.step, total):
            if self._should_stop_early(state):
                break
            metrics, stop = self._step(rows, state.step, total)
            now = time.monotonic()
            state = replace(
                state,
                step=state.step + 1,
                tokens=state.tokens + self.objective.num_tokens(rows),
                seconds=state.seconds + now - mark,
            )
            mark = now  # a step's time includes the report of the previous step
            self._log(state, total, metrics)
            evaluated = self._evaluation_due(state.step, total)
            if evaluated:
                state = self._evaluate(state, total, stop=stop)
                stop = state.unmeasured
            if stop or evaluated or self.checkpoints.due(state.step, total):
                self.checkpoints.save(state)
                mark = time.monotonic()
            if stop:
                self.checkpoints.wait()
                raise Interrupted(self.stage, state.step)
        self.checkpoints.wait()
        if self.settings.keep_best:
            self.checkpoints.restore_best(state)
        return state

    def _resume(self, total: int) -> LoopState:
        state = self.checkpoints.resume()
        if state is None:
            self.history.truncate(0)
            self._measure_base(total)
            self.worker.report(total_steps=total, resumed_step=0)
            return LoopState()
        self.history.truncate(state.step)
        self.base_loss = self.history.base_loss()
        self.resumed_at = state.step
        self.worker.report(
            step=state.step,
            total_steps=total,
            message=f"resuming after step {state.step}",
            resumed_step=state.step,
        )
        return state

    def _step(self, rows: Indices, step: int, total: int) -> tuple[dict[str, float], bool]:
        """Take one optimizer step over a global batch. Returns its metrics, among them the loss and
        the gradient norm before clipping, and whether any worker received a stop request."""
        metrics, stop = self.backward(rows, step)
        norm = self._clip()
        loss = metrics["loss"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise not_finite(f"the loss became {loss} (gradient norm {norm}) at step {step + 1}")
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step, total)
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

    def _learning_rate(self, step: int, total: int) -> float:
        return self.settings.learning_rate * rate(self.settings.schedule, step, total)

    def _clip(self) -> float:
        """Clip the gradient. Returns its norm before clipping."""
        limit = self.settings.optimizer.max_gradient_norm
        norm = nn.utils.clip_grad_norm_(
            list(self.parameters.values()), math.inf if limit is None else limit
        )
        return float(norm)

    # ---- held-out loss --------------------------------------------------------------------------

    def _evaluation_due(self, step: int, total: int) -> bool:
        if not self.objective.holds_out:
            return False
        every = self.settings.evaluation_steps or self.order.steps_per_epoch
        return step % every == 0 or step == total

    def _measure_base(self, total: int) -> None:
        """Measure the held-out metrics of the baseline."""
        if not self.objective.holds_out:
            return
        self.worker.report(total_steps=total, message="evaluating the baseline")
        baseline = self.objective.baseline()
        self.base_loss = baseline["validationLoss"]
        metrics = {f"base{name[:1].upper()}{name[1:]}": value for name, value in baseline.items()}
        self.history.write({"step": 0, **metrics})
        self.worker.report(total_steps=total, metrics=metrics)

    def _evaluate_late(self, state: LoopState, total: int) -> LoopState:
        """Evaluate a resumed state that was saved without its evaluation. Raises Interrupted."""
        state = self._evaluate(state, total, stop=False)
        if state.unmeasured:
            raise Interrupted(self.stage, state.step)
        self.checkpoints.save(state)
        return state

    def _evaluate(self, state: LoopState, total: int, *, stop: bool) -> LoopState:
        """Measure the held-out metrics and update the best step and the patience. With `stop`, or
        after a request to stop meanwhile, return the state as unmeasured. Raises StageError."""
        unmeasured = replace(state, unmeasured=True)
        if stop:
            return unmeasured
        try:
            metrics = self.objective.held_out()
        except Interrupted:
            return unmeasured
        state = replace(state, unmeasured=False)
        loss = metrics["validationLoss"]
        if not math.isfinite(loss):
            raise not_finite(f"the held-out loss became {loss} after step {state.step}")
        self.history.write({"step": state.step, **metrics})
        self.worker.report(step=state.step, total_steps=total, metrics=metrics)
        state = self._count_patience(state, loss)
        if state.best_loss is None or loss < state.best_loss:
            state = replace(state, best_step=state.step, best_loss=loss)
        if state.patience_loss == state.best_loss:
            state = replace(state, patience_loss=None)
        return state

    def _count_patience(self, state: LoopState, loss: float) -> LoopState:
        """Return the state with the evaluations since the held-out loss last fell by more than
        `minDelta`, which decides early stopping and not which checkpoint is kept."""
        delta = self.settings.early_stopping.min_delta if self.settings.early_stopping else 0.0
        reference = state.best_loss if state.patience_loss is None else state.patience_loss
        if reference is None or loss < reference - delta:
            return replace(state, patience_loss=loss, stale=0)
        return replace(state, patience_loss=reference, stale=state.stale + 1)

    def _should_stop_early(self, state: LoopState) -> bool:
        rule = self.settings.early_stopping
        return rule is not None and state.stale >= rule.patience

    # ---- results --------------------------------------------------------------------------------

    def _log(self, state: LoopState, total: int, measured: Mapping[str, float]) -> None:
        metrics = {
            **measured,
            "learningRate": self._learning_rate(state.step - 1, total),
            "epoch": state.step / self.order.steps_per_epoch,
            "tokensPerSecond": _tokens_per_second(state),
            "tokens": float(state.tokens),
        }
        self.history.write({"step": state.step, **metrics})
        self.worker.report(step=state.step, total_steps=total, metrics=metrics)

    def summary(self, state: LoopState) -> dict[str, float]:
        """Return the metrics of the stage record."""
        metrics = {
            "steps": float(state.step),
            "epochs": state.step / self.order.steps_per_epoch,
            "tokens": float(state.tokens),
            "trainingSeconds": state.seconds,
            "tokensPerSecond": _tokens_per_second(state),
            "trainedParameters": float(sum(p.numel() for p in self.parameters.values())),
            "parameters": float(layers.count_parameters(self.model)),
            "peakMemoryBytes": float(base.peak_memory_bytes(self.worker.device)),
            "finalLoss": self.history.last("loss"),
        }
        if state.best_loss is not None:  # the last step has an evaluation too
            last = self.history.last("validationLoss")
            metrics["validationLoss"] = state.best_loss if self.settings.keep_best else last
        if self.base_loss is not None:
            metrics["baseValidationLoss"] = self.base_loss
        return metrics

    def details(self, state: LoopState) -> dict[str, Any]:
        """Return the details of the stage record."""
        return {
            "batchSize": self.settings.batch_size,
            "bestStep": state.best_step,
            "resumedAtStep": self.resumed_at,
            "stoppedEarly": self._should_stop_early(state),
            "precision": str(precision_of(self.settings, self.worker)).removeprefix("torch."),
            "device": self.worker.device.type,
            "workers": self.worker.world_size,
        }


def _tokens_per_second(state: LoopState) -> float:
    return state.tokens / state.seconds if state.seconds else 0.0


def not_finite(message: str) -> StageError:
    """Return the error for a loss or a gradient norm that is not finite."""
    return StageError(
        "LossNotFinite",
        f"{message}.",
        advice="Lower training.learningRate, or raise training.schedule.warmup; check the data for "
        "malformed rows.",
    )


def adamw(parameters: Mapping[str, nn.Parameter], settings: LoopSettings) -> torch.optim.Optimizer:
    """Return AdamW without weight decay on vectors (biases and norms)."""
    values = settings.optimizer
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": values.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(values.beta1, values.beta2),
        eps=values.epsilon,
    )
