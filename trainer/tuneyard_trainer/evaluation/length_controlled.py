"""The win rate that a judge would give if the completions of both models were equally long.

Judges prefer longer completions, whatever these say. Dubois et al. 2024 (arXiv:2404.04475)
therefore model the judge's preference with a term for the difference in length, and set this term
to 0:

    P(the tuned model wins) = sigmoid(theta + beta * tanh(difference / its standard deviation))

Their term for the difficulty of a prompt needs many models, and is left out. Shapes: N prompts, B
resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneyard_trainer.evaluation.evidence import Estimate, bootstrap_interval

FEWEST_PROMPTS = 20
"""Two coefficients from fewer prompts say next to nothing."""
FEWEST_EACH_WAY = 5
"""The fewest prompts whose completion by the tuned model is no shorter, and the fewest whose is no
longer. If all are longer, no judgment near equal length was seen, and none can be inferred."""
RIDGE = 0.01
"""The weight of half the squared coefficients in the loss, which is summed over the prompts: that
of a normal prior with a standard deviation of 10. It bounds both coefficients if one model, or the
longer completion, always wins: with 100 wins of 100, the win rate is 0.9993."""

STEPS = 100
"""Newton steps at most; about 10 are taken."""
LONGEST_STEP = 1.0
"""Newton's method may diverge from far away without a bound on its steps."""
TOLERANCE = 1e-9


class LengthControlled(NamedTuple):
    """The win rate at equal length."""

    win_rate: float
    length_effect: float
    """Beta: the log-odds that a much longer completion gains."""
    evidence: Estimate


def length_controlled(
    wins_N: NDArray[np.float64], longer_N: NDArray[np.float64]
) -> LengthControlled | str:
    """Return the win rate at equal length, or why it cannot be told.

    `wins_N`: 1 for a win of the tuned model, 0 for a loss, 0.5 for a tie. `longer_N`: by how much
    its completion is longer, in any unit. The interval is a bootstrap over prompts.
    """
    count = len(wins_N)
    if count < FEWEST_PROMPTS:
        return f"{count} prompts were judged, and {FEWEST_PROMPTS} are needed"
    for shorter, other in ((longer_N >= 0, "shorter"), (longer_N <= 0, "longer")):
        if shorter.sum() < FEWEST_EACH_WAY:
            return (
                f"{count - int(shorter.sum())} of {count} completions of the tuned model are "
                f"{other} than the other model's, so that none can be judged at equal length"
            )
    spread = float(np.std(longer_N))
    scaled_N = np.tanh(longer_N / spread) if spread else np.zeros(count)
    weights_1N = np.ones((1, count))
    theta, effect = (float(values[0]) for values in fit(wins_N, scaled_N, weights_1N))

    def win_rates(drawn_BN: NDArray[np.int64]) -> NDArray[np.float64]:
        weights_BN = np.stack([np.bincount(row, minlength=count) for row in drawn_BN])
        return _sigmoid(fit(wins_N, scaled_N, weights_BN.astype(np.float64))[0])

    evidence = Estimate(bootstrap_interval(count, win_rates), count)
    return LengthControlled(float(_sigmoid(np.array(theta))), effect, evidence)


def fit(
    wins_N: NDArray[np.float64], scaled_N: NDArray[np.float64], weights_BN: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return theta (B,) and beta (B,) of the logistic regressions with these weights of the
    prompts, by Newton's method on all of them at a time.

    Ties are half a win and half a loss, so the loss of a prompt is its cross-entropy.
    """
    theta_B, beta_B = np.zeros(len(weights_BN)), np.zeros(len(weights_BN))
    square_N = scaled_N**2
    for _ in range(STEPS):
        chance_BN = _sigmoid(theta_B[:, None] + beta_B[:, None] * scaled_N)
        error_BN = weights_BN * (chance_BN - wins_N)
        curve_BN = weights_BN * chance_BN * (1 - chance_BN)
        gradient_B2 = np.stack(
            [error_BN.sum(1) + RIDGE * theta_B, error_BN @ scaled_N + RIDGE * beta_B], axis=1
        )
        cross_B = curve_BN @ scaled_N
        hessian_B22 = np.stack(
            [curve_BN.sum(1) + RIDGE, cross_B, cross_B, curve_BN @ square_N + RIDGE], axis=1
        ).reshape(-1, 2, 2)
        step_B2 = np.linalg.solve(hessian_B22, gradient_B2[..., None])[..., 0]
        length_B = np.linalg.norm(step_B2, axis=1)
        step_B2 *= np.minimum(1, LONGEST_STEP / np.maximum(length_B, TOLERANCE))[:, None]
        theta_B, beta_B = theta_B - step_B2[:, 0], beta_B - step_B2[:, 1]
        if length_B.max() < TOLERANCE:
            break
    return theta_B, beta_B


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (1 + np.tanh(logits / 2)) / 2
    return found
