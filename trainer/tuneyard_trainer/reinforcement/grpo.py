"""Stage grpo: GRPO or RLOO, whose parts are in `group_methods`, run by `loop`."""

from __future__ import annotations

from tuneyard.api.stage_settings import GrpoSettings
from tuneyard_trainer.reinforcement import loop
from tuneyard_trainer.reinforcement.group_methods import Grpo, Rloo
from tuneyard_trainer.worker import StageContext, StageOutcome


def run(context: StageContext) -> StageOutcome:
    """Train and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(GrpoSettings)
    method = Grpo(settings) if settings.estimator == "grpo" else Rloo(settings)
    return loop.run(context, settings, method)
