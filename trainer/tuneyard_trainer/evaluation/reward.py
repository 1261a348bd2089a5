"""Rewards: of both models' completions, and of held-out preferences by the reward model alone.

Shapes: N completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tuneyard.api.evaluation import prefixed
from tuneyard.api.stage_settings import ChatSettings, RewardTerm
from tuneyard_trainer.data.prompts import Prompt
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.evaluation.evidence import Estimate, correlation_interval
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.part import Answered, Found, Loaded
from tuneyard_trainer.evaluation.preferences import HeldOutPreferences
from tuneyard_trainer.preference.metrics import pair_metrics
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.reinforcement.arithmetic import correlation
from tuneyard_trainer.reinforcement.independent import IndependentReward
from tuneyard_trainer.reinforcement.rewards import Attempt, Reward
from tuneyard_trainer.worker import StageContext


@dataclass(frozen=True)
class RewardOfCompletions:
    """The rater by a reward."""

    shared: SharedStage
    reward: Reward
    name: str = "reward"
    """The metric's name: `reward` is the optimized one, or `independentReward`."""

    def rate(self, answered: Answered) -> Found:
        """Return the mean reward of both models, and the reward of each completion; of the
        optimized one also its correlation with the length."""
        before_N = self._scores(answered.prompts, answered.before)
        tuned_N = self._scores(answered.prompts, answered.tuned)
        gains_N = tuned_N - before_N
        ids = tuple(prompt.where for prompt in answered.prompts)
        name = self.name
        own = Found(
            {
                name: float(np.mean(tuned_N)),
                prefixed("start", name): float(np.mean(before_N)),
                f"{name}Gain": float(np.mean(gains_N)),
                f"{name}GainError": float(np.std(gains_N) / np.sqrt(len(gains_N))),
            },
            items={name: Items(ids, tuned_N, before_N, higher_is_better=True)},
        )
        if name != "reward":
            return own
        return Found.merged([own, _with_length(tuned_N, answered.lengths_N)])

    def _scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> NDArray[np.float64]:
        pairs = zip(prompts, texts, strict=True)
        return scores(self.shared, self.reward, [Attempt(prompt, text) for prompt, text in pairs])


def _with_length(rewards_N: NDArray[np.float64], lengths_N: NDArray[np.float64]) -> Found:
    """Return the correlation of reward and length; nothing if one of them is constant."""
    found = correlation(torch.from_numpy(rewards_N), torch.from_numpy(lengths_N))
    if found is None:
        return Found()
    name, interval = "rewardLengthCorrelation", correlation_interval(found, len(rewards_N))
    evidence = {name: Estimate(interval, len(rewards_N))} if interval else {}
    return Found({name: found}, estimates=evidence)


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


def load_independent(
    context: StageContext,
    shared: SharedStage,
    term: RewardTerm,
    chat: ChatSettings,
    prompts: Sequence[Prompt],
) -> IndependentReward:
    """Load the independent reward. `prompts`: all prompts whose completions it scores."""
    device, check_stop = context.worker.device, shared.check_stop
    return IndependentReward.load(term, context.inputs, chat, prompts, device, check_stop)


def scores(shared: SharedStage, reward: Reward, attempts: Sequence[Attempt]) -> NDArray[np.float64]:
    """Return (N,) the reward of each completion. The workers share them. Raises StageError if one
    is not finite."""
    found = shared.results(
        [len(attempt.completion) for attempt in attempts],
        lambda own: reward([attempts[i] for i in own]).tolist(),
    )
    scores_N = rewards.finite(torch.tensor(found), [attempt.prompt for attempt in attempts])
    return np.array(scores_N.tolist())
