"""The length-controlled win rate: its regression is scikit-learn's, and it removes a judge's bias
for longer completions."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from tuneyard_trainer.evaluation import evidence
from tuneyard_trainer.evaluation.length_controlled import (
    RIDGE,
    LengthControlled,
    fit,
    length_controlled,
)

Floats = NDArray[np.float64]


def reference(wins_N: Floats, scaled_N: Floats, weights_N: Floats) -> Floats:
    """Return theta and beta by scikit-learn, to which a tie is half a win and half a loss."""
    rows = np.stack([np.ones(len(wins_N)), scaled_N], axis=1)
    regression = LogisticRegression(
        C=1 / RIDGE, fit_intercept=False, tol=1e-12, max_iter=10_000, solver="newton-cholesky"
    )
    regression.fit(
        np.concatenate([rows, rows]),
        np.repeat([1, 0], len(wins_N)),
        sample_weight=np.concatenate([weights_N * wins_N, weights_N * (1 - wins_N)]),
    )
    found: Floats = regression.coef_[0]
    return found


def judged(random: np.random.Generator, longer_N: Floats, theta: float, beta: float) -> Floats:
    """Return verdicts of a judge that prefers longer completions, a fifth of them ties."""
    chance_N = 1 / (1 + np.exp(-theta - beta * np.tanh(longer_N / np.std(longer_N))))
    wins_N = (random.random(len(longer_N)) < chance_N).astype(np.float64)
    wins_N[random.random(len(longer_N)) < 0.2] = 0.5
    return wins_N


def of(wins_N: Floats, longer_N: Floats) -> LengthControlled:
    found = length_controlled(wins_N, longer_N)
    assert isinstance(found, LengthControlled), found
    return found


def test_the_regression_is_that_of_scikit_learn_for_each_weighting_of_the_prompts() -> None:
    random = np.random.default_rng(11)
    for count in (20, 60, 128):
        longer_N = random.normal(random.normal(), 1, count)
        scaled_N = np.tanh(longer_N / np.std(longer_N))
        wins_N = judged(random, longer_N, theta=random.normal(), beta=random.normal(0, 2))
        weights_BN = random.integers(0, 3, (4, count)).astype(np.float64)
        theta_B, beta_B = fit(wins_N, scaled_N, weights_BN)
        for theta, beta, weights_N in zip(theta_B, beta_B, weights_BN, strict=True):
            expected = reference(wins_N, scaled_N, weights_N)
            np.testing.assert_allclose([theta, beta], expected, atol=1e-5)


@pytest.mark.parametrize("winner", ["the tuned model", "the longer completion"])
def test_verdicts_that_a_line_separates_give_bounded_coefficients(winner: str) -> None:
    """Without the ridge both would be infinite."""
    longer_N = np.random.default_rng(2).normal(0, 1, 100)
    of_tuned = winner == "the tuned model"
    wins_N = np.ones(100) if of_tuned else (longer_N > 0).astype(np.float64)
    scaled_N = np.tanh(longer_N / np.std(longer_N))
    theta_B, beta_B = fit(wins_N, scaled_N, np.ones((1, 100)))
    expected = reference(wins_N, scaled_N, np.ones(100))
    np.testing.assert_allclose([theta_B[0], beta_B[0]], expected, atol=1e-4)
    found = of(wins_N, longer_N)
    low, high = found.evidence.interval
    if of_tuned:
        assert 0.999 < found.win_rate < 1
        assert low > 0.99
    else:
        assert found.length_effect > 5
        assert low < 0.5 < high


def test_a_judge_that_prefers_long_completions_sees_equal_models_as_equal_at_equal_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tuned model writes longer completions, and is no better."""
    monkeypatch.setattr(evidence, "RESAMPLES", 200)
    random = np.random.default_rng(5)
    raw, controlled, covered = [], [], 0
    for _ in range(100):
        longer_N = random.normal(40, 40, 128)
        wins_N = judged(random, longer_N, theta=0.0, beta=2.0)
        found = of(wins_N, longer_N)
        raw.append(wins_N.mean())
        controlled.append(found.win_rate)
        covered += found.evidence.interval.contains(0.5)
    assert np.mean(raw) > 0.65
    assert np.mean(controlled) == pytest.approx(0.5, abs=0.03)
    assert covered >= 90


def test_a_better_model_stays_better_at_equal_length() -> None:
    random = np.random.default_rng(6)
    longer_N = random.normal(-30, 40, 128)
    wins_N = judged(random, longer_N, theta=1.5, beta=2.0)
    found = of(wins_N, longer_N)
    assert found.win_rate > wins_N.mean() + 0.05
    assert found.evidence.interval.low > 0.6
    assert found.evidence.items == 128


def test_completions_of_equal_length_leave_the_win_rate_as_it_is() -> None:
    wins_N = np.array([1.0] * 60 + [0.0] * 30 + [0.5] * 10)
    assert of(wins_N, np.zeros(100)).win_rate == pytest.approx(wins_N.mean(), abs=1e-3)


def test_the_unit_of_length_does_not_matter_and_swapping_the_models_mirrors_the_result() -> None:
    random = np.random.default_rng(7)
    longer_N = random.normal(10, 30, 80)
    wins_N = judged(random, longer_N, theta=0.5, beta=1.0)
    found = of(wins_N, longer_N)
    assert of(wins_N, 7 * longer_N).win_rate == pytest.approx(found.win_rate)
    assert of(1 - wins_N, -longer_N).win_rate == pytest.approx(1 - found.win_rate)


def test_too_few_prompts_and_completions_that_are_all_longer_give_a_reason_instead() -> None:
    few = length_controlled(np.ones(19), np.arange(19.0) - 9)
    assert few == "19 prompts were judged, and 20 are needed"
    longer = length_controlled(np.ones(30), np.arange(30.0) + 1)
    assert longer == (
        "30 of 30 completions of the tuned model are longer than the other model's, so that none "
        "can be judged at equal length"
    )
    shorter = length_controlled(np.ones(30), -np.arange(30.0) + 3)
    assert isinstance(shorter, str)
    assert shorter.startswith("26 of 30 completions of the tuned model are shorter")
    assert isinstance(length_controlled(np.zeros(0), np.zeros(0)), str)
