"""On-policy distillation by TRL's DistillationTrainer.

The trainer renders and tokenizes the prompts by itself, samples one completion of each, and lowers
the divergence of the student from the teacher at the completions' tokens. Its tokens of the prompts
are compared with ours before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from tuneyard.api.stage_settings import DistillSettings
from tuneyard_trainer.generation.completions import Policy
from tuneyard_trainer.generation.sampling import TransformersSampler, stop_tokens
from tuneyard_trainer.models import policies
from tuneyard_trainer.models.base import load_base, precision_of
from tuneyard_trainer.models.vocabulary import require_same_vocabulary
from tuneyard_trainer.reinforcement.held_out import MAX_HELD_OUT, split
from tuneyard_trainer.training.batches import Indices, Order
from tuneyard_trainer.training.course import Course
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.trl_engine import arguments as engine
from tuneyard_trainer.trl_engine.batches import Inputs, Layout, StepBatches
from tuneyard_trainer.trl_engine.following import Following
from tuneyard_trainer.trl_engine.sampling import (
    ends_at,
    for_trl,
    own_share,
    require_same_tokens,
    require_trainable,
)
from tuneyard_trainer.trl_engine.schedule import scheduler
from tuneyard_trainer.trl_engine.teacher import (
    HeldOutDivergence,
    held_out_rows,
    require_context,
)
from tuneyard_trainer.worker import StageContext, StageOutcome


class _Trainer(DistillationTrainer):
    """DistillationTrainer on prompts that are chosen elsewhere."""

    def __init__(self, batches: StepBatches, **arguments: Any) -> None:
        self._batches = batches
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[Inputs]:
        return self._batches.loader()


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings, worker = context.settings(DistillSettings), context.worker
    training, sampling, inputs = settings.training, settings.sampling, context.inputs
    require_same_vocabulary(inputs["model"], inputs["teacher"])
    policy = Policy.of(inputs, settings.chat, worker)
    tokenizer = policy.tokenizer
    tokenizer.chat_template = settings.chat.chat_template or tokenizer.chat_template
    prompts, held_out = split(
        policy.prompts(settings.prompts, sampling.max_new_tokens, "spec.optimize.distill.prompts")
    )
    require_same_tokens(prompts, tokenizer)
    longest = max(len(prompt.ids) for prompt in [*prompts, *held_out]) + sampling.max_new_tokens
    require_context(inputs["teacher"], longest)
    precision, runtime = precision_of(training, worker), context.stage.runtime
    worker.report(message="loading the model")
    model = policies.load(
        inputs,
        settings.adapter,
        training,
        device=worker.device,
        precision=precision,
        tokenizer=tokenizer,
        gradient_checkpointing=runtime.gradient_checkpointing,
    )
    forward = Forward.of(
        model,
        device=worker.device,
        precision=precision,
        pad=int(tokenizer.pad_token_id),
        pack=False,
        max_length=longest,
        max_tokens=runtime.micro_batch_tokens,
    )
    layout = equal_layout(training.batch_size, longest, forward.max_tokens, worker.world_size)
    worker.report(message="loading the teacher")
    teacher = load_base(inputs["teacher"], dtype=precision, device=worker.device)
    teacher.requires_grad_(False)
    require_trainable(
        [model, teacher],
        "Change the adapter's targets, or choose models without learned absolute positions.",
    )
    stop = stop_tokens(model, tokenizer)
    sampler = TransformersSampler(teacher, forward.pad, stop, sampling, precision)
    measured = held_out or prompts[:MAX_HELD_OUT]
    rows = held_out_rows(context, measured, sampler, training.seed)
    measure = HeldOutDivergence(model, teacher, rows, forward, worker, settings)
    order = EqualBatches(np.arange(len(prompts)), training.batch_size, training.seed)
    course = Course(context, training, measure, order, model)
    state = course.begin()
    batches = StepBatches(
        np.array([len(prompt.ids) for prompt in prompts]),
        lambda rows, _: [{"prompt": for_trl(prompts[row], tokenizer)} for row in rows],
        order,
        # The trainer samples with the first micro-batch of a step, which brings all its prompts.
        replace(layout, rows=layout.rows * layout.accumulated),
        worker,
        first_step=state.step,
        total=course.total,
    )
    following = _Following(course, state, batches)
    if state.step < course.total and not course.should_stop_early(state):
        with engine.training(following, worker.device), ends_at(model, stop):
            trainer(context, settings, teacher, batches, layout, following, tokenizer).train()
    state = course.finish(following.state)
    if worker.is_main:
        policies.save(model, settings.adapter, context.workdir / policies.WEIGHTS)
    details = {
        **course.details(state),
        "engine": "trl",
        "beta": settings.beta,
        "prompts": len(prompts),
        "heldOutPrompts": len(held_out),
    }
    return StageOutcome(
        metrics=course.summary(state), details=details, contents=(policies.WEIGHTS,)
    )


@dataclass(frozen=True)
class EqualBatches(Order):
    """Batches of equally many prompts: the last one of an epoch goes on with the next epoch."""

    def batches(self, first_step: int, total_steps: int) -> Iterator[Indices]:
        count, size = len(self.rows), self.batch_size
        for step in range(first_step, total_steps):
            first, last = (position // count for position in (step * size, step * size + size - 1))
            epochs = np.concatenate([self.epoch(number) for number in range(first, last + 1)])
            start = step * size - first * count
            yield epochs[start : start + size]


def equal_layout(batch_size: int, longest: int, max_tokens: int, world_size: int) -> Layout:
    """Return the layout of equally large micro-batches within `max_tokens`, padding included, on
    all workers. `longest`: tokens of the longest prompt with a completion. Raises StageError
    UnevenBatch."""
    each = own_share(batch_size, world_size)
    most = max(1, max_tokens // longest)
    rows = max(rows for rows in range(1, min(each, most) + 1) if each % rows == 0)
    return Layout(rows, each // rows)


class _Following(Following):
    """Reports the trainer's numbers of a step's completions too."""

    def other_metrics(self, logs: dict[str, Any], count: int) -> dict[str, float]:
        length = float(logs["completions/mean_length"])
        measure: Any = self.course.measure
        measure.sampled_tokens = round(length * count)
        return {
            "completionLength": length,
            "endedShare": 1.0 - float(logs["completions/clipped_ratio"]),
            "entropy": float(logs["entropy"]),
        }


def trainer(
    context: StageContext,
    settings: DistillSettings,
    teacher: nn.Module,
    batches: StepBatches,
    layout: Layout,
    following: Following,
    tokenizer: PreTrainedTokenizerBase,
) -> DistillationTrainer:
    """Return TRL's trainer of the course's remaining steps."""
    course, sampling = following.course, settings.sampling
    first = following.state.step
    arguments = engine.platform_arguments(
        context, course.settings, layout, steps=course.total - first
    )
    arguments |= {
        "beta": settings.beta,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_completion_length": sampling.max_new_tokens,
        "disable_dropout": False,
    }
    trained = {parameter: parameter.data for parameter in course.parameters.values()}
    made = _Trainer(
        batches,
        model=course.model,
        teacher_model=teacher,
        args=DistillationConfig(**arguments, **(course.settings.trl or {})),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        processing_class=tokenizer,
        callbacks=[following],
        optimizers=(course.optimizer, scheduler(course, first)),
    )
    for parameter, tensor in trained.items():  # TRL rounds an adapter over a 4-bit base to bfloat16
        parameter.data = tensor
    made.remove_callback(PrinterCallback)  # the course reports each step
    return made
