"""The course of one attempt's reinforcement learning, whichever engine takes the updates.

It decides where an attempt resumes, which prompts an update has, and what surrounds it: stop
conditions before it, and curves, held-out measurements, checkpoints and an orderly end after it.
The engines are `reinforcement.loop` and `trl_engine`. Shapes as in `rollouts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tuneyard.api.evaluation import prefixed
from tuneyard.api.stage_settings import GrpoSettings, PpoSettings
from tuneyard_trainer.data.prompts import TokenizedPrompt
from tuneyard_trainer.models.base import peak_memory_bytes
from tuneyard_trainer.models.layers import count_parameters
from tuneyard_trainer.reinforcement.held_out import (
    HeldOut,
    default_interval,
    held_out_metrics,
    split,
)
from tuneyard_trainer.reinforcement.method import Method
from tuneyard_trainer.reinforcement.rollouts import Collector, Rollouts
from tuneyard_trainer.reinforcement.state import RlState
from tuneyard_trainer.reinforcement.stop_conditions import (
    count_alike,
    count_truncated,
    diverged,
)
from tuneyard_trainer.training.batches import Order
from tuneyard_trainer.training.checkpoints import Checkpoints
from tuneyard_trainer.training.history import METRICS, History
from tuneyard_trainer.training.losses import stop_check
from tuneyard_trainer.training.schedules import rate
from tuneyard_trainer.worker import Interrupted, StageContext, Worker


@dataclass
class Course:
    """The course of one attempt's training."""

    stage: str
    settings: PpoSettings | GrpoSettings
    method: Method
    worker: Worker
    collector: Collector
    parameters: Mapping[str, nn.Parameter]
    """The trained parameters, by name."""
    prompts: Sequence[TokenizedPrompt]
    """The prompts to train on."""
    held_out: HeldOut
    order: Order
    total_steps: int
    """The updates of the run."""
    checkpoints: Checkpoints[RlState]
    history: History
    resumed_at: int | None = None
    """The update after which this attempt resumed; None: it started from the beginning."""

    @classmethod
    def of(
        cls,
        context: StageContext,
        settings: PpoSettings | GrpoSettings,
        method: Method,
        collector: Collector,
        tokenized: Sequence[TokenizedPrompt],
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> Course:
        """Set up the course of training `parameters` on the prompts `tokenized`, a part of which is
        held out."""
        worker, training = context.worker, settings.training
        prompts, held_out = split(tokenized)
        check_stop = stop_check(collector.actor.model, worker)
        order = Order(
            np.arange(len(prompts), dtype=np.int64),
            max(1, method.completions // method.group_size),
            training.seed,
        )
        return cls(
            stage=context.stage.name,
            settings=settings,
            method=method,
            worker=worker,
            collector=collector,
            parameters=parameters,
            prompts=prompts,
            held_out=HeldOut.of(held_out, prompts, collector, method, training.seed, check_stop),
            order=order,
            total_steps=order.total_steps(training.epochs, training.max_steps),
            checkpoints=Checkpoints(context, RlState, parameters, optimizer),
            history=History(context.workdir / METRICS, worker),
        )

    # ---- the run ------------------------------------------------------------------------------

    def begin(self) -> RlState:
        """Return the state of the newest checkpoint, loaded into the parameters and the optimizer.
        Without a checkpoint, measure the start model and return the first state. Raises
        Interrupted."""
        state = self._resume()
        return self._measure_late(state) if state.unmeasured else state

    def is_over(self, state: RlState) -> bool:
        """Return whether there is no further update."""
        return state.step >= self.total_steps or state.stopped is not None

    def prompts_of(self, step: int) -> list[TokenizedPrompt]:
        """Return the prompts of an update, each `group_size` times.

        Updates take consecutive prompts from an endless sequence of shuffled epochs.
        """
        count, size = self.order.batch_size, len(self.prompts)
        positions = range(step * count, (step + 1) * count)
        epochs = {n: self.order.epoch(n) for n in {position // size for position in positions}}
        chosen = [int(epochs[position // size][position % size]) for position in positions]
        return [self.prompts[i] for i in chosen for _ in range(self.method.group_size)]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        training = self.settings.training
        return training.learning_rate * rate(training.schedule, step, self.total_steps)

    def check(self, state: RlState, rollouts: Rollouts) -> RlState:
        """Check the stop conditions on an update's completions before training on them.

        Returns the state with the new counts and, if the policy diverged, the reason to stop.
        Raises StageError if no checkpoint can be the result.
        """
        metrics = rollouts.metrics()
        if self.method.requires_ends:
            state = count_truncated(
                state,
                metrics,
                completions=self.method.completions,
                max_new_tokens=self.settings.sampling.max_new_tokens,
            )
        state = replace(state, first_length=state.first_length or metrics["completionLength"])
        stop = diverged(self.settings.stop_on, metrics, state.first_length)
        if stop is None:
            return state
        self.history.write({"step": state.step, "stopped": stop.reason, **metrics})
        message = f"{stop.reason}: {stop.message}; the run stops"
        self._report(state.step, metrics=metrics, message=message)
        stop.require_best(state, keep_best=self.settings.training.keep_best)
        return replace(state, stopped=stop.reason)

    def count_alike(
        self, state: RlState, rollouts: Rollouts, advantage_metrics: Mapping[str, float]
    ) -> RlState:
        """Return the state with the number of updates without rewards that differ. Raises
        StageError RewardsAlike."""
        return count_alike(state, rollouts.metrics() | dict(advantage_metrics))

    def follow(
        self,
        state: RlState,
        rollouts: Rollouts,
        metrics: Mapping[str, float],
        *,
        optimizer_steps: int,
        seconds: float,
        kl_coefficient: float,
        stop: bool,
    ) -> RlState:
        """Return the state after one more update: report it, and measure and save a checkpoint if
        they are due.

        `metrics`: the update's, besides those of its completions. `seconds`: it took so long.
        `kl_coefficient`: of the next update. `stop`: whether any worker received a stop request.
        Raises Interrupted after such a request. Called by all ranks with equal arguments.
        """
        line = {
            **rollouts.metrics(),
            **metrics,
            "klCoefficient": state.kl_coefficient,
            **rollouts.seconds,
            "trainingSeconds": seconds - sum(rollouts.seconds.values()),
        }
        state = replace(
            state,
            step=state.step + 1,
            optimizer_steps=state.optimizer_steps + optimizer_steps,
            tokens=state.tokens + rollouts.num_tokens,
            seconds=state.seconds + seconds,
            kl_coefficient=kl_coefficient,
        )
        self._log(state, line)
        measured = state.step % self._interval == 0 or state.step == self.total_steps
        if measured:
            state = self._measure_unless_stopped(state, stop=stop)
            stop = state.unmeasured
        if stop or measured or self.checkpoints.due(state.step, self.total_steps):
            self.checkpoints.save(state)
        if stop:
            self.checkpoints.wait()
            raise Interrupted(self.stage, state.step)
        return state

    def finish(self, state: RlState) -> None:
        """Wait for the last checkpoint, and restore the weights of the best measurement if the job
        keeps them."""
        self.checkpoints.wait()
        if not self.settings.training.keep_best:
            return
        self.checkpoints.restore_best(state)
        if state.best_step == 0:
            message = "no update was better than the start model, so the result is the start model"
            self._report(state.step, message=message)

    @property
    def _interval(self) -> int:
        """The updates between two measurements."""
        every = self.settings.training.evaluation_steps
        return every or default_interval(self.order.steps_per_epoch, self.total_steps)

    def _start(self) -> RlState:
        """Measure the start model and return the first state."""
        self.history.truncate(0)
        self._report(0, message="measuring the model before training")
        state = self._measure(RlState(kl_coefficient=self.settings.kl_coefficient))
        state = replace(state, base=state.last)
        self.checkpoints.save(state)
        self._report(0, resumed_step=0)
        return state

    def _resume(self) -> RlState:
        """Return the newest checkpoint's state; without a checkpoint, the first state."""
        state = self.checkpoints.resume()
        if state is None:
            return self._start()
        self.history.truncate(state.step)
        if state.step == 0:
            self.history.write({"step": 0, **held_out_metrics(state.base)})
        self.resumed_at = state.step
        message = f"resuming after update {state.step}"
        self._report(state.step, message=message, resumed_step=state.step)
        return state

    # ---- metrics --------------------------------------------------------------------------------

    def _measure(self, state: RlState) -> RlState:
        """Measure on the held-out prompts and return the state with the result."""
        found, samples = self.held_out.measure(state.step)
        metrics = held_out_metrics(found)
        self.history.write({"step": state.step, **metrics})
        self._report(state.step, metrics=metrics)
        return state.measured(found, samples)

    def _measure_late(self, state: RlState) -> RlState:
        """Measure a resumed state that was saved without its measurement. Raises Interrupted."""
        state = self._measure_unless_stopped(state, stop=False)
        if state.unmeasured:
            raise Interrupted(self.stage, state.step)
        self.checkpoints.save(state)
        return state

    def _measure_unless_stopped(self, state: RlState, *, stop: bool) -> RlState:
        """Return the measured state; the state as unmeasured with `stop`, or after a request to
        stop meanwhile."""
        unmeasured = replace(state, unmeasured=True)
        if stop:
            return unmeasured
        try:
            return self._measure(state)
        except Interrupted:
            return unmeasured

    def _log(self, state: RlState, metrics: Mapping[str, float]) -> None:
        line = {
            **metrics,
            "learningRate": self.learning_rate(state.step - 1),
            "epoch": state.step / self.order.steps_per_epoch,
            "tokens": float(state.tokens),
            "tokensPerSecond": state.tokens / state.seconds if state.seconds else 0.0,
        }
        self.history.write({"step": state.step, **line})
        self._report(state.step, metrics=line)

    def _report(
        self,
        step: int,
        metrics: Mapping[str, float] | None = None,
        message: str | None = None,
        resumed_step: int | None = None,
    ) -> None:
        self.worker.report(
            step=step,
            total_steps=self.total_steps,
            metrics=metrics,
            message=message,
            resumed_step=resumed_step,
        )

    # ---- results --------------------------------------------------------------------------------

    def summary(self, state: RlState) -> dict[str, float]:
        """Return the record's metrics: the result on the held-out prompts, and training's cost."""
        kept = state.best if self.settings.training.keep_best else state.last
        parameters = self.parameters.values()
        return {
            **kept,
            "baseReward": state.base.get("reward", math.nan),
            "rewardGain": kept.get("reward", math.nan) - state.base.get("reward", math.nan),
            **_independent_gain(state.base, kept),
            "steps": float(state.step),
            "epochs": state.step / self.order.steps_per_epoch,
            "tokens": float(state.tokens),
            "trainingSeconds": state.seconds,
            "klCoefficient": state.kl_coefficient,
            "trainedParameters": float(sum(p.numel() for p in parameters)),
            "parameters": float(count_parameters(self.collector.actor.model)),
            "peakMemoryBytes": float(peak_memory_bytes(self.worker.device)),
        }

    def details(self, state: RlState) -> dict[str, Any]:
        """Return the record's details."""
        return {
            "completionsPerUpdate": self.method.completions,
            "groupSize": self.method.group_size,
            "prompts": len(self.prompts),
            "heldOutPrompts": 0 if self.held_out.trained_on else len(self.held_out.prompts),
            "bestStep": state.best_step,
            "resumedAtStep": self.resumed_at,
            "stoppedBy": state.stopped,
            "optimizerSteps": state.optimizer_steps,
            "samples": [*state.first_samples, *state.last_samples],
            "precision": str(self.collector.actor.precision).removeprefix("torch."),
            "device": self.worker.device.type,
            "workers": self.worker.world_size,
        }


def _independent_gain(base: Mapping[str, float], kept: Mapping[str, float]) -> dict[str, float]:
    """Return the independent reward before training, and its gain; {}: it is not measured."""
    name = "independentReward"
    if name not in base or name not in kept:
        return {}
    gain = kept[name] - base[name]
    return {prefixed("base", name): base[name], f"{name}Gain": gain}
