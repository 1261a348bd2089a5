"""The parts that GRPO and RLOO by TRL share: TRL samples completions and takes the optimizer steps.

TRL gets the prompts of each update in our order, and one reward function, which scores completions
as the native loop does and checks the stop conditions before they are trained on. The course of the
run, its held-out measurements included, is that of `reinforcement`.

Shapes: R completions of an update over all workers, B of one worker.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset as Table
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tuneyard.api.stage_settings import GrpoSettings
from tuneyard_trainer.data.sharing import any_stops
from tuneyard_trainer.generation.sampling import Sampled
from tuneyard_trainer.models import layers, policies
from tuneyard_trainer.models.environment import described
from tuneyard_trainer.models.policies import Reference
from tuneyard_trainer.models.sharding import sharding_of
from tuneyard_trainer.reinforcement.course import Course
from tuneyard_trainer.reinforcement.loading import load_collector
from tuneyard_trainer.reinforcement.method import Method
from tuneyard_trainer.reinforcement.rollouts import Rollouts
from tuneyard_trainer.reinforcement.state import RlState
from tuneyard_trainer.training.course import adamw, require_finite
from tuneyard_trainer.training.seeds import COMPLETION, derive_seed
from tuneyard_trainer.trl_engine.arguments import explained, platform_arguments, same_process
from tuneyard_trainer.trl_engine.batches import Layout
from tuneyard_trainer.trl_engine.sampling import (
    ends_at,
    for_trl,
    own_share,
    require_same_tokens,
    require_trainable,
)
from tuneyard_trainer.worker import StageContext, StageOutcome

Row = dict[str, Any]
"""A completion to sample: `prompt`, a conversation or a text, and `place`, its index among R."""

METRICS = {"clip_ratio/region_mean": "clipFraction"}
"""TRL's metrics of an update that the curves show, and their names there."""


def run(
    context: StageContext,
    settings: GrpoSettings,
    method: Method,
    make: Callable[..., Trainer],
    config: Callable[..., Any],
) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`.

    `make`: makes the trainer of `UpdatePrompts` and TRL's arguments. `config`: makes its config.
    """
    worker, training = context.worker, settings.training
    own = own_share(method.completions, worker.world_size)
    collector, tokenized = load_collector(context, settings, method)
    model = collector.actor.model
    require_trainable(
        [model], "Set training.engine to native, or change the adapter or its targets."
    )
    parameters = layers.trainable(model)
    optimizer = adamw(parameters, training)
    course = Course.of(context, settings, method, collector, tokenized, parameters, optimizer)
    tokenizer = _templated(collector.tokenizer, settings.chat.chat_template)
    require_same_tokens(course.prompts, tokenizer)
    longest = max(len(prompt.ids) for prompt in course.prompts) + settings.sampling.max_new_tokens
    layout = layout_of(own, longest, collector.actor.max_tokens)
    iterations = int((training.trl or {}).get("num_iterations", 1))
    state = course.begin()
    following = Following(course, state, iterations)
    prompts = UpdatePrompts(course, tokenizer, layout, iterations, first=state.step)
    if not course.is_over(state):
        steps = (course.total_steps - state.step) * iterations
        arguments = platform_arguments(context, training, layout, steps=steps)
        arguments |= _sampling_arguments(settings)
        first = state.step

        def has_begun() -> bool:
            return following.state.step > first or bool(following.state.stopped)

        with (
            described(worker.device),
            same_process(),
            ends_at(model, collector.stop),
            suppress(_DivergedError),
            explained(training.trl, has_begun),
        ):
            trained = {parameter: parameter.data for parameter in parameters.values()}
            trainer = make(
                prompts,
                model=model,
                reward_funcs=following.rewards,
                args=config(**arguments, **(training.trl or {})),
                train_dataset=Table.from_dict({"prompt": ["a"]}),
                processing_class=tokenizer,
                callbacks=[following],
                optimizers=(optimizer, following.scheduler(optimizer)),
            )
            for parameter, tensor in trained.items():  # TRL rounds those over a 4-bit base
                parameter.data = tensor
            _prepare(trainer, course, settings)
            trainer.train()
    course.finish(following.state)
    weights = context.workdir / policies.WEIGHTS
    policies.save(model, settings.adapter, weights, is_main=worker.is_main)
    details = course.details(following.state)
    return StageOutcome(
        metrics=course.summary(following.state),
        details={**details, "engine": "trl", "sharding": sharding_of(model)},
        contents=(policies.WEIGHTS,),
    )


class _DivergedError(Exception):
    """Ends the trainer on all workers: the policy exceeded a limit. The state has the reason."""


# ---- what TRL gets ------------------------------------------------------------------------------


def _sampling_arguments(settings: GrpoSettings) -> dict[str, Any]:
    """Return the arguments of both configs that the stage's settings decide."""
    return {
        "num_generations": settings.group_size,
        "max_completion_length": settings.sampling.max_new_tokens,
        "temperature": settings.sampling.temperature,
        "top_p": settings.sampling.top_p,
        "epsilon": settings.clip_range,
        "beta": 0.0,  # set after the trainer is made: it would load another reference
        "shuffle_dataset": False,
        "router_aux_loss_coef": 0.0,  # no part of the loss of an update
    }


def _prepare(trainer: Any, course: Course, settings: GrpoSettings) -> None:
    """Give the trainer the weight of the KL, and the reference that the native loop has."""
    trainer.beta = settings.kl_coefficient
    reference = course.collector.actor.reference
    if settings.kl_coefficient and reference:
        trainer.ref_model = _ReferenceModel(course.collector.actor.model, reference)
    trainer.remove_callback(PrinterCallback)  # the course reports each update


@dataclass(frozen=True)
class _ReferenceModel:
    """The policy as it was at the start of the stage, in the place of TRL's second model."""

    policy: Any
    reference: Reference

    def __call__(self, **inputs: Any) -> Any:
        with self.reference.active():
            return self.policy(**inputs)


class UpdatePrompts(Dataset[list[Row]]):
    """One worker's part of each update, from update `first` on, in order.

    TRL asks for an update's rows before each of its micro-batches, and samples with the first ones.
    """

    def __init__(
        self,
        course: Course,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        iterations: int,
        *,
        first: int,
    ) -> None:
        """`iterations`: the optimizer steps of an update."""
        self._course, self._tokenizer, self._first = course, tokenizer, first
        self._repeats = layout.accumulated * iterations
        self._size = layout.rows * layout.accumulated

    def __len__(self) -> int:
        return (self._course.total_steps - self._first) * self._repeats

    def __getitem__(self, index: int) -> list[Row]:
        """Return the rows (B). A group's completions follow each other over the workers, since TRL
        joins the workers' rewards in the order of their ranks."""
        if index >= len(self):
            raise IndexError(index)
        prompts = self._course.prompts_of(self._first + index // self._repeats)
        start = self._course.worker.rank * self._size
        return [
            {"prompt": for_trl(prompts[place], self._tokenizer), "place": place}
            for place in range(start, start + self._size)
        ]

    def loader(self) -> DataLoader[list[Row]]:
        """Return a loader of the rows as they are."""
        return DataLoader(self, batch_size=None, shuffle=False, num_workers=0, collate_fn=_same)


def _same(rows: list[Row]) -> list[Row]:
    return rows


def _templated(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the job's chat template, if the job has one."""
    templated = copy.copy(tokenizer)
    templated.chat_template = template or tokenizer.chat_template
    return templated


# ---- what must hold -----------------------------------------------------------------------------


def layout_of(count: int, longest: int, max_tokens: int) -> Layout:
    """Return the layout of `count` completions in equal micro-batches within `max_tokens`, padding
    included. `longest`: the most tokens of a row, which may be a micro-batch of its own."""
    most = max(1, min(count, max_tokens // longest))
    rows = next(size for size in range(most, 0, -1) if count % size == 0)
    return Layout(rows, count // rows)


# ---- what follows -------------------------------------------------------------------------------


class Following(TrainerCallback):
    """Follows each update with the course of the attempt, and scores its completions."""

    def __init__(self, course: Course, state: RlState, iterations: int) -> None:
        """`iterations`: the optimizer steps of an update."""
        self.course, self.state = course, state
        self._iterations, self._first = iterations, state.step
        self._began = 0.0
        self._rollouts: Rollouts | None = None
        self._advantages: dict[str, float] = {}
        self._logs: list[dict[str, float]] = []
        """The metrics of the update's optimizer steps so far."""

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Return the course's learning rate from the update on at which the attempt begins."""
        peak, last = self.course.settings.training.learning_rate, self.course.total_steps - 1

        def factor(step: int) -> float:
            update = min(self._first + step // self._iterations, last)
            return self.course.learning_rate(update) / peak

        return LambdaLR(optimizer, factor)

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002  the signature of a callback
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        """Make the update's completions a function of seed, update and worker."""
        if not self._logs:
            seed, rank = self.course.settings.training.seed, self.course.worker.rank
            torch.manual_seed(derive_seed(seed, COMPLETION, self.state.step, rank))
            self._began = time.monotonic()
        return control

    def rewards(
        self, completion_ids: Sequence[Sequence[int]], place: Sequence[int], **_: Any
    ) -> list[float]:
        """Return the rewards of this worker's completions (B), after the stop conditions were
        checked. Raises _DivergedError, StageError and Interrupted, on all workers."""
        course, generated = self.course, time.monotonic() - self._began
        sampled = [Sampled(tuple(ids)) for ids in completion_ids]
        prompts = course.prompts_of(self.state.step)
        rollouts = course.collector.score(prompts, place, sampled, generated)
        course.collector.actor.model.train()  # scoring left it in evaluation mode
        self.state = course.check(self.state, rollouts)
        if self.state.stopped:
            raise _DivergedError
        experienced = course.method.experience(rollouts, self.state.kl_coefficient)
        self._advantages = experienced[1]
        self.state = course.count_alike(self.state, rollouts, self._advantages)
        self._rollouts = rollouts
        return [float(score) for score in rollouts.own(rollouts.scores_R)]

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Follow the update whose last step was logged; the log at the end of the run is of no
        step."""
        if not logs or "loss" not in logs or self._rollouts is None:
            return control
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        require_finite(loss, norm, self.state.step + 1)
        shown = {ours: float(logs[name]) for name, ours in METRICS.items() if name in logs}
        self._logs.append({"loss": loss, "gradientNorm": norm, **shown})
        if len(self._logs) < self._iterations:
            return control
        means = {
            name: sum(each[name] for each in self._logs) / len(self._logs) for name in self._logs[0]
        }
        self._logs = []
        self.state = self.course.follow(
            self.state,
            self._rollouts,
            {**self._advantages, **means},
            optimizer_steps=self._iterations,
            seconds=time.monotonic() - self._began,
            kl_coefficient=self.state.kl_coefficient,
            stop=any_stops(self.course.worker),
        )
        return control
