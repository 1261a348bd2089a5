"""The course of one attempt's training, whichever engine takes the steps.

It decides where an attempt resumes and what follows each step: curves, held-out losses, early
stopping, the guard, checkpoints and an orderly end. The engines are `training.loop` and
`trl_engine`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from tuneyard.api.evaluation import prefixed
from tuneyard.api.stage_settings import LoopSettings, TrainSettings
from tuneyard.api.suites import LOWER_IS_BETTER
from tuneyard.errors import StageError
from tuneyard_trainer.models import adapters, base, layers
from tuneyard_trainer.models.base import precision_of
from tuneyard_trainer.training.batches import Indices, Order
from tuneyard_trainer.training.checkpoints import Checkpoints, LoopState
from tuneyard_trainer.training.history import METRICS, History
from tuneyard_trainer.training.schedules import rate
from tuneyard_trainer.worker import Interrupted, StageContext


class Measure(Protocol):
    """The measurements on a data set: its held-out rows, and the size of its batches."""

    @property
    def holds_out(self) -> bool:
        """Whether there are rows to measure: held-out rows, or those of a guard."""
        ...

    def held_out(self) -> dict[str, float]:
        """Return the metrics of these rows, over all workers: `validationLoss` and others of
        held-out rows, and `generalLoss` of a guard's rows."""
        ...

    def baseline(self) -> dict[str, float]:
        """Return the same metrics of the baseline: the model that training must improve on."""
        ...

    def num_tokens(self, rows: Indices) -> int:
        """Return the number of tokens of a batch, padding excluded."""
        ...


class Course:
    """The course of one attempt's training."""

    def __init__(
        self,
        context: StageContext,
        settings: LoopSettings,
        measure: Measure,
        order: Order,
        model: nn.Module,
    ) -> None:
        """Set up the course of training the trainable parameters of `model` on `order`."""
        self.stage, self.settings, self.worker = context.stage.name, settings, context.worker
        self.measure, self.order, self.model = measure, order, model
        self.parameters = layers.trainable(model)
        # Counted now: after an evaluation, FSDP2 keeps tied weights as two.
        self.num_parameters = layers.count_parameters(model)
        self.optimizer: torch.optim.Optimizer = adamw(self.parameters, settings)
        self.checkpoints = Checkpoints(context, LoopState, self.parameters, self.optimizer)
        self.history = History(context.workdir / METRICS, context.worker)
        self.total = order.total_steps(settings.epochs, settings.max_steps)
        self.guard = settings.guard if isinstance(settings, TrainSettings) else None
        self.suites: Callable[[], dict[str, float]] | None = None
        """Measures the suites. None: there are none."""
        if settings.suites:
            if context.suites_of is None:
                raise ValueError(f"stage {context.stage.name} has suites that nothing measures")
            self.suites = context.suites_of(context, settings, model)
        self._starts_from_base = "tuned" not in context.inputs and adapters.attached(model)
        self.resumed_at: int | None = None
        """The step after which this attempt resumed; None: it started from step 0."""
        self._mark = 0.0
        """When the newest step ended (monotonic): the next step's time includes its report."""

    def begin(self) -> LoopState:
        """Return the state of the newest checkpoint, loaded into the model and the optimizer; a new
        state if there is none. Raises Interrupted, and StageError LossNotFinite."""
        state = self._resume()
        if state.unmeasured:
            state = self._evaluate_late(state)
        self._mark = time.monotonic()
        return state

    def follow(
        self, state: LoopState, rows: Indices, metrics: Mapping[str, float], *, stop: bool
    ) -> LoopState:
        """Return the state after one more step, taken on the global batch `rows`: report it, and
        evaluate and save a checkpoint if they are due.

        `metrics`: the step's loss and gradient norm before clipping, and others. `stop`: whether
        any worker received a stop request. Raises Interrupted after such a request, and StageError
        LossNotFinite. Called by all ranks with equal arguments.
        """
        now = time.monotonic()
        state = replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + self.measure.num_tokens(rows),
            seconds=state.seconds + now - self._mark,
        )
        self._mark = now
        self._log(state, metrics)
        evaluated = self._evaluation_due(state.step)
        if evaluated:
            state = self._evaluate(state, stop=stop)
            stop = state.unmeasured
        if stop or evaluated or self.checkpoints.due(state.step, self.total):
            self.checkpoints.save(state)
            self._mark = time.monotonic()
        if stop:
            self.checkpoints.wait()
            raise Interrupted(self.stage, state.step)
        return state

    def finish(self, state: LoopState) -> LoopState:
        """Wait for the last checkpoint and load the weights to keep; return the state. Raises
        StageError GuardExceeded if no checkpoint is within the bound of the guard."""
        self.checkpoints.wait()
        if self.guard and state.best_step is None:
            raise self._nothing_within(state)
        if self.settings.keep_best:
            self.checkpoints.restore_best(state)
        return state

    def should_stop_early(self, state: LoopState) -> bool:
        """Return whether evaluations have stopped improving, or the guard stops training."""
        rule = self.settings.early_stopping
        is_stale = rule is not None and state.stale >= rule.patience
        return is_stale or self.is_stopped_by_guard(state)

    def is_stopped_by_guard(self, state: LoopState) -> bool:
        """Return whether the loss of general data has risen beyond the bound of the guard."""
        return self.guard is not None and state.beyond_guard >= self.guard.patience

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.settings.learning_rate * rate(self.settings.schedule, step, self.total)

    def _resume(self) -> LoopState:
        state = self.checkpoints.resume()
        if state is None:
            self.history.truncate(0)
            baseline = self._measure_base()
            self.worker.report(total_steps=self.total, resumed_step=0)
            return LoopState(base_general_loss=baseline.get("generalLoss"))
        self.history.truncate(state.step)
        self.resumed_at = state.step
        self.worker.report(
            step=state.step,
            total_steps=self.total,
            message=f"resuming after step {state.step}",
            resumed_step=state.step,
        )
        return state

    # ---- held-out loss --------------------------------------------------------------------------

    @property
    def _measures(self) -> bool:
        """Whether evaluations measure anything."""
        return self.measure.holds_out or self.suites is not None

    def _evaluation_due(self, step: int) -> bool:
        if not self._measures:
            return False
        every = self.settings.evaluation_steps or self.order.steps_per_epoch
        return step % every == 0 or step == self.total

    def _measure_base(self) -> Mapping[str, float]:
        """Measure, report and return the metrics of the baseline."""
        if not self._measures:
            return {}
        self.worker.report(total_steps=self.total, message="evaluating the baseline")
        baseline = self.measure.baseline() if self.measure.holds_out else {}
        if self.suites:
            # A new adapter may change the model before it is trained, as virtual tokens do.
            with adapters.disabled(self.model) if self._starts_from_base else nullcontext():
                baseline |= self.suites()
        self._require_best_by(baseline)
        metrics = {prefixed("base", name): value for name, value in baseline.items()}
        self.history.write({"step": 0, **metrics})
        self.worker.report(total_steps=self.total, metrics=metrics)
        return baseline

    def _measured(self) -> dict[str, float]:
        """Return the metrics of an evaluation. Raises Interrupted on all workers if any is asked to
        stop."""
        metrics = self.measure.held_out() if self.measure.holds_out else {}
        return metrics | self.suites() if self.suites else metrics

    def _require_best_by(self, metrics: Mapping[str, float]) -> None:
        """Raise StageError MetricNotMeasured if the items of a suite lack the metric that chooses
        an evaluation."""
        name = self.settings.best_by or ""
        suite = name.partition("/")[0]
        if "/" not in name or name in metrics:
            return
        found = ", ".join(each for each in metrics if each.startswith(f"{suite}/"))
        raise StageError(
            "MetricNotMeasured",
            f"training.bestBy is {name}, and the items of {suite} that are measured during "
            f"training have no such value.",
            advice=f"Set training.bestBy to one of {found}, or raise the limit in training.suites.",
        )

    def _evaluate_late(self, state: LoopState) -> LoopState:
        """Evaluate a resumed state that was saved without its evaluation. Raises Interrupted."""
        state = self._evaluate(state, stop=False)
        if state.unmeasured:
            raise Interrupted(self.stage, state.step)
        self.checkpoints.save(state)
        return state

    def _evaluate(self, state: LoopState, *, stop: bool) -> LoopState:
        """Measure the held-out metrics and update the best step and the patience. With `stop`, or
        after a request to stop meanwhile, return the state as unmeasured. Raises StageError."""
        unmeasured = replace(state, unmeasured=True)
        if stop:
            return unmeasured
        try:
            metrics = self._measured()
        except Interrupted:
            return unmeasured
        state = replace(state, unmeasured=False)
        for name in ("validationLoss", "generalLoss"):
            if not math.isfinite(metrics.get(name, 0.0)):
                kind = "held-out" if name == "validationLoss" else "general"
                message = f"the {kind} loss became {metrics[name]} after step {state.step}"
                raise not_finite(message)
        if state.base_general_loss is not None:
            metrics["generalLossIncrease"] = metrics["generalLoss"] - state.base_general_loss
        self.history.write({"step": state.step, **metrics})
        self.worker.report(step=state.step, total_steps=self.total, metrics=metrics)
        return self._judge(state, metrics)

    def _judge(self, state: LoopState, metrics: Mapping[str, float]) -> LoopState:
        """Return the state with the best step, the patience and the guard's count after an
        evaluation. An evaluation beyond the guard's bound is never the best."""
        is_within = True
        if self.guard:
            is_within = metrics["generalLossIncrease"] <= self.guard.worsens_by
            state = replace(state, beyond_guard=0 if is_within else state.beyond_guard + 1)
            if self.is_stopped_by_guard(state):
                self.worker.report(step=state.step, message=self._stopped_by_guard(state))
        name = self.settings.best_by or "validationLoss"
        if name not in metrics:  # a guard or suites without held-out rows
            return replace(state, best_step=state.step) if self.guard and is_within else state
        loss = metrics[name] if _lower_is_better(name) else -metrics[name]
        state = self._count_patience(state, loss)
        if is_within and (state.best_loss is None or loss < state.best_loss):
            state = replace(state, best_step=state.step, best_loss=loss)
        if state.patience_loss == state.best_loss:
            state = replace(state, patience_loss=None)
        return state

    def _count_patience(self, state: LoopState, loss: float) -> LoopState:
        """Return the state with the evaluations since the loss last fell by more than `minDelta`,
        which decides early stopping and not which checkpoint is kept."""
        delta = self.settings.early_stopping.min_delta if self.settings.early_stopping else 0.0
        reference = state.best_loss if state.patience_loss is None else state.patience_loss
        if reference is None or loss < reference - delta:
            return replace(state, patience_loss=loss, stale=0)
        return replace(state, patience_loss=reference, stale=state.stale + 1)

    def _stopped_by_guard(self, state: LoopState) -> str:
        """Return why the guard stopped training, and what is kept."""
        increase = self.history.last("generalLossIncrease")
        bound = self.guard.worsens_by if self.guard else math.nan
        kept = "no earlier step is" if state.best_step is None else f"step {state.best_step} is"
        return (
            f"stopped by the guard at step {state.step}: the general loss has risen by "
            f"{increase:.3g} nats per token, and the bound is {bound:g}; {kept} kept"
        )

    def _nothing_within(self, state: LoopState) -> StageError:
        return StageError(
            "GuardExceeded",
            f"{self._stopped_by_guard(state)}.",
            advice="Lower training.learningRate or training.evaluationSteps, add "
            "training.preserve or data.replay, or raise training.guard.worsensBy.",
        )

    # ---- results --------------------------------------------------------------------------------

    def _log(self, state: LoopState, measured: Mapping[str, float]) -> None:
        metrics = {
            **measured,
            "learningRate": self.learning_rate(state.step - 1),
            "epoch": state.step / self.order.steps_per_epoch,
            "tokensPerSecond": _tokens_per_second(state),
            "tokens": float(state.tokens),
        }
        self.history.write({"step": state.step, **metrics})
        self.worker.report(step=state.step, total_steps=self.total, metrics=metrics)

    def summary(self, state: LoopState) -> dict[str, float]:
        """Return the metrics of the stage record."""
        metrics = {
            "steps": float(state.step),
            "epochs": state.step / self.order.steps_per_epoch,
            "tokens": float(state.tokens),
            "trainingSeconds": state.seconds,
            "tokensPerSecond": _tokens_per_second(state),
            "trainedParameters": float(sum(p.numel() for p in self.parameters.values())),
            "parameters": float(self.num_parameters),
            "peakMemoryBytes": float(base.peak_memory_bytes(self.worker.device)),
            "finalLoss": self.history.last("loss"),
        }
        kept = state.best_step if self.settings.keep_best and state.best_step else state.step
        evaluated = self.history.evaluated(kept)
        for name in ("validationLoss", "generalLoss", *(each for each in evaluated if "/" in each)):
            if name in evaluated:
                of_base = prefixed("base", name)
                metrics |= {name: evaluated[name], of_base: self.history.last(of_base)}
        if "generalLossIncrease" in evaluated:
            metrics["generalLossIncrease"] = evaluated["generalLossIncrease"]
        return metrics

    def details(self, state: LoopState) -> dict[str, Any]:
        """Return the details of the stage record."""
        return {
            "batchSize": self.settings.batch_size,
            "bestStep": state.best_step,
            "resumedAtStep": self.resumed_at,
            "stoppedEarly": self.should_stop_early(state),
            **self._guard_details(state),
            "precision": str(precision_of(self.settings, self.worker)).removeprefix("torch."),
            "device": self.worker.device.type,
            "workers": self.worker.world_size,
        }

    def _guard_details(self, state: LoopState) -> dict[str, Any]:
        if not self.is_stopped_by_guard(state):
            return {}
        return {"stoppedByGuard": self._stopped_by_guard(state)}


def _lower_is_better(metric: str) -> bool:
    """Return whether the lowest value of a metric is the best: of a loss, and some of suites."""
    return metric.endswith("Loss") or metric.rpartition("/")[2] in LOWER_IS_BETTER


def _tokens_per_second(state: LoopState) -> float:
    return state.tokens / state.seconds if state.seconds else 0.0


def require_finite(loss: float, norm: float, step: int) -> None:
    """Raise StageError LossNotFinite if the loss or the gradient norm of a step is not finite."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise not_finite(f"the loss became {loss} (gradient norm {norm}) at step {step}")


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
