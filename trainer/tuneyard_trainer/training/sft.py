"""sft and pretrain: training by cross-entropy. They differ only in the targets from `prepare`."""

from __future__ import annotations

from functools import partial

from torch import nn

from tuneyard.api.stage_settings import TrainSettings
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Prepared
from tuneyard_trainer.models import policies, probes
from tuneyard_trainer.training.batches import Order
from tuneyard_trainer.training.checkpoints import FOLDER
from tuneyard_trainer.training.cross_entropy import CrossEntropy
from tuneyard_trainer.training.loop import Loop, Objective
from tuneyard_trainer.training.policy import load_policy
from tuneyard_trainer.training.preserving import Preserving
from tuneyard_trainer.worker import StageContext, StageOutcome


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(TrainSettings)
    loop = build(context, settings)
    state = loop.train()
    if context.worker.is_main:
        policies.save(loop.model, settings.adapter, context.workdir / policies.WEIGHTS)
    details, metrics = loop.details(state), loop.summary(state)
    objective = loop.objective
    if isinstance(objective, Preserving):
        objective = objective.inner
    if context.worker.is_main and isinstance(objective, CrossEntropy):
        packing = objective.packing(loop.order, state.step)
        metrics |= {
            "packedSequences": packing.sequences,
            "packedRows": packing.rows,
            "paddingShare": packing.padding,
        }
        details |= {"packed": objective.forward.pack, "packing": packing._asdict()}
    return StageOutcome(metrics=metrics, details=details, contents=(policies.WEIGHTS,))


def build(context: StageContext, settings: TrainSettings) -> Loop:
    """Return the training loop before its first step."""
    data = Prepared.open(context.inputs["data"])
    packs = partial(_packs, settings)
    model, forward = load_policy(
        context, settings, settings.adapter, max_length=data.max_length, packs=packs
    )
    order = Order.of(data.train.source, data.weights, settings.batch_size, settings.seed)
    plain = CrossEntropy(model, data, forward, settings, context.worker)
    objective: Objective = plain
    if settings.preserve:
        objective = Preserving(plain, context.workdir / FOLDER)
    return Loop(context, settings, objective, order, model)


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
