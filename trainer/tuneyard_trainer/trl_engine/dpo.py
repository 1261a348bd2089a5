"""DPO and its variants by TRL's DPOTrainer.

The trainer gets our tokens and the reference's log-probabilities with each micro-batch: it neither
tokenizes the preferences nor holds a second model.

Shapes: P pairs of a micro-batch, L their width in tokens; 2: the chosen and the rejected rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from tuneyard.api.stage_settings import DpoSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models import policies
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.sharding import sharding_of
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.losses import PairLoss, pair_loss
from tuneyard_trainer.preference.paired import Paired, require_shape
from tuneyard_trainer.preference.reference import ReferencedPreferences, ReferencedRows
from tuneyard_trainer.training.batches import Indices, Order
from tuneyard_trainer.training.checkpoints import LoopState
from tuneyard_trainer.training.course import Course
from tuneyard_trainer.training.policy import load_policy
from tuneyard_trainer.trl_engine import arguments as engine
from tuneyard_trainer.trl_engine.batches import Inputs, Layout, StepBatches
from tuneyard_trainer.trl_engine.following import Following
from tuneyard_trainer.trl_engine.schedule import scheduler
from tuneyard_trainer.worker import StageContext, StageOutcome

FACTOR, CONSTANT = "factor", "constant"


class _Trainer(DPOTrainer):
    """DPOTrainer on micro-batches that are made elsewhere, each with its share of the mean."""

    def __init__(self, batches: StepBatches, **arguments: Any) -> None:
        self._batches = batches
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[Inputs]:
        return self._batches.loader()

    def compute_loss(self, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any) -> Tensor:
        factor, constant = inputs.pop(FACTOR), inputs.pop(CONSTANT)
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * factor - constant


class _Following(Following):
    """Follow each step with the implicit rewards of its pairs (Rafailov et al. 2023, section 4)."""

    METRICS: ClassVar[Mapping[str, str]] = {
        "rewards/accuracies": "accuracy",
        "rewards/chosen": "chosenReward",
        "rewards/rejected": "rejectedReward",
    }

    def __init__(
        self, course: Course, state: LoopState, batches: StepBatches, layout: Layout
    ) -> None:
        super().__init__(course, state, batches)
        self._places = layout.rows * layout.accumulated * course.worker.world_size

    def other_metrics(self, logs: dict[str, Any], count: int) -> dict[str, float]:
        """Return the means over the pairs. TRL's are over all places of the micro-batches, and a
        place without completions adds 0."""
        return {ours: logs[name] * self._places / count for name, ours in self.METRICS.items()}


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings, worker = context.settings(DpoSettings), context.worker
    training, data = settings.training, Preferences.open(context.inputs["data"])
    require_shape(settings, data)
    _require_pairs(data)
    model, forward = load_policy(
        context,
        training,
        settings.adapter,
        max_length=data.max_length,
        packs=lambda _: False,
    )
    worker.report(message="computing the reference log-probabilities")
    references = ReferencedPreferences.of(
        data, model, forward, context.workdir, worker, mismatched=False
    )
    measure = Paired(model, data, forward, worker, training.seed, settings, references)
    order = Order.of(data.train.source, data.weights, training.batch_size, training.seed)
    course = Course(context, training, measure, order, model)
    state = course.begin()
    longest = 2 * int(data.train.longest[order.rows].max())
    layout = Layout.of(order, longest, forward.max_tokens, worker.world_size)
    collator = Collator(
        references.train, layout, worker.world_size, forward.pad, _empty_loss(settings)
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
    following = _Following(course, state, batches, layout)
    if state.step < course.total and not course.should_stop_early(state):
        tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
        with engine.training(following, worker.device):
            trainer(context, settings, batches, layout, following, tokenizer).train()
    state = course.finish(following.state)
    weights = context.workdir / policies.WEIGHTS
    policies.save(model, settings.adapter, weights, is_main=worker.is_main)
    kept = state.best_step if training.keep_best else state.step
    metrics = {**course.summary(state), **course.history.evaluated(kept)}
    details = {
        **course.details(state),
        "loss": settings.loss,
        "beta": settings.beta,
        "engine": "trl",
        "sharding": sharding_of(model),
    }
    return StageOutcome(metrics=metrics, details=details, contents=(policies.WEIGHTS,))


def _require_pairs(data: Preferences) -> None:
    """Raise StageError WrongPreferences for rankings and uncertain labels, which TRL does not
    know."""
    if bool((data.train.sizes != 2).any()) or bool((data.train.labels < 1).any()):
        raise StageError(
            "WrongPreferences",
            "TRL's DPOTrainer takes pairs whose order is certain, and the preferences hold "
            "rankings or a judge's probabilities.",
            advice="Set optimize.dpo.training.engine to native.",
        )


def _empty_loss(settings: DpoSettings) -> float:
    kind: PairLoss = settings.loss  # type: ignore[assignment]
    zero_P = torch.zeros(1)
    loss_P = pair_loss(
        kind, zero_P, zero_P, beta=settings.beta, label_smoothing=settings.label_smoothing
    )
    return float(loss_P)


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches of equally many pairs on all workers, since TRL gathers numbers of each
    pair. Pairs without completions fill them: their loss is a constant, which is subtracted."""

    referenced: ReferencedRows
    layout: Layout
    world_size: int
    pad: int
    """The token that fills rows of unequal length."""
    empty_loss: float
    """The loss of a pair without completions."""

    def __call__(self, pairs: Indices, count: int) -> Inputs:
        """Return the chosen rows and then the rejected ones (2P, L), padded on the right, the
        reference's log-probabilities (P,), and what makes the trainer's mean of means the mean
        over the `count` pairs of the global batch."""
        rows, reference = self.referenced
        size, share = self.layout.rows, self.layout.accumulated * self.world_size / count
        best = 2 * pairs  # every group is a pair
        width = int(rows.lengths[np.concatenate([best, best + 1])].max()) if len(pairs) else 2
        ids_2PL = np.full((2, size, width), self.pad, dtype=np.int64)
        completion_2PL, attention_2PL = np.zeros_like(ids_2PL), np.zeros_like(ids_2PL)
        attention_2PL[:, :, 0] = 1  # no row is without attention
        reference_2P = np.zeros((2, size), dtype=np.float32)
        for place, pair in np.ndindex(2, len(pairs)):
            row = int(best[pair]) + place
            length = int(rows.lengths[row])
            ids_2PL[place, pair, :length] = rows.ids(row)
            completion_2PL[place, pair, :length] = rows.mask(row)
            attention_2PL[place, pair, :length] = 1
            reference_2P[place, pair] = reference[row]
        arrays = {
            "input_ids": ids_2PL.reshape(2 * size, width),
            "attention_mask": attention_2PL.reshape(2 * size, width),
            "completion_mask": completion_2PL.reshape(2 * size, width),
            "ref_chosen_logps": reference_2P[0],
            "ref_rejected_logps": reference_2P[1],
            FACTOR: np.float32(size * share),
            CONSTANT: np.float32(self.empty_loss * (size - len(pairs)) * share),
        }
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def trainer(
    context: StageContext,
    settings: DpoSettings,
    batches: StepBatches,
    layout: Layout,
    following: Following,
    tokenizer: Any,
) -> DPOTrainer:
    """Return TRL's trainer of the course's remaining steps."""
    course = following.course
    first = following.state.step
    steps = course.total - first
    arguments = engine.platform_arguments(context, course.settings, layout, steps=steps)
    arguments |= {
        "max_length": None,
        "disable_dropout": False,
        "router_aux_loss_coef": 0.0,  # the loss of a step is that of its pairs alone
        "loss_type": settings.loss,
        "beta": settings.beta,
        "label_smoothing": settings.label_smoothing,
    }
    one_pair = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    trained = {parameter: parameter.data for parameter in course.parameters.values()}
    made = _Trainer(
        batches,
        model=course.model,
        ref_model=engine.another(course.model),
        args=DPOConfig(**arguments, **(course.settings.trl or {})),
        train_dataset=one_pair,
        processing_class=tokenizer,
        callbacks=[following],
        optimizers=(course.optimizer, scheduler(course, first)),
    )
    # The micro-batches bring the reference's numbers.
    made.ref_model, made.precompute_ref_logps = None, True
    for parameter, tensor in trained.items():  # TRL rounds an adapter over a 4-bit base to bfloat16
        parameter.data = tensor
    made.remove_callback(PrinterCallback)  # the course reports each step
    return made
