"""KTO by TRL's KTOTrainer.

The trainer gets our tokens and the reference's log-probabilities with each micro-batch: it neither
tokenizes the preferences nor holds a second model. The reference point of a step, the KL on
completions of other prompts, is measured over the whole global batch, as in the native engine:
TRL's own estimate is of one micro-batch, and would change with the number of workers.

Shapes: N completions of a micro-batch, L their width in tokens.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from tuneyard.api.stage_settings import DpoSettings
from tuneyard_trainer.models import policies
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.sharding import sharding_of
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.kto import UnpairedPreferences
from tuneyard_trainer.preference.paired import require_shape
from tuneyard_trainer.preference.reference import (
    MISMATCHED,
    ReferencedPreferences,
    ReferencedRows,
)
from tuneyard_trainer.training.batches import Indices, Order
from tuneyard_trainer.training.checkpoints import LoopState
from tuneyard_trainer.training.course import Course
from tuneyard_trainer.training.policy import load_policy
from tuneyard_trainer.trl_engine import arguments as engine
from tuneyard_trainer.trl_engine.batches import EMPTY, Inputs, Layout, StepBatches, padded
from tuneyard_trainer.trl_engine.schedule import scheduler
from tuneyard_trainer.trl_engine.sums import StepSums, SummingFollowing
from tuneyard_trainer.worker import StageContext, StageOutcome

FILLED, FACTOR, CONSTANT = "filled", "factor", "constant"
MIN_ROWS = 2
"""TRL refuses micro-batches of one row, in which its own KL would be the implied reward."""


class _Following(SummingFollowing):
    """Measure the reference point before each step, with the weights that the step begins with."""

    def __init__(
        self, measure: UnpairedPreferences, batches: StepBatches, course: Course, state: LoopState
    ) -> None:
        sums = StepSums(("accuracy", "kl"), course.worker)
        super().__init__(sums, course, state, batches)
        self._measure, self._taken = measure, batches.taken
        self.kl = torch.zeros(())

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        self.kl = self._measure.reference_point(self._taken[0])
        self.course.model.train()
        return super().on_step_begin(args, state, control, **kwargs)


class _Trainer(KTOTrainer):
    """KTOTrainer on micro-batches that are made elsewhere, each with its share of the mean."""

    def __init__(self, batches: StepBatches, following: _Following, **arguments: Any) -> None:
        self._batches, self._following = batches, following
        super().__init__(callbacks=[following], **arguments)

    def get_train_dataloader(self) -> DataLoader[Inputs]:
        return self._batches.loader()

    def compute_loss(self, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any) -> Tensor:
        filled_N, factor, constant = (inputs.pop(name) for name in (FILLED, FACTOR, CONSTANT))
        kl = self._following.kl
        # TRL subtracts the KL from the log-ratios; here the reference contains it already.
        inputs["ref_logps"] = inputs["ref_logps"] + kl.float() * filled_N
        good_N, reference_N = inputs["label"], inputs["ref_logps"]

        def measured(**given: Any) -> Any:
            outputs = model(**given)
            width = given["input_ids"].shape[1] - 1
            logprobs_N = outputs.log_probs.detach()[:, -width:].sum(-1)
            right_N = (logprobs_N > reference_N) == good_N
            sums_K = torch.stack([(right_N & filled_N).sum(), kl * filled_N.sum()])
            self._following.sums.add(sums_K.float())
            return outputs

        loss: Tensor = super().compute_loss(measured, inputs, *args, **kwargs)
        return loss * factor - constant


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings, worker = context.settings(DpoSettings), context.worker
    training, data = settings.training, Preferences.open(context.inputs["data"])
    require_shape(settings, data)
    model, forward = load_policy(
        context,
        training,
        settings.adapter,
        max_length=data.max_length,
        packs=lambda _: False,
    )
    worker.report(message="computing the reference log-probabilities")
    references = ReferencedPreferences.of(
        data, model, forward, context.workdir, worker, mismatched=True
    )
    measure = UnpairedPreferences(model, data, forward, worker, training.seed, settings, references)
    order = Order.of(data.train.source, data.weights, training.batch_size, training.seed)
    course = Course(context, training, measure, order, model)
    state = course.begin()
    longest = int(data.train.longest[order.rows].max())
    layout = Layout.of(order, longest, forward.max_tokens, worker.world_size)
    labels = data.train.labels > 0.5
    collator = Collator(
        references.train, labels, layout, worker.world_size, forward.pad, measure.weights[0]
    )
    batches = StepBatches(
        data.train.longest,
        collator,
        order,
        layout,
        worker,
        first_step=state.step,
        total=course.total,
    )
    following = _Following(measure, batches, course, state)
    if state.step < course.total and not course.should_stop_early(state):
        with engine.training(following, worker.device):
            trainer(context, settings, batches, layout, following, measure.weights).train()
    state = course.finish(following.state)
    shutil.rmtree(context.workdir / MISMATCHED / str(worker.rank), ignore_errors=True)
    weights = context.workdir / policies.WEIGHTS
    policies.save(model, settings.adapter, weights, is_main=worker.is_main)
    kept = state.best_step if training.keep_best else state.step
    summary = {**course.summary(state), **course.history.evaluated(kept)}
    details = {
        **course.details(state),
        "loss": settings.loss,
        "beta": settings.beta,
        "engine": "trl",
        "sharding": sharding_of(model),
    }
    return StageOutcome(metrics=summary, details=details, contents=(policies.WEIGHTS,))


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches of equally many completions on all workers. Good ones without tokens,
    at the reference point 0, fill them: their loss is a constant, which is subtracted."""

    referenced: ReferencedRows
    good: NDArray[np.bool_]
    layout: Layout
    world_size: int
    pad: int
    """The token that fills rows of unequal length."""
    good_weight: float
    """The weight of a good completion's loss."""

    def __call__(self, rows: Indices, count: int) -> Inputs:
        """Return the rows (N, L), padded on the right, their labels and the reference's
        log-probabilities (N,), and what makes the trainer's mean of means the mean over the `count`
        completions of the global batch."""
        size, share = self.layout.rows, self.layout.share_of_mean(count, self.world_size)
        chosen_N = np.full(size, EMPTY, dtype=np.int64)
        chosen_N[: len(rows)] = rows  # every group is a row
        reference_N, good_N = np.zeros(size, dtype=np.float32), np.ones(size, dtype=np.bool_)
        reference_N[: len(rows)] = self.referenced.reference[rows]
        good_N[: len(rows)] = self.good[rows]
        filled_N = torch.arange(size) < len(rows)
        empty = 0.5 * self.good_weight * (size - len(rows)) / size
        return padded(self.referenced.rows, chosen_N, self.pad) | {
            "label": torch.from_numpy(good_N),
            "ref_logps": torch.from_numpy(reference_N),
            FILLED: filled_N,
            FACTOR: torch.tensor(share),
            CONSTANT: torch.tensor(share * empty),
        }


def trainer(
    context: StageContext,
    settings: DpoSettings,
    batches: StepBatches,
    layout: Layout,
    following: _Following,
    weights: tuple[float, float],
) -> KTOTrainer:
    """Return TRL's trainer of the course's remaining steps. `weights`: of the loss of good and of
    bad completions."""
    course = following.course
    first = following.state.step
    steps = course.total - first
    arguments = engine.platform_arguments(context, course.settings, layout, steps=steps)
    good_weight, bad_weight = weights
    arguments |= {
        "per_device_train_batch_size": max(MIN_ROWS, layout.rows),  # the loader decides
        "max_length": None,
        "disable_dropout": False,
        "beta": settings.beta,
        "desirable_weight": good_weight,
        "undesirable_weight": bad_weight,
        "router_aux_loss_coef": 0.0,  # no part of KTO's loss
    }
    one_row = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "label": [True]})
    trained = {parameter: parameter.data for parameter in course.parameters.values()}
    made = _Trainer(
        batches,
        following,
        model=course.model,
        ref_model=engine.another(course.model),
        args=KTOConfig(**arguments, **(course.settings.trl or {})),
        train_dataset=one_row,
        processing_class=load_tokenizer(context.inputs["data"] / "tokenizer"),
        optimizers=(course.optimizer, scheduler(course, first)),
    )
    # The micro-batches bring the reference's numbers.
    made.ref_model, made.precompute_ref_logps, made.calculate_KL = None, True, False
    for parameter, tensor in trained.items():  # TRL rounds an adapter over a 4-bit base to bfloat16
        parameter.data = tensor
    made.remove_callback(PrinterCallback)  # the course reports each step
    return made
