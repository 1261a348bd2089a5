"""When a run of reinforcement learning has gone wrong: it drifts, collapses or rambles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from tuneyard.api.alignment import BlowUp
from tuneyard.errors import StageError
from tuneyard_trainer.reinforcement.state import RlState

TRUNCATED_UPDATES = 3
"""Updates in a row without one complete completion before the run fails."""
ALIKE_UPDATES = 8
"""Updates from the start in which no reward differed before the run fails."""


class Stop(NamedTuple):
    """Why a run ends early."""

    reason: str
    message: str

    def require_best(self, state: RlState, *, keep_best: bool) -> None:
        """Raise StageError if there is no checkpoint to end the run with: one that is measured
        better than the model at the start."""
        if keep_best and state.best_step:
            return
        raise StageError(
            self.reason,
            f"{self.message} after {state.step} updates, and no better model had been "
            "measured by then.",
            advice="Lower training.learningRate, raise klCoefficient, measure more often "
            "(training.evaluationSteps), or relax stopOn.",
        )


def blown_up(
    limits: BlowUp | None, watched: Mapping[str, float], first_length: float
) -> Stop | None:
    """The first limit that an update's answers break; None: none. A limit on the KL needs it to be
    watched."""
    if limits is None:
        return None
    kl, entropy = watched.get("kl", 0.0), watched["entropy"]
    ratio = watched["answerLength"] / first_length
    if limits.max_kl is not None and kl > limits.max_kl:
        return Stop("KlBlowUp", f"the KL is {kl:.3g} nats per answer, above {limits.max_kl:g}")
    if limits.min_entropy is not None and entropy < limits.min_entropy:
        return Stop(
            "EntropyCollapse",
            f"the entropy is {entropy:.3g} nats per token, below {limits.min_entropy:g}",
        )
    if limits.max_length_ratio is not None and ratio > limits.max_length_ratio:
        return Stop(
            "LengthDrift",
            f"answers are {ratio:.3g} times as long as at first, above {limits.max_length_ratio:g}",
        )
    return None


def count_truncated(
    state: RlState, watched: Mapping[str, float], *, answers: int, max_new_tokens: int
) -> RlState:
    """Return the state with the updates in a row that have no complete completion, this one
    included. Raises StageError AllAnswersTruncated. `answers`: of an update."""
    truncated = state.truncated + 1 if watched["endedShare"] == 0 else 0
    if truncated >= TRUNCATED_UPDATES:
        raise StageError(
            "AllAnswersTruncated",
            f"in {truncated} updates on end not one of {answers} answers came to "
            f"its end within {max_new_tokens} tokens: what is scored "
            "are torsos.",
            advice="Raise sampling.maxNewTokens, or start from a model that ends its answers "
            "(sft first). Answers without an end on purpose: ppo.missingEosPenalty: 0.",
        )
    return replace(state, truncated=truncated)


def count_alike(state: RlState, metrics: Mapping[str, float]) -> RlState:
    """Return the state with the updates from the start in which no reward differed, this one
    included. Raises StageError RewardsAlike. Later updates may have equal rewards because the
    policy has learned the task."""
    differ = metrics["rewardDeviation"] > 1e-6 and metrics.get("groupsAlike", 0.0) < 1
    if state.alike is None or differ:
        return replace(state, alike=None)
    if state.alike + 1 >= ALIKE_UPDATES:
        raise StageError(
            "RewardsAlike",
            f"in the first {ALIKE_UPDATES} updates all answers that are compared earned the "
            f"same ({metrics['reward']:.3g} in the mean of the last): there was nothing to "
            "learn from.",
            advice="Start from a model that is right at times (sft, or more of it), raise "
            "sampling.temperature, or choose a reward that tells answers apart.",
        )
    return replace(state, alike=state.alike + 1)
