"""dpo: train a policy on preferences directly, by DPO and its variants or by KTO.

The losses are TRL's formulas (`losses`) in Tuneyard's own loop, which resumes at the exact sample.
The reference is the model that the stage starts from.
"""

from __future__ import annotations

import shutil

from tuneyard.api.stage_settings import DpoSettings
from tuneyard_trainer.models import policies, probes
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.kto import UnpairedPreferences
from tuneyard_trainer.preference.paired import Paired, require_shape
from tuneyard_trainer.preference.reference import MISMATCHED, ReferencedPreferences
from tuneyard_trainer.training.batches import Order
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.training.policy import load_policy
from tuneyard_trainer.worker import StageContext, StageOutcome


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(DpoSettings)
    loop = build(context, settings)
    state = loop.train()
    shutil.rmtree(context.workdir / MISMATCHED / str(context.worker.rank), ignore_errors=True)
    if context.worker.is_main:
        policies.save(loop.model, settings.adapter, context.workdir / policies.WEIGHTS)
    kept = state.best_step if settings.training.keep_best else state.step
    metrics = {**loop.summary(state), **loop.history.evaluated(kept)}
    details = {**loop.details(state), "loss": settings.loss, "beta": settings.beta}
    return StageOutcome(metrics=metrics, details=details, contents=(policies.WEIGHTS,))


def build(context: StageContext, settings: DpoSettings) -> Loop:
    """Return the training loop before its first step, with the reference's log-probabilities."""
    data, training = Preferences.open(context.inputs["data"]), settings.training
    require_shape(settings, data)
    model, forward = load_policy(
        context,
        training,
        settings.adapter,
        max_length=data.max_length,
        packs=probes.isolates_documents,
    )
    worker, unpaired = context.worker, settings.loss == "kto"
    worker.report(message="computing the reference log-probabilities")
    references = ReferencedPreferences.of(
        data, model, forward, context.workdir, worker, mismatched=unpaired
    )
    objective_type = UnpairedPreferences if unpaired else Paired
    objective = objective_type(model, data, forward, worker, training.seed, settings, references)
    order = Order.of(data.train.source, data.weights, training.batch_size, training.seed)
    return Loop(context, training, objective, order, model)
