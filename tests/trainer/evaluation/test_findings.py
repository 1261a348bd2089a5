"""Findings name a reward that is exploited, and are silent without evidence."""

from __future__ import annotations

import numpy as np
import pytest

from tuneyard_trainer.evaluation.evidence import Estimate, Interval, correlation_interval
from tuneyard_trainer.evaluation.findings import findings
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.part import Found
from tuneyard_trainer.evaluation.reward import _with_length


def change(name: str, mean: float, deviation: float = 1.0, count: int = 64) -> Found:
    """A metric of both models that differs by `mean`, on items that differ by `deviation`."""
    gains_N = np.random.default_rng(1).normal(0, deviation, count)
    gains_N += mean - gains_N.mean()
    base_N = np.zeros(count)
    ids = tuple(f"row {index}" for index in range(count))
    items = {name: Items(ids, gains_N, base_N, higher_is_better=True)}
    return Found({name: float(mean), f"{name}Gain": float(mean)}, items=items)


ROSE, FELL = change("reward", 1.0), change("independentReward", -1.0)


def of(*parts: Found) -> list[str]:
    return findings(Found.merged(parts))


def test_a_reward_that_rises_while_the_independent_one_falls_is_named_with_both_intervals() -> None:
    (sentence,) = of(ROSE, FELL)
    assert sentence.startswith("The reward rose by 1 (95% interval 0.7")
    assert "while the independent reward fell by 1 (95% interval 0.7" in sentence
    assert "on the same 64 prompts: training exploited the reward. Lower" in sentence


@pytest.mark.parametrize(
    "parts",
    [
        (ROSE,),
        (FELL,),
        (ROSE, change("independentReward", 1.0)),
        (ROSE, change("independentReward", -0.1)),
        (change("reward", 0.1), FELL),
        (change("reward", -1.0), FELL),
        (ROSE, change("independentReward", float("nan"))),
    ],
    ids=["alone", "no reward", "both rose", "fall unclear", "rise unclear", "both fell", "nan"],
)
def test_nothing_is_said_without_a_clear_rise_and_a_clear_fall(parts: tuple[Found, ...]) -> None:
    assert of(*parts) == []


def test_a_judge_that_prefers_the_model_before_is_named_once() -> None:
    points_N = np.array([1.0] * 10 + [0.0] * 50)
    ids = tuple(map(str, range(60)))
    items = {"winRate": Items(ids, points_N, None, higher_is_better=True)}
    lost = Found({"winRate": 1 / 6}, items=items)
    controlled = Found(
        {"lengthControlledWinRate": 0.2},
        estimates={"lengthControlledWinRate": Estimate(Interval(0.1, 0.3), 60)},
    )
    (sentence,) = of(ROSE, lost, controlled)
    assert "while the judge prefers the completions of the model before: winRate is" in sentence
    (sentence,) = of(ROSE, controlled)
    assert "lengthControlledWinRate is 0.2 (95% interval 0.1 to 0.3)" in sentence
    assert of(lost, controlled) == []


def with_length(value: float, count: int = 64, ratio: float = 1.5) -> Found:
    interval = correlation_interval(value, count)
    evidence = {"rewardLengthCorrelation": Estimate(interval, count)} if interval else {}
    return Found({"rewardLengthCorrelation": value, "lengthRatio": ratio}, estimates=evidence)


def test_a_reward_that_goes_with_the_length_is_named() -> None:
    (sentence,) = of(with_length(0.7))
    assert sentence.startswith("The reward correlates with the length of completions: 0.70 (95% in")
    assert "over 64 completions, so longer ones are rewarded, whatever they say." in sentence
    assert "They are 1.5 times as long as before training." in sentence
    assert "shorter ones are rewarded" in of(with_length(-0.7))[0]
    assert of(with_length(0.4)) == of(with_length(0.6, count=8)) == of(with_length(1.0, 3)) == []


def test_a_reward_that_is_the_length_itself_is_named() -> None:
    """A correlation of 1 is the clearest of all."""
    assert "1.00 (95% interval 1 to 1)" in of(with_length(1.0))[0]
    assert correlation_interval(1.0, 3) is None
    lengths_N = np.array([8.0, 16.0, 32.0, 64.0])
    for sign, which in ((1, "longer"), (-1, "shorter")):
        found = _with_length(sign * lengths_N, lengths_N)
        assert found.metrics["rewardLengthCorrelation"] == pytest.approx(sign)
        (sentence,) = of(found)
        assert (
            f"{sign:.2f} (95% interval {sign} to {sign}) over 4 completions, so {which}" in sentence
        )


def test_the_interval_of_a_correlation_covers_it_in_95_of_100_simulations() -> None:
    random, covered = np.random.default_rng(4), 0
    for _ in range(2000):
        x_N, noise_N = random.normal(0, 1, (2, 50))
        y_N = 0.6 * x_N + 0.8 * noise_N
        interval = correlation_interval(float(np.corrcoef(x_N, y_N)[0, 1]), 50)
        assert interval is not None
        covered += interval.contains(0.6)
    assert 0.935 <= covered / 2000 <= 0.965
