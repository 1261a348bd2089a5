"""Rewards: of both models' completions, and of held-out preferences by the reward model alone.

Shapes: N completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tuneyard.api.stage_settings import ChatSettings, RewardTerm
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.part import Answered, Found, Loaded
from tuneyard_trainer.evaluation.preferences import HeldOutPreferences
from tuneyard_trainer.preference.metrics import correlation, pair_metrics
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reinforcement.rewards import Attempt, Reward
from tuneyard_trainer.worker import StageContext


@dataclass(frozen=True)
class RewardOfCompletions:
    """The rater by the reward."""

    shared: SharedStage
    reward: Reward

    def rate(self, answered: Answered) -> Found:
        """Return the mean reward of both models, and the reward of each completion."""
        before_N = self._scores(answered.prompts, answered.before)
        tuned_N = self._scores(answered.prompts, answered.tuned)
        gains_N = tuned_N - before_N
        ids = tuple(prompt.where for prompt in answered.prompts)
        return Found(
            {
                "reward": float(np.mean(tuned_N)),
                "startReward": float(np.mean(before_N)),
                "rewardGain": float(np.mean(gains_N)),
                "rewardGainError": float(np.std(gains_N) / np.sqrt(len(gains_N))),
                "rewardLengthCorrelation": correlation(tuned_N, answered.lengths_N),
            },
            items={"reward": Items(ids, tuned_N, before_N, higher_is_better=True)},
        )

    def _scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> NDArray[np.float64]:
        pairs = zip(prompts, texts, strict=True)
        return scores(self.shared, self.reward, [Attempt(prompt, text) for prompt, text in pairs])


@dataclass(frozen=True)
class RewardOfPreferences:
    """The part that measures the reward models, without rules, on held-out pairs. It needs no
    policy, and loads the reward models once none is in memory."""

    context: StageContext
    shared: SharedStage
    terms: Sequence[RewardTerm]
    """Terms of reward models."""
    chat: ChatSettings
    held_out: HeldOutPreferences
    """Pairs or rankings."""

    def measure(self, _loaded: Loaded, _tuned: None, /) -> None:
        """Measure nothing."""

    def compare(self, _tuned: None, _before: None, /) -> Found:
        """Return the accuracy, margin and calibration of the reward. All workers share the
        completions."""
        self.shared.stop_together()
        self.context.worker.report(total_steps=1, message="measuring the reward model")
        reward = load(self.context, self.shared, self.terms, self.chat, self.held_out.prompts)
        scores_R = scores(self.shared, reward, self.held_out.attempts)
        metrics = pair_metrics("reward", scores_R, self.held_out.comparisons)
        items = {"rewardAccuracy": self.held_out.items(scores_R)} if metrics else {}
        return Found(metrics, items=items)


def load(
    context: StageContext,
    shared: SharedStage,
    terms: Sequence[RewardTerm],
    chat: ChatSettings,
    prompts: Sequence[Prompt],
) -> Reward:
    """Load a reward. `prompts`: all prompts whose completions it scores."""
    device, check_stop = context.worker.device, shared.check_stop
    return rewards.load(terms, context.inputs, chat, prompts, device, check_stop)


def scores(shared: SharedStage, reward: Reward, attempts: Sequence[Attempt]) -> NDArray[np.float64]:
    """Return (N,) the reward of each completion. The workers share them. Raises StageError if one
    is not finite."""
    found = shared.results(
        [len(attempt.completion) for attempt in attempts],
        lambda own: reward([attempts[i] for i in own]).tolist(),
    )
    scores_N = rewards.finite(torch.tensor(found), [attempt.prompt for attempt in attempts])
    return np.array(scores_N.tolist())
