"""sft and pretrain by TRL's SFTTrainer: the mean cross-entropy of a step's targets."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tuneyard.api.stage_settings import TrainSettings
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.models import policies
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.sharding import sharding_of
from tuneyard_trainer.training.batches import Order
from tuneyard_trainer.training.course import Course
from tuneyard_trainer.training.cross_entropy import CrossEntropy
from tuneyard_trainer.training.policy import load_policy
from tuneyard_trainer.trl_engine.arguments import platform_arguments, training
from tuneyard_trainer.trl_engine.batches import Inputs, Layout, StepBatches, collate
from tuneyard_trainer.trl_engine.following import Following
from tuneyard_trainer.trl_engine.schedule import scheduler
from tuneyard_trainer.worker import StageContext, StageOutcome


class _Trainer(SFTTrainer):
    """SFTTrainer on micro-batches that are made elsewhere."""

    def __init__(self, batches: StepBatches, **arguments: Any) -> None:
        self._batches = batches
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[Inputs]:
        return self._batches.loader()


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings, worker = context.settings(TrainSettings), context.worker
    data = Prepared.open(context.inputs["data"])
    model, forward = load_policy(
        context,
        settings,
        settings.adapter,
        max_length=data.max_length,
        packs=lambda _: False,
    )
    order = Order.of(data.train.source, data.weights, settings.batch_size, settings.seed)
    measure = CrossEntropy(model, data, forward, settings, worker)
    course = Course(context, settings, measure, order, model)
    state = course.begin()
    longest = int(data.train.lengths[order.rows].max())
    layout = Layout.of(order, longest, forward.max_tokens, worker.world_size)
    tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
    batches = StepBatches(
        data.train.lengths,
        lambda rows, _: collate(data.train, rows, forward.pad),
        order,
        layout,
        worker,
        first_step=state.step,
        total=course.total,
    )
    following = Following(course, state, batches)
    if state.step < course.total and not course.should_stop_early(state):
        with training(following, worker.device):
            trainer(context, course, batches, layout, following, tokenizer).train()
    state = course.finish(following.state)
    weights = context.workdir / policies.WEIGHTS
    policies.save(model, settings.adapter, weights, is_main=worker.is_main)
    details = {
        **course.details(state),
        "packed": False,
        "engine": "trl",
        "sharding": sharding_of(model),
    }
    return StageOutcome(
        metrics=course.summary(state), details=details, contents=(policies.WEIGHTS,)
    )


def trainer(
    context: StageContext,
    course: Course,
    batches: StepBatches,
    layout: Layout,
    following: Following,
    tokenizer: Any,
) -> SFTTrainer:
    """Return TRL's trainer of the course's remaining steps."""
    first = following.state.step
    arguments = platform_arguments(context, course.settings, layout, steps=course.total - first)
    one_row = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
    trained = {parameter: parameter.data for parameter in course.parameters.values()}
    arguments |= {
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "loss_type": "nll",
        "router_aux_loss_coef": 0.0,  # the loss of a step is that of its targets alone
    }
    made = _Trainer(
        batches,
        model=course.model,
        args=SFTConfig(**arguments, **(course.settings.trl or {})),
        train_dataset=one_row,
        processing_class=tokenizer,
        callbacks=[following],
        optimizers=(course.optimizer, scheduler(course, first)),
    )
    for parameter, tensor in trained.items():  # TRL rounds an adapter over a 4-bit base to bfloat16
        parameter.data = tensor
    made.remove_callback(PrinterCallback)  # the course reports each step
    return made
