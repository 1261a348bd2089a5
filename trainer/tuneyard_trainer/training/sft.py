"""sft and pretrain: cross-entropy. They differ only in what `prepare` marked as targets."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuneyard.api.stage_settings import TrainSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.models import adapters, base, policies, probes
from tuneyard_trainer.models.base import precision_of
from tuneyard_trainer.training.batches import Indices, Order, share
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.training.seeds import derive_seed
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker


def run(context: StageContext) -> StageOutcome:
    """Trains and leaves `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(TrainSettings)
    loop = build(context, settings)
    state = loop.train()
    if context.worker.is_main:
        policies.save(loop.model, settings.adapter, context.workdir / policies.WEIGHTS)
    packed = isinstance(loop.objective, CrossEntropy) and loop.objective.forward.pack
    details = {**loop.details(state), "packed": packed}
    return StageOutcome(metrics=loop.summary(state), details=details, contents=(policies.WEIGHTS,))


def build(context: StageContext, settings: TrainSettings) -> Loop:
    """The loop at its start."""
    data = Prepared.open(context.inputs["data"])
    precision = precision_of(settings, context.worker)
    tokenizer = base.load_tokenizer(context.inputs["data"] / "tokenizer")
    context.worker.report(message="loading the model")
    model = policies.load(
        context.inputs,
        settings.adapter,
        settings,
        device=context.worker.device,
        precision=precision,
        tokenizer=tokenizer,
        gradient_checkpointing=context.stage.runtime.gradient_checkpointing,
    )
    forward = Forward.of(
        model,
        device=context.worker.device,
        precision=precision,
        pad=tokenizer.pad_token_id,
        pack=_packs(settings, model),
        max_length=data.max_length,
        max_tokens=context.stage.runtime.micro_batch_tokens,
    )
    order = Order.of(data.train.source, data.weights, settings.batch_size, settings.seed)
    objective = CrossEntropy(model, data, forward, settings, context.worker)
    return Loop.of(context, settings, objective, order, model)


@dataclass(frozen=True)
class CrossEntropy:
    """The mean negative log-likelihood of a batch's targets, in nats."""

    model: nn.Module
    data: Prepared
    forward: Forward
    settings: TrainSettings
    worker: Worker
    figures: tuple[str, ...] = ("loss",)

    @property
    def holds_out(self) -> bool:
        return self.data.validation is not None

    def backward(self, rows: Indices, step: int) -> Tensor:
        """(1,) this worker's share of the loss."""
        train, rank = self.data.train, self.worker.rank
        targets = int(train.targets[rows].sum())
        mine = share(rows, train.lengths, rank, self.worker.world_size)
        mean = torch.zeros((), device=self.worker.device)
        for index, layout in enumerate(self.forward.passes(train, mine)):
            # Dropout is a function of (seed, step, worker, pass): nothing to save, nothing to lose.
            torch.manual_seed(derive_seed(self.settings.seed, step, rank, index))
            loss = self.forward.loss(self.model, train, layout) / targets
            loss.backward()
            mean += loss.detach()
        return mean[None]

    def held_out(self) -> dict[str, float]:
        rows = self.data.validation
        if rows is None:
            raise ValueError("no held-out rows")
        rank, world_size = self.worker.rank, self.worker.world_size
        return {"validationLoss": self.forward.mean_loss(self.model, rows, rank, world_size)}

    def baseline(self) -> dict[str, float]:
        """Of the base, the adapter switched off."""
        off = adapters.disabled(self.model) if self.settings.adapter else contextlib.nullcontext()
        with off:
            return self.held_out()

    def num_tokens(self, rows: Indices) -> int:
        return int(self.data.train.lengths[rows].sum())


def _packs(settings: TrainSettings, model: nn.Module) -> bool:
    if settings.packing == "never":
        return False
    isolated = probes.isolates_documents(model)
    if settings.packing == "always" and not isolated:
        raise StageError(
            "CannotPack",
            "this model (with this adapter) lets packed rows see each other.",
            advice="Set data.packing to auto or never.",
        )
    return isolated
