"""The loop around PPO, GRPO and RLOO: answer, score, optimise, watch, and keep the best.

What a method makes of the answers is its own file (`stages/ppo.py`, `stages/grpo.py`); here is what
they share. Everything random is a function of seed and step (the prompts' order, the answers, the
minibatches), so a killed run goes on exactly from a checkpoint, and neither the number of workers
nor the size of a pass changes an update beyond rounding. Shapes as in `rollouts`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tuneyard.api.alignment import Sampling
from tuneyard.api.stage_settings import GrpoSettings, PpoSettings
from tuneyard_trainer.generation import answering
from tuneyard_trainer.generation.answering import TokenizedPrompt
from tuneyard_trainer.generation.sampling import Sampler, TransformersSampler, stop_tokens
from tuneyard_trainer.models import policies
from tuneyard_trainer.models.base import peak_memory_bytes
from tuneyard_trainer.models.layers import count_parameters
from tuneyard_trainer.reinforcement import actor as actors
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reinforcement.actor import Actor
from tuneyard_trainer.reinforcement.arithmetic import adapted_coefficient
from tuneyard_trainer.reinforcement.held_out import (
    HeldOut,
    default_interval,
    held_out_metrics,
    split,
)
from tuneyard_trainer.reinforcement.method import Method
from tuneyard_trainer.reinforcement.rollouts import Collector, ProcessGroup, prompts_of
from tuneyard_trainer.reinforcement.state import RlState
from tuneyard_trainer.reinforcement.stop_conditions import (
    blown_up,
    count_alike,
    count_truncated,
)
from tuneyard_trainer.reinforcement.update import PolicyOptimizer
from tuneyard_trainer.training.batches import Order
from tuneyard_trainer.training.checkpoints import Checkpoints
from tuneyard_trainer.training.history import History
from tuneyard_trainer.training.schedules import rate
from tuneyard_trainer.training.seeds import COMPLETION, derive_seed
from tuneyard_trainer.worker import Interrupted, StageContext, StageOutcome, Worker


def run(
    context: StageContext, settings: PpoSettings | GrpoSettings, method: Method
) -> StageOutcome:
    """Trains and leaves `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    loop = Loop.build(context, settings, method)
    try:
        state = loop.train()
    finally:
        loop.collector.sampler.close()
    if context.worker.is_main:  # without the value head: sampling needs none
        policies.save(loop.actor.model, settings.adapter, context.workdir / "weights")
    return StageOutcome(
        metrics=loop.summary(state), details=loop.details(state), contents=("weights",)
    )


@dataclass
class Loop:
    """Everything an update needs. Built once per attempt; `train` runs it to the end."""

    stage: str
    settings: PpoSettings | GrpoSettings
    method: Method
    worker: Worker
    actor: Actor
    optimiser: PolicyOptimizer
    collector: Collector
    questions: Sequence[TokenizedPrompt]
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
        training = settings.training
        name = f"spec.optimize.{context.stage.name.partition('-')[0]}.prompts"
        asker = answering.Policy.of(context.inputs, settings.chat, context.worker)
        ready = asker.prompts(settings.prompts, settings.sampling.max_new_tokens, name)
        reward = rewards.load(
            settings.reward, context.inputs, settings.chat, prompts_of(ready), context.worker.device
        )
        context.worker.report(message="loading the model")
        actor = actors.load(
            context.inputs,
            settings.adapter,
            training,
            context.stage.runtime,
            context.worker,
            temperature=settings.sampling.temperature,
            with_values=method.with_values,
            with_reference=method.with_reference,
        )
        stop = stop_tokens(actor.model, asker.tokenizer, settings.chat.chat_template)
        sampler = _sampler(actor, stop, settings.sampling, ready, context.worker)
        questions, held_out = split(ready)
        peers = ProcessGroup(context.worker.rank, context.worker.world_size, context.worker.device)
        collector = Collector(
            actor, sampler, reward, asker.tokenizer, stop, settings.sampling, peers
        )
        order = Order(
            np.arange(len(questions), dtype=np.int64),
            max(1, method.answers // method.group_size),
            training.seed,
        )
        optimiser = PolicyOptimizer.of(actor, method, training, peers)
        return cls(
            stage=context.stage.name,
            settings=settings,
            method=method,
            worker=context.worker,
            actor=actor,
            optimiser=optimiser,
            collector=collector,
            questions=questions,
            held_out=HeldOut.of(held_out, questions, collector, method, training.seed),
            order=order,
            total_steps=order.total_steps(training.epochs, training.max_steps),
            checkpoints=Checkpoints(context, RlState, optimiser.parameters, optimiser.optimizer),
            history=History(context.workdir / "metrics.jsonl", enabled=context.worker.is_main),
        )

    # ---- the run ------------------------------------------------------------------------------

    def train(self) -> RlState:
        """Every update from the newest checkpoint (or the start) to the end, or to a blow-up."""
        total, per_epoch = self.total_steps, self.order.steps_per_epoch
        every = self.settings.training.evaluation_steps or default_interval(per_epoch, total)
        state = self._resume()
        while state.step < total:
            state, interrupted = self._update(state)
            if state.stopped:
                break
            measured = state.step % every == 0 or state.step == total
            if measured:
                state = self._measure(state)
            if interrupted or measured or self.checkpoints.due(state.step, total):
                self.checkpoints.save(state)
            if interrupted:
                self.checkpoints.wait()
                raise Interrupted(self.stage, state.step)
        self.checkpoints.wait()
        self._keep_best(state)
        return state

    def _resume(self) -> RlState:
        state = self.checkpoints.resume()
        if state is None:
            self.history.truncate(0)
            state = RlState(kl_coefficient=self.settings.kl_coefficient)
            self._report(0, message="measuring the model before training")
            state = self._measure(state)
            state = replace(state, base=state.last)
            self.checkpoints.save(state)
            self._report(0, resumed_step=0)
            return state
        self.history.truncate(state.step)
        if state.step == 0:
            self.history.write({"step": 0, **held_out_metrics(state.base)})
        self.resumed_at = state.step
        message = f"resuming after update {state.step}"
        self._report(state.step, message=message, resumed_step=state.step)
        return state

    def _update(self, state: RlState) -> tuple[RlState, bool]:
        """Answers of the present policy, and the passes that improve it on them. Returns the state
        after it, and whether any worker was asked to stop."""
        began = time.monotonic()
        rollouts = self.collector.collect(*self._asked(state.step))
        watched = rollouts.watched()
        if self.method.ends_matter:
            state = count_truncated(
                state,
                watched,
                answers=self.method.answers,
                max_new_tokens=self.settings.sampling.max_new_tokens,
            )
        state = replace(state, first_length=state.first_length or watched["answerLength"])
        stopped = blown_up(self.settings.stop_on, watched, state.first_length)
        if stopped:
            message = f"{stopped.reason}: {stopped.message}; the run ends"
            self.history.write({"step": state.step, "stopped": stopped.reason, **watched})
            self._report(state.step, metrics=watched, message=message)
            stopped.require_best(state, keep_best=self.settings.training.keep_best)
            return replace(state, stopped=stopped.reason), False
        experience, more = self.method.experience(rollouts, state.kl_coefficient)
        state = count_alike(state, watched | more)
        optimised, steps = self.optimiser.improve(
            experience, rollouts, state.step, self._learning_rate(state.step)
        )
        interrupted = self._asked_to_stop()
        trained = time.monotonic()
        metrics = {
            **watched,
            **more,
            **optimised,
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
                state.kl_coefficient, watched.get("kl", 0.0), self.method.target_kl
            ),
        )
        self._log(state, metrics)
        return state, interrupted

    def _asked_to_stop(self) -> bool:
        """Whether any worker was, as all of them see it."""
        stop = torch.tensor([float(self.worker.stop())], device=self.worker.device)
        return bool(self.collector.peers.sum(stop) > 0)

    def _asked(self, step: int) -> tuple[list[TokenizedPrompt], list[int]]:
        """The questions of an update, each as often as it is answered, and the answers' keys.
        Updates take prompts one after the other from endless shuffled passes over all of them."""
        count, seed = self.order.batch_size, self.settings.training.seed
        places = range(step * count, (step + 1) * count)
        size = len(self.questions)
        passes = {n: self.order.epoch(n) for n in {place // size for place in places}}
        chosen = [int(passes[place // size][place % size]) for place in places]
        questions = [self.questions[i] for i in chosen for _ in range(self.method.group_size)]
        return questions, [derive_seed(seed, COMPLETION, step, i) for i in range(len(questions))]

    def _learning_rate(self, step: int) -> float:
        training = self.settings.training
        return training.learning_rate * rate(training.schedule, step, self.total_steps)

    # ---- measuring ------------------------------------------------------------------------------

    def _measure(self, state: RlState) -> RlState:
        """Measure on the held-out prompts and return the state with the result."""
        found = self.held_out.measure(state.step)
        metrics = held_out_metrics(found)
        self.history.write({"step": state.step, **metrics})
        self._report(state.step, metrics=metrics)
        return state.measured(found)

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

    # ---- checkpoints and results ----------------------------------------------------------------

    def _keep_best(self, state: RlState) -> None:
        if not self.settings.training.keep_best:
            return
        self.checkpoints.restore_best(state)
        if state.best_step == 0:
            message = "no update was better than the start: the result is the model as it was"
            self._report(state.step, message=message)

    def summary(self, state: RlState) -> dict[str, float]:
        """The record's metrics: what is kept, on the held-out prompts, and what it took."""
        kept = state.best if self.settings.training.keep_best else state.last
        return {
            **kept,
            "baseReward": state.base.get("reward", math.nan),
            "rewardGain": kept.get("reward", math.nan) - state.base.get("reward", math.nan),
            "steps": float(state.step),
            "epochs": state.step / self.order.steps_per_epoch,
            "tokens": float(state.tokens),
            "trainingSeconds": state.seconds,
            "klCoefficient": state.kl_coefficient,
            "trainedParameters": float(sum(p.numel() for p in self.optimiser.parameters.values())),
            "parameters": float(count_parameters(self.actor.model)),
            "peakMemoryBytes": float(peak_memory_bytes(self.worker.device)),
        }

    def details(self, state: RlState) -> dict[str, Any]:
        """The record's details."""
        return {
            "answersPerUpdate": self.method.answers,
            "groupSize": self.method.group_size,
            "prompts": len(self.questions),
            "heldOutPrompts": 0 if self.held_out.trained_on else len(self.held_out.prompts),
            "bestStep": state.best_step,
            "resumedAtStep": self.resumed_at,
            "stoppedBy": state.stopped,
            "optimizerSteps": state.optimizer_steps,
            "samples": self.held_out.first_and_last_samples(),
            "precision": str(self.actor.precision).removeprefix("torch."),
            "device": self.worker.device.type,
            "workers": self.worker.world_size,
        }


# ---- parts --------------------------------------------------------------------------------------


def _sampler(
    actor: Actor,
    stop: tuple[int, ...],
    sampling: Sampling,
    questions: Sequence[TokenizedPrompt],
    worker: Worker,
) -> Sampler:
    """The engine of the manifest over the policy in training."""
    if sampling.engine == "transformers":
        return TransformersSampler(actor.model, actor.pad, stop, sampling, actor.precision)
    from tuneyard_trainer.generation.vllm import VllmSampler  # an extra

    worker.report(message="starting vLLM")
    return VllmSampler.of(
        actor.model,
        stop,
        sampling,
        precision=actor.precision,
        longest=max(len(question.ids) for question in questions) + sampling.max_new_tokens,
        workers=worker.world_size,
    )
