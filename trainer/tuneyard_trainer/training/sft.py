"""sft and pretrain: training by cross-entropy. They differ only in the targets from `prepare`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from tuneyard.api.stage_settings import TrainSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.models import adapters, policies, probes
from tuneyard_trainer.training.batches import Indices, MicroBatch, Order, share
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.training.losses import Forward, accumulate_gradients
from tuneyard_trainer.training.policy import load_policy
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(TrainSettings)
    loop = build(context, settings)
    state = loop.train()
    if context.worker.is_main:
        policies.save(loop.model, settings.adapter, context.workdir / policies.WEIGHTS)
    packed = isinstance(loop.objective, CrossEntropy) and loop.objective.forward.pack
    details = {**loop.details(state), "packed": packed}
    return StageOutcome(metrics=loop.summary(state), details=details, contents=(policies.WEIGHTS,))


def build(context: StageContext, settings: TrainSettings) -> Loop:
    """Return the training loop before its first step."""
    data = Prepared.open(context.inputs["data"])
    packs = partial(_packs, settings)
    model, forward = load_policy(
        context, settings, settings.adapter, max_length=data.max_length, packs=packs
    )
    order = Order.of(data.train.source, data.weights, settings.batch_size, settings.seed)
    objective = CrossEntropy(model, data, forward, settings, context.worker)
    return Loop(context, settings, objective, order, model)


@dataclass(frozen=True)
class CrossEntropy:
    """The mean negative log-likelihood of a batch's targets, in nats."""

    model: nn.Module
    data: Prepared
    forward: Forward
    settings: TrainSettings
    worker: Worker
    metrics: tuple[str, ...] = ("loss",)
    is_sharded: bool = False
    """Whether each worker has a part of the model alone."""

    @property
    def holds_out(self) -> bool:
        return self.data.validation is not None

    def backward(self, rows: Indices, step: int) -> Tensor:
        train, worker = self.data.train, self.worker

        def losses(micro_batch: MicroBatch) -> Tensor:
            return self.forward.loss(self.model, train, micro_batch)[None]

        return accumulate_gradients(
            losses,
            self.forward.micro_batches(
                train, share(rows, train.lengths, worker.rank, worker.world_size)
            ),
            count=int(train.targets[rows].sum()),
            num_metrics=len(self.metrics),
            seed=(self.settings.seed, step),
            worker=worker,
        )

    def held_out(self) -> dict[str, float]:
        rows = self.data.validation
        if rows is None:
            raise ValueError("no held-out rows")
        mean = self.forward.mean_loss_of_shards if self.is_sharded else self.forward.mean_loss
        return {"validationLoss": mean(self.model, rows, self.worker)}

    def baseline(self) -> dict[str, float]:
        """Return the held-out metrics of the base: the adapter is disabled."""
        base = adapters.disabled(self.model) if self.settings.adapter else contextlib.nullcontext()
        with base:
            return self.held_out()

    def num_tokens(self, rows: Indices) -> int:
        return int(self.data.train.lengths[rows].sum())


def _packs(settings: TrainSettings, model: nn.Module) -> bool:
    """Return whether rows share bins. Raises StageError CannotPack."""
    if settings.packing == "never":
        return False
    isolated = probes.isolates_documents(model)
    if settings.packing == "always" and not isolated:
        raise StageError(
            "CannotPack",
            "data.packing is always, and in this model (with this adapter) packed rows attend to "
            "each other.",
            advice="Set data.packing to auto or never.",
        )
    return isolated
