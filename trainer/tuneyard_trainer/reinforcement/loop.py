"""The training loop of PPO, GRPO and RLOO: sample, score, update, measure, keep the best.

The methods (`ppo`, `grpo`) compute advantages and losses. All randomness is a function of seed and
step: the order of prompts, the completions, the minibatches. A killed run therefore continues from
a checkpoint exactly, and neither the number of workers nor the size of micro-batches changes an
update, except by rounding. Shapes as in `rollouts`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tuneyard.api.stage_settings import GrpoSettings, PpoSettings
from tuneyard_trainer.data.prompts import TokenizedPrompt
from tuneyard_trainer.models import policies
from tuneyard_trainer.models.base import peak_memory_bytes
from tuneyard_trainer.models.layers import count_parameters
from tuneyard_trainer.reinforcement.arithmetic import adapted_coefficient
from tuneyard_trainer.reinforcement.held_out import (
    HeldOut,
    default_interval,
    held_out_metrics,
    split,
)
from tuneyard_trainer.reinforcement.loading import load_collector
from tuneyard_trainer.reinforcement.method import Method
from tuneyard_trainer.reinforcement.rollouts import Collector
from tuneyard_trainer.reinforcement.state import RlState
from tuneyard_trainer.reinforcement.stop_conditions import (
    Stop,
    count_alike,
    count_truncated,
    diverged,
)
from tuneyard_trainer.reinforcement.update import PolicyOptimizer
from tuneyard_trainer.training.batches import Order
from tuneyard_trainer.training.checkpoints import METRICS, Checkpoints
from tuneyard_trainer.training.history import History
from tuneyard_trainer.training.schedules import rate
from tuneyard_trainer.training.seeds import COMPLETION, derive_seed
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker


def run(
    context: StageContext, settings: PpoSettings | GrpoSettings, method: Method
) -> StageOutcome:
    """Train and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    loop = Loop.build(context, settings, method)
    try:
        state = loop.train()
    finally:
        loop.collector.sampler.close()
    if context.worker.is_main:  # without the value head: sampling needs none
        policies.save(loop.collector.actor.model, settings.adapter, context.workdir / "weights")
    return StageOutcome(
        metrics=loop.summary(state), details=loop.details(state), contents=("weights",)
    )


@dataclass
class Loop:
    """The parts of a run, built once for each attempt; `train` runs all updates."""

    stage: str
    settings: PpoSettings | GrpoSettings
    method: Method
    worker: Worker
    optimizer: PolicyOptimizer
    collector: Collector
    prompts: Sequence[TokenizedPrompt]
    held_out: HeldOut
    order: Order
    total_steps: int
    checkpoints: Checkpoints[RlState]
    history: History
    resumed_at: int | None = None

    @classmethod
    def build(
        cls, context: StageContext, settings: PpoSettings | GrpoSettings, method: Method
    ) -> Loop:
        worker, training = context.worker, settings.training
        collector, tokenized = load_collector(context, settings, method)
        prompts, held_out = split(tokenized)
        order = Order(
            np.arange(len(prompts), dtype=np.int64),
            max(1, method.completions // method.group_size),
            training.seed,
        )
        optimizer = PolicyOptimizer.of(collector.actor, method, training, collector.group)
        return cls(
            stage=context.stage.name,
            settings=settings,
            method=method,
            worker=worker,
            optimizer=optimizer,
            collector=collector,
            prompts=prompts,
            held_out=HeldOut.of(
                held_out, prompts, collector, method, training.seed, worker.check_stop
            ),
            order=order,
            total_steps=order.total_steps(training.epochs, training.max_steps),
            checkpoints=Checkpoints(context, RlState, optimizer.parameters, optimizer.optimizer),
            history=History(context.workdir / METRICS, enabled=worker.is_main),
        )

    # ---- the run ------------------------------------------------------------------------------

    def train(self) -> RlState:
        """Run every update from the newest checkpoint (or the start) to the end, or until the
        policy diverges. Returns the last state."""
        total, per_epoch = self.total_steps, self.order.steps_per_epoch
        every = self.settings.training.evaluation_steps or default_interval(per_epoch, total)
        state = self._resume()
        if state.unmeasured:
            state = self._measure_late(state)
        while state.step < total:
            state, interrupted = self._update(state)
            if state.stopped:
                break
            measured = state.step % every == 0 or state.step == total
            if measured:
                state = self._measure_unless_stopped(state, stop=interrupted)
                interrupted = state.unmeasured
            if interrupted or measured or self.checkpoints.due(state.step, total):
                self.checkpoints.save(state)
            if interrupted:
                self.checkpoints.wait()
                raise Interrupted(self.stage, state.step)
        self.checkpoints.wait()
        self._keep_best(state)
        return state

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

    def _update(self, state: RlState) -> tuple[RlState, bool]:
        """Sample completions and train on them. Returns the state after the update, and whether any
        worker was asked to stop."""
        began = time.monotonic()
        rollouts = self.collector.collect(*self._prompts_of(state.step))
        metrics = rollouts.metrics()
        state, stop = self._check(state, metrics)
        if stop:
            return replace(state, stopped=stop.reason), False
        experience, advantage_metrics = self.method.experience(rollouts, state.kl_coefficient)
        state = count_alike(state, metrics | advantage_metrics)
        loss_metrics, steps = self.optimizer.improve(
            experience, rollouts, state.step, self._learning_rate(state.step)
        )
        interrupted = self._interrupted()
        trained = time.monotonic()
        line = {
            **metrics,
            **advantage_metrics,
            **loss_metrics,
            "klCoefficient": state.kl_coefficient,
            **rollouts.seconds,
            "trainingSeconds": trained - began - sum(rollouts.seconds.values()),
        }
        state = replace(
            state,
            step=state.step + 1,
            optimizer_steps=state.optimizer_steps + steps,
            tokens=state.tokens + rollouts.num_tokens,
            seconds=state.seconds + trained - began,
            kl_coefficient=adapted_coefficient(
                state.kl_coefficient, metrics.get("kl", 0.0), self.method.target_kl
            ),
        )
        self._log(state, line)
        return state, interrupted

    def _check(self, state: RlState, metrics: Mapping[str, float]) -> tuple[RlState, Stop | None]:
        """Check the stop conditions on an update's completions before training on them.

        Returns the state with the new counts and, if the policy diverged, the reason to stop.
        Raises StageError if no checkpoint can be the result.
        """
        if self.method.requires_ends:
            state = count_truncated(
                state,
                metrics,
                completions=self.method.completions,
                max_new_tokens=self.settings.sampling.max_new_tokens,
            )
        state = replace(state, first_length=state.first_length or metrics["completionLength"])
        stop = diverged(self.settings.stop_on, metrics, state.first_length)
        if stop:
            self.history.write({"step": state.step, "stopped": stop.reason, **metrics})
            message = f"{stop.reason}: {stop.message}; the run stops"
            self._report(state.step, metrics=metrics, message=message)
            stop.require_best(state, keep_best=self.settings.training.keep_best)
        return state, stop

    def _interrupted(self) -> bool:
        """Return whether any worker was asked to stop; the same on all workers."""
        stop = torch.tensor([float(self.worker.stop())], device=self.worker.device)
        return bool(self.collector.group.sum(stop) > 0)

    def _prompts_of(self, step: int) -> tuple[list[TokenizedPrompt], list[int]]:
        """Return the prompts of an update, each `group_size` times, and the sampling keys.

        Updates take consecutive prompts from an endless sequence of shuffled epochs.
        """
        count, seed = self.order.batch_size, self.settings.training.seed
        positions = range(step * count, (step + 1) * count)
        size = len(self.prompts)
        epochs = {n: self.order.epoch(n) for n in {position // size for position in positions}}
        chosen = [int(epochs[position // size][position % size]) for position in positions]
        prompts = [self.prompts[i] for i in chosen for _ in range(self.method.group_size)]
        return prompts, [derive_seed(seed, COMPLETION, step, i) for i in range(len(prompts))]

    def _learning_rate(self, step: int) -> float:
        training = self.settings.training
        return training.learning_rate * rate(training.schedule, step, self.total_steps)

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
            "learningRate": self._learning_rate(state.step - 1),
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

    def _keep_best(self, state: RlState) -> None:
        """Restore the weights of the best measurement, if the job keeps them."""
        if not self.settings.training.keep_best:
            return
        self.checkpoints.restore_best(state)
        if state.best_step == 0:
            message = "no update was better than the start model, so the result is the start model"
            self._report(state.step, message=message)

    def summary(self, state: RlState) -> dict[str, float]:
        """Return the record's metrics: the result on the held-out prompts, and training's cost."""
        kept = state.best if self.settings.training.keep_best else state.last
        parameters = self.optimizer.parameters.values()
        return {
            **kept,
            "baseReward": state.base.get("reward", math.nan),
            "rewardGain": kept.get("reward", math.nan) - state.base.get("reward", math.nan),
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
