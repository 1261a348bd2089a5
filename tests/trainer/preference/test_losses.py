"""The preference losses against closed forms, plain loops and the formulas of the papers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tuneyard_trainer.preference.losses import kto_loss, pair_loss, ranking_loss, reward_loss

SCORES = torch.tensor([[1.5, -0.5, 0.25, 2.0], [0.0, 3.0, -1.0, 9.0], [2.0, 1.0, 7.0, 7.0]])
SIZES = torch.tensor([4, 3, 2])
CHOSEN = torch.tensor([0.7, -1.2, 3.0, 0.0])
REJECTED = torch.tensor([-0.3, 0.4, 2.5, 0.0])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def likelihood(scores: list[float]) -> float:
    """Return the likelihood of an order under Plackett-Luce, by its definition."""
    return math.prod(
        math.exp(scores[k]) / sum(math.exp(s) for s in scores[k:]) for k in range(len(scores))
    )


def close(found: Tensor, wanted: list[float]) -> None:
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_loss_of_a_ranking_is_its_plackett_luce_likelihood() -> None:
    rows = [SCORES[i, : int(size)].tolist() for i, size in enumerate(SIZES)]
    close(ranking_loss(SCORES, SIZES), [-math.log(likelihood(row)) for row in rows])


def test_the_likelihoods_of_all_orders_sum_to_one() -> None:
    orders = torch.tensor(list(itertools.permutations([0.3, -1.0, 2.0])))
    total = ranking_loss(orders, torch.full((6,), 3)).neg().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_a_ranking_of_two_is_a_bradley_terry_pair() -> None:
    pairs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    close(
        ranking_loss(pairs, torch.tensor([2, 2])), [-math.log(sigmoid(1)), -math.log(sigmoid(-2))]
    )


def test_a_margin_is_subtracted_from_each_chosen_score() -> None:
    pairs = torch.tensor([[1.0, 0.0]])
    close(ranking_loss(pairs, torch.tensor([2]), margin=0.5), [-math.log(sigmoid(0.5))])


def test_empty_places_contribute_neither_values_nor_gradients() -> None:
    scores = SCORES.clone().requires_grad_()
    ranking_loss(scores, SIZES, margin=0.1).sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert scores.grad[2, 2:].tolist() == [0, 0]
    assert scores.grad[1, 3] == 0


def test_extreme_scores_stay_finite() -> None:
    loss = ranking_loss(torch.tensor([[-1e4, 1e4], [1e4, -1e4]]), torch.tensor([2, 2]))
    assert loss.tolist() == [pytest.approx(2e4), 0.0]


def test_the_loss_of_an_uncertain_label_is_a_cross_entropy() -> None:
    pairs = torch.tensor([[1.0, 0.0]])
    found = reward_loss(pairs, torch.tensor([2]), torch.tensor([0.8]), margin=0.0, centering=0.0)
    close(found, [-0.8 * math.log(sigmoid(1)) - 0.2 * math.log(sigmoid(-1))])


def test_the_loss_of_a_tie_is_smallest_at_equal_scores() -> None:
    def loss(difference: float) -> float:
        pair = torch.tensor([[difference, 0.0]])
        tie = torch.tensor([0.5])
        return float(reward_loss(pair, torch.tensor([2]), tie, margin=0.0, centering=0.0))

    assert loss(0.0) < loss(0.1)
    assert loss(0.0) < loss(-0.1)


def test_centering_adds_the_mean_square_of_sums_of_two() -> None:
    plain = reward_loss(SCORES, SIZES, torch.ones(3), margin=0.0, centering=0.0)
    centered = reward_loss(SCORES, SIZES, torch.ones(3), margin=0.0, centering=0.1)
    wanted = []
    for row, size in zip(SCORES.tolist(), SIZES.tolist(), strict=True):
        sums = [(a + b) ** 2 for a, b in itertools.combinations(row[:size], 2)]
        wanted.append(0.1 * sum(sums) / len(sums))
    close(centered - plain, wanted)


BETA, SMOOTHING = 0.5, 0.2


def by_hand(kind: str, c: float, r: float) -> float:
    d = BETA * (c - r)
    return {
        "sigmoid": -(1 - SMOOTHING) * math.log(sigmoid(d)) - SMOOTHING * math.log(sigmoid(-d)),
        "robust": (-(1 - SMOOTHING) * math.log(sigmoid(d)) + SMOOTHING * math.log(sigmoid(-d)))
        / (1 - 2 * SMOOTHING),
        "ipo": ((c - r) - 1 / (2 * BETA)) ** 2,
        "hinge": max(0.0, 1 - d),
        "apo_zero": 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
        "apo_down": sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r)),
    }[kind]


KINDS = ("sigmoid", "robust", "ipo", "hinge", "apo_zero", "apo_down")


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_equals_the_formula_of_its_paper(kind: str) -> None:
    found = pair_loss(kind, CHOSEN, REJECTED, beta=BETA, label_smoothing=SMOOTHING)  # type: ignore[arg-type]
    pairs = zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)
    close(found, [by_hand(kind, c, r) for c, r in pairs])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_an_uncertain_pair_is_the_expectation_over_both_orders(kind: str) -> None:
    settings = {"beta": BETA, "label_smoothing": SMOOTHING}
    labels = torch.tensor([0.9, 0.5, 1.0, 0.6])
    found = pair_loss(kind, CHOSEN, REJECTED, labels_P=labels, **settings)  # type: ignore[arg-type]
    one = pair_loss(kind, CHOSEN, REJECTED, **settings)  # type: ignore[arg-type]
    other = pair_loss(kind, REJECTED, CHOSEN, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(found, labels * one + (1 - labels) * other)


def test_kto_rewards_good_completions_above_the_reference_point_and_bad_ones_below() -> None:
    ratios, good = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    found = kto_loss(ratios, good, torch.tensor(0.4), beta=BETA)
    close(found, [1 - sigmoid(BETA * 0.6), 1 - sigmoid(-BETA * 0.6)])


def test_ktos_reference_point_is_never_negative_and_carries_no_gradient() -> None:
    ratios, good = torch.tensor([1.0]), torch.tensor([True])
    close(kto_loss(ratios, good, torch.tensor(-3.0), beta=BETA), [1 - sigmoid(BETA)])
    kl = torch.tensor(0.4, requires_grad=True)
    assert not kto_loss(ratios, good, kl, beta=BETA).requires_grad
