"""RLOO by TRL's RLOOTrainer."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from tuneyard.api.stage_settings import GrpoSettings
from tuneyard_trainer.reinforcement.group_methods import Rloo
from tuneyard_trainer.trl_engine import online
from tuneyard_trainer.trl_engine.online import Row, UpdatePrompts
from tuneyard_trainer.worker import StageContext, StageOutcome


class _Trainer(RLOOTrainer):
    """RLOOTrainer on the prompts of each update."""

    def __init__(self, prompts: UpdatePrompts, **arguments: Any) -> None:
        self._prompts = prompts
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[list[Row]]:
        return self._prompts.loader()


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(GrpoSettings)
    return online.run(context, settings, Rloo(settings), _Trainer, RLOOConfig)
