"""Whether what was drawn has the probabilities that it should have."""

from __future__ import annotations

from torch import Tensor

LIKELY = 6


def chi_squared(drawn_N: Tensor, probs_V: Tensor) -> float:
    """Over the LIKELY likeliest tokens; 22.5 is the 0.1% point of as many degrees of freedom."""
    statistic = 0.0
    for token in probs_V.topk(LIKELY).indices.tolist():
        expected = len(drawn_N) * probs_V[token].item()
        statistic += ((drawn_N == token).sum().item() - expected) ** 2 / expected
    return statistic
