"""A chi-squared test of sampled tokens."""

from __future__ import annotations

from torch import Tensor

LIKELY = 6


def chi_squared(drawn_N: Tensor, probs_V: Tensor) -> float:
    """Return the statistic over the 6 most probable tokens. With 6 degrees of freedom it exceeds
    22.5 in 0.1% of cases."""
    statistic = 0.0
    for token in probs_V.topk(LIKELY).indices.tolist():
        expected = len(drawn_N) * probs_V[token].item()
        statistic += ((drawn_N == token).sum().item() - expected) ** 2 / expected
    return statistic
