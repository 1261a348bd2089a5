"""The training loop of PPO, GRPO and RLOO: sample, score, update; the `Course` does the rest.

The methods (`ppo`, `group_methods`) compute advantages and losses. All randomness is a function of
seed and step: the order of prompts, the completions, the minibatches. A killed run therefore
continues from a checkpoint exactly, and neither the number of workers nor the size of micro-batches
changes an update, except by rounding. Shapes as in `rollouts`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tuneyard.api.stage_settings import GrpoSettings, PpoSettings
from tuneyard_trainer.models import policies
from tuneyard_trainer.reinforcement.arithmetic import adapted_coefficient
from tuneyard_trainer.reinforcement.course import Course
from tuneyard_trainer.reinforcement.loading import load_collector
from tuneyard_trainer.reinforcement.method import Method
from tuneyard_trainer.reinforcement.state import RlState
from tuneyard_trainer.reinforcement.update import PolicyOptimizer
from tuneyard_trainer.training.seeds import COMPLETION, derive_seed
from tuneyard_trainer.worker import StageContext, StageOutcome


def run(
    context: StageContext, settings: PpoSettings | GrpoSettings, method: Method
) -> StageOutcome:
    """Train and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    loop = Loop.build(context, settings, method)
    course = loop.course
    try:
        state = loop.train()
    finally:
        course.collector.sampler.close()
    if context.worker.is_main:  # without the value head: sampling needs none
        policies.save(course.collector.actor.model, settings.adapter, context.workdir / "weights")
    return StageOutcome(
        metrics=course.summary(state), details=course.details(state), contents=("weights",)
    )


@dataclass
class Loop:
    """The parts of a run, built once for each attempt; `train` runs all updates."""

    course: Course
    optimizer: PolicyOptimizer

    @classmethod
    def build(
        cls, context: StageContext, settings: PpoSettings | GrpoSettings, method: Method
    ) -> Loop:
        """Return the loop before its first update."""
        collector, prompts = load_collector(context, settings, method)
        optimizer = PolicyOptimizer.of(collector.actor, method, settings.training, collector.group)
        course = Course.of(
            context,
            settings,
            method,
            collector,
            prompts,
            optimizer.parameters,
            optimizer.optimizer,
        )
        return cls(course, optimizer)

    def train(self) -> RlState:
        """Run every update from the newest checkpoint (or the start) to the end, or until the
        policy diverges. Returns the last state."""
        state = self.course.begin()
        while not self.course.is_over(state):
            state = self._update(state)
        self.course.finish(state)
        return state

    def _update(self, state: RlState) -> RlState:
        """Sample completions and train on them, unless the policy diverged. Returns the state after
        the update. Raises Interrupted."""
        course, method, began = self.course, self.course.method, time.monotonic()
        prompts = course.prompts_of(state.step)
        rollouts = course.collector.collect(prompts, self._keys(state.step, len(prompts)))
        state = course.check(state, rollouts)
        if state.stopped:
            return state
        experience, advantage_metrics = method.experience(rollouts, state.kl_coefficient)
        state = course.count_alike(state, rollouts, advantage_metrics)
        loss_metrics, steps = self.optimizer.improve(
            experience, rollouts, state.step, course.learning_rate(state.step)
        )
        stop = self._interrupted()
        return course.follow(
            state,
            rollouts,
            advantage_metrics | loss_metrics,
            optimizer_steps=steps,
            seconds=time.monotonic() - began,
            kl_coefficient=adapted_coefficient(
                state.kl_coefficient, rollouts.metrics().get("kl", 0.0), method.target_kl
            ),
            stop=stop,
        )

    def _keys(self, step: int, count: int) -> list[int]:
        """Return the sampling keys of an update's completions."""
        seed = self.course.settings.training.seed
        return [derive_seed(seed, COMPLETION, step, i) for i in range(count)]

    def _interrupted(self) -> bool:
        """Return whether any worker was asked to stop; the same on all workers."""
        worker = self.course.worker
        stop = torch.tensor([float(worker.stop())], device=worker.device)
        return bool(self.course.collector.group.sum(stop) > 0)
