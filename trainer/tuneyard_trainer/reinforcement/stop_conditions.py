"""Conditions that end a reinforcement run early: truncation, equal rewards, a diverging policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from tuneyard.api.alignment import StopConditions
from tuneyard.errors import StageError
from tuneyard_trainer.reinforcement.state import RlState

TRUNCATED_UPDATES = 3
"""The run fails after this number of updates in a row in which all completions are truncated."""
ALIKE_UPDATES = 8
"""The run fails if no rewards differ in this number of updates from the start."""


class Stop(NamedTuple):
    """The reason and the message of a run that ends early."""

    reason: str
    message: str

    def require_best(self, state: RlState, *, keep_best: bool) -> None:
        """Raise StageError unless a checkpoint that is better than the start model can be the
        result."""
        if keep_best and state.best_step:
            return
        raise StageError(
            self.reason,
            f"{self.message} after {state.step} updates, and no measurement before that was better "
            "than the start model.",
            advice="Lower training.learningRate, raise klCoefficient, measure more often "
            "(training.evaluationSteps), or relax stopOn.",
        )


def diverged(
    limits: StopConditions | None, metrics: Mapping[str, float], first_length: float
) -> Stop | None:
    """Return the first limit that an update's metrics exceed; None: they exceed no limit.

    `first_length`: mean completion length of the first update, in tokens. A limit on the KL has no
    effect without a reference model, since `metrics` lack `kl` then.
    """
    if limits is None:
        return None
    kl, entropy = metrics.get("kl", 0.0), metrics["entropy"]
    ratio = metrics["completionLength"] / first_length
    if limits.max_kl is not None and kl > limits.max_kl:
        return Stop("KlBlowUp", f"the KL is {kl:.3g} nats per completion, above {limits.max_kl:g}")
    if limits.min_entropy is not None and entropy < limits.min_entropy:
        return Stop(
            "EntropyCollapse",
            f"the entropy is {entropy:.3g} nats per token, below {limits.min_entropy:g}",
        )
    if limits.max_length_ratio is not None and ratio > limits.max_length_ratio:
        return Stop(
            "LengthDrift",
            f"completions are {ratio:.3g} times as long as in the first update, above "
            f"{limits.max_length_ratio:g}",
        )
    return None


def count_truncated(
    state: RlState, metrics: Mapping[str, float], *, completions: int, max_new_tokens: int
) -> RlState:
    """Return the state with the number of updates in a row in which every completion was truncated.

    `completions`: the number of completions in an update. Raises StageError
    AllCompletionsTruncated.
    """
    truncated = state.truncated + 1 if metrics["endedShare"] == 0 else 0
    if truncated >= TRUNCATED_UPDATES:
        raise StageError(
            "AllCompletionsTruncated",
            f"in {truncated} updates in a row none of {completions} completions ended within "
            f"{max_new_tokens} tokens: the reward is scoring truncated completions.",
            advice="Raise sampling.maxNewTokens, or start from a model that ends its completions "
            "(sft first). If completions need no end, set ppo.missingEosPenalty: 0.",
        )
    return replace(state, truncated=truncated)


def count_alike(state: RlState, metrics: Mapping[str, float]) -> RlState:
    """Return the state with the number of updates from the start without rewards that differ.

    Later updates may have equal rewards because the policy has learned the task. Raises StageError
    RewardsAlike.
    """
    differ = metrics["rewardDeviation"] > 1e-6 and metrics.get("groupsAlike", 0.0) < 1
    if state.alike is None or differ:
        return replace(state, alike=None)
    if state.alike + 1 >= ALIKE_UPDATES:
        raise StageError(
            "RewardsAlike",
            f"in each of the first {ALIKE_UPDATES} updates all completions that are compared with "
            f"each other had the same reward (mean of the last update: {metrics['reward']:.3g}), "
            "and equal rewards give no gradient.",
            advice="Start from a model that solves some of the prompts (sft, or more of it), raise "
            "sampling.temperature, or choose a reward that separates completions.",
        )
    return replace(state, alike=state.alike + 1)
