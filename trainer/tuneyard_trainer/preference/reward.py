"""reward: a reward model, by the Bradley-Terry and Plackett-Luce likelihood of preferences.

The written model is loaded again, compared with the trained one, and evaluated on the held-out
preferences.
"""

from __future__ import annotations

from tuneyard.api.stage_settings import RewardSettings
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.policies import WEIGHTS
from tuneyard_trainer.preference import reward_model
from tuneyard_trainer.preference.dataset import Preferences
from tuneyard_trainer.preference.ranked import Ranked
from tuneyard_trainer.training.batches import Order
from tuneyard_trainer.training.loop import Loop
from tuneyard_trainer.worker import StageContext, StageOutcome


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (a whole sequence classifier), `tokenizer/` and `metrics.jsonl`.

    Raises StageError RewardMismatch if the written model differs from the trained one.
    """
    settings = context.settings(RewardSettings)
    training, data = settings.training, Preferences.open(context.inputs["data"])
    tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
    folder = reward_model.start(context)
    model, forward = reward_model.load(context, settings, folder, data, tokenizer)
    objective = Ranked(model, data, forward, context.worker, training.seed, settings)
    order = Order.of(data.train.source, data.weights, training.batch_size, training.seed)
    loop = Loop(context, training, objective, order, model)
    state = loop.train()
    metrics, details = loop.summary(state), loop.details(state)
    if context.worker.is_main:
        metrics |= reward_model.write(context, settings, folder, data, model, forward)
        tokenizer.save_pretrained(context.workdir / "tokenizer")
    reward_model.remove_start(context)
    return StageOutcome(metrics, details, contents=(WEIGHTS, "tokenizer"))
