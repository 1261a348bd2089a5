"""When a run of reinforcement learning has gone wrong: it drifts, collapses or rambles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tuneyard.api.alignment import BlowUp


class Stop(NamedTuple):
    """Why a run ends early."""

    reason: str
    message: str


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


TRUNCATED_UPDATES = 3
"""Updates in a row without one whole answer before the run is given up."""


ALIKE_UPDATES = 8
"""Updates from the start in which no reward differed before the run is given up."""
