"""GRPO by TRL's GRPOTrainer."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from tuneyard.api.stage_settings import GrpoSettings
from tuneyard_trainer.reinforcement.group_methods import Grpo
from tuneyard_trainer.trl_engine import online
from tuneyard_trainer.trl_engine.online import Row, UpdatePrompts
from tuneyard_trainer.worker import StageContext, StageOutcome


class _Trainer(GRPOTrainer):
    """GRPOTrainer on the prompts of each update."""

    def __init__(self, prompts: UpdatePrompts, **arguments: Any) -> None:
        self._prompts = prompts
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[list[Row]]:
        return self._prompts.loader()


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(GrpoSettings)
    # As the native engine, unless training.trl sets another value.
    config = partial(GRPOConfig, use_bias_correction_kl=False)
    return online.run(context, settings, Grpo(settings), _Trainer, config)
