"""The independent reward: one that nothing is trained on, measured beside the optimized reward.

An optimized reward cannot show its own quality: at first it and an independent one rise together,
then the optimized one rises on while the independent one falls (Gao et al. 2022, arXiv:2210.10760).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tuneyard.api.stage_settings import ChatSettings, RewardTerm
from tuneyard.errors import StageError
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reinforcement.rewards import Attempt, Reward
from tuneyard_trainer.worker import Interrupted


@dataclass(frozen=True)
class IndependentReward:
    """A reward whose errors name `independentReward`."""

    reward: Reward

    @classmethod
    def load(
        cls,
        term: RewardTerm,
        inputs: Mapping[str, Path],
        chat: ChatSettings,
        prompts: Sequence[Prompt],
        device: torch.device,
        before_batch: Callable[[], None] = lambda: None,
    ) -> IndependentReward:
        """Load it, as `rewards.load` does. The state of torch's random numbers stays as it was, so
        that training with this reward equals training without it. Raises StageError."""
        kept = [device] if device.type == "cuda" else []
        with _named(), torch.random.fork_rng(devices=kept):
            return cls(rewards.load([term], inputs, chat, prompts, device, before_batch))

    def __call__(self, attempts: Sequence[Attempt]) -> Tensor:
        """Return the scores (N,). Raises StageError, also for scores that are not finite."""
        with _named():
            try:
                scores_N = self.reward(attempts)
            except (StageError, Interrupted, MemoryError, OSError, torch.OutOfMemoryError):
                raise  # these have reasons of their own
            except Exception as error:
                raise rewards.reward_failed(error, attempts) from error
            return rewards.finite(scores_N, [attempt.prompt for attempt in attempts])


@contextmanager
def _named() -> Iterator[None]:
    """Let a StageError say that the independent reward is meant, and what to change."""
    try:
        yield
    except StageError as error:
        raise error.with_message(
            f"independentReward: {error.message}",
            advice="Change independentReward, or remove it: it is measured only.",
        ) from error
