"""The formulas of PPO, GRPO and RLOO against plain loops, closed forms and TRL's formulas."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tuneyard_trainer.reinforcement import arithmetic

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def close(actual: Tensor, expected: Tensor | list[Any] | float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **CLOSE)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = [5, 1, 3, 7]
MASK = torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]


def with_nan_padding(x_BT: Tensor) -> Tensor:
    """Return the tensor with NaN as padding, which no formula may read."""
    return torch.where(MASK, x_BT, torch.full_like(x_BT, math.nan))


def rows(x_BT: Tensor) -> list[list[float]]:
    """Return the values of each completion, without padding."""
    return [x_BT[b, :length].tolist() for b, length in enumerate(LENGTHS)]


def flat(x_BT: Tensor) -> list[float]:
    return [value for row in rows(x_BT) for value in row]


# ---- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_gives_unit_variance_under_the_mask_and_zero_outside(shift_mean: bool) -> None:
    x = random(4, 7) * 3 + 2
    values = flat(x)
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    white = arithmetic.whiten(with_nan_padding(x), MASK, shift_mean=shift_mean)
    for b in range(4):
        for t in range(7):
            inside = (x[b, t].item() - mean) / math.sqrt(variance + 1e-8)
            inside += 0 if shift_mean else mean
            assert white[b, t].item() == pytest.approx(inside if MASK[b, t] else 0.0, abs=1e-5)


def test_whitening_is_exact_far_from_zero() -> None:
    """Squares of values near 10,000 would lose every digit in float32."""
    x = random(4, 7) + 1e4
    close(arithmetic.masked_moments(x, MASK).variance, torch.tensor(flat(x)).double().var().item())


def test_one_value_whitens_to_zero_and_not_to_nan() -> None:
    one = torch.zeros(2, 3, dtype=torch.bool)
    one[1, 0] = True
    assert arithmetic.whiten(random(2, 3), one).tolist() == [[0.0] * 3] * 2


class Sum:
    """A `reduce` for two threads, each of which waits for the other's tensor."""

    def __init__(self) -> None:
        self.barrier, self.parts = threading.Barrier(2), dict[int, Tensor]()

    def __call__(self, tensor: Tensor) -> Tensor:
        self.parts[threading.get_ident()] = tensor
        self.barrier.wait(timeout=10)
        total = torch.stack(list(self.parts.values())).sum(0)
        self.barrier.wait(timeout=10)
        return total


def test_the_statistics_of_two_workers_are_those_of_the_whole_batch() -> None:
    x, values, reduce = random(4, 7), random(4, 7, seed=1), Sum()

    def work(part: slice) -> tuple[Tensor, Tensor]:
        white = arithmetic.whiten(x[part], MASK[part], reduce=reduce)
        return white, arithmetic.explained_variance(values[part], x[part], MASK[part], reduce)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(work, [slice(0, 2), slice(2, 4)]))
    close(torch.cat([white for white, _ in parts]), arithmetic.whiten(x, MASK))
    for _, explained in parts:
        close(explained, arithmetic.explained_variance(values, x, MASK).item())


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant() -> None:
    returns = random(4, 7)
    close(arithmetic.explained_variance(returns + 3, returns, MASK), 1.0)
    close(arithmetic.explained_variance(torch.full((4, 7), 2.0), returns, MASK), 0.0)
    close(arithmetic.explained_variance(-returns, returns, MASK), -3.0)
    assert arithmetic.explained_variance(random(4, 7), torch.ones(4, 7), MASK).item() == 0.0


# ---- probabilities ------------------------------------------------------------------------------


def test_log_probabilities_and_entropy_are_those_of_the_softmax() -> None:
    logits, ids = random(6, 11) * 4, torch.tensor([0, 3, 10, 5, 5, 1])
    for n in range(6):
        exps = [math.exp(value) for value in logits[n].tolist()]
        p = [value / sum(exps) for value in exps]
        chosen = arithmetic.token_logprobs(logits, ids)[n].item()
        assert chosen == pytest.approx(math.log(p[int(ids[n])]), abs=1e-5)
        entropy = -sum(q * math.log(q) for q in p)
        assert arithmetic.entropy(logits)[n].item() == pytest.approx(entropy, abs=1e-5)


def test_kl_estimators_against_the_true_divergence() -> None:
    """k1 and k3 are unbiased; k2 is near for near distributions; k2 and k3 are never negative."""
    p, q = (random(8, seed=s).double().mul(0.3).log_softmax(-1) for s in (1, 2))
    true = (p.exp() * (p - q)).sum().item()
    expected = {name: (p.exp() * f(p, q)).sum().item() for name, f in ESTIMATORS.items()}
    assert expected["k1"] == pytest.approx(true, abs=1e-9)
    assert expected["k3"] == pytest.approx(true, abs=1e-9)
    assert expected["k2"] == pytest.approx(true, rel=0.2)
    assert (arithmetic.kl_k2(p, q) >= 0).all()
    assert (arithmetic.kl_k3(p, q) >= 0).all()
    assert (arithmetic.kl_k1(p, q) < 0).any()


ESTIMATORS = {"k1": arithmetic.kl_k1, "k2": arithmetic.kl_k2, "k3": arithmetic.kl_k3}


def test_kl_estimators_token_by_token() -> None:
    p, q = -random(4, 7).abs(), -random(4, 7, seed=1).abs()
    for b in range(4):
        for t in range(7):
            d = p[b, t].item() - q[b, t].item()
            assert arithmetic.kl_k1(p, q)[b, t].item() == pytest.approx(d, abs=1e-5)
            assert arithmetic.kl_k2(p, q)[b, t].item() == pytest.approx(d * d / 2, abs=1e-5)
            assert arithmetic.kl_k3(p, q)[b, t].item() == pytest.approx(
                math.exp(-d) - 1 + d, abs=1e-5
            )


# ---- rewards and advantages ---------------------------------------------------------------------


def test_only_a_completion_without_a_stop_token_is_penalized() -> None:
    ended = arithmetic.ended(torch.tensor([7, 4, 9]), torch.tensor([9, 7]))
    assert ended.tolist() == [True, False, True]
    close(
        arithmetic.penalize_missing_end(torch.tensor([1.0, 2.0, 3.0]), ended, 0.5), [1.0, 1.5, 3.0]
    )


def test_every_token_is_penalized_by_its_kl_and_the_last_one_gets_the_score() -> None:
    logprobs, reference, scores = -random(4, 7).abs(), -random(4, 7, seed=1).abs(), random(4)
    rewards = arithmetic.kl_penalized_rewards(
        scores, with_nan_padding(logprobs), with_nan_padding(reference), MASK, 0.3
    )
    for b, length in enumerate(LENGTHS):
        for t in range(7):
            expected = 0.0
            if t < length:
                expected = -0.3 * (logprobs[b, t] - reference[b, t]).item()
            if t == length - 1:
                expected += scores[b].item()
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_advantages_are_the_sum_of_discounted_residuals(discount: float, decay: float) -> None:
    """Equation 16 as written: a sum over later tokens, not a recursion."""
    rewards, values = random(4, 7), random(4, 7, seed=1)
    advantages, returns = arithmetic.gae(
        with_nan_padding(rewards), with_nan_padding(values), MASK, discount=discount, decay=decay
    )
    for b, length in enumerate(LENGTHS):
        r, v = rewards[b].tolist()[:length], [*values[b].tolist()[:length], 0.0]
        delta = [r[t] + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(7):
            if t >= length:
                assert advantages[b, t] == returns[b, t] == 0
                continue
            expected = sum((discount * decay) ** k * delta[t + k] for k in range(length - t))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-5)


def test_with_lambda_one_the_returns_are_the_rewards_to_go() -> None:
    rewards = random(4, 7)
    for seed in (1, 2):
        _, returns = arithmetic.gae(rewards, random(4, 7, seed=seed), MASK, discount=1.0, decay=1.0)
        for b, row in enumerate(rows(rewards)):
            close(returns[b, : len(row)], [sum(row[t:]) for t in range(len(row))])


def test_leave_one_out_compares_each_completion_with_the_others_in_its_group() -> None:
    rewards = random(3, 4)
    for p in range(3):
        for g in range(4):
            others = [rewards[p, j].item() for j in range(4) if j != g]
            expected = rewards[p, g].item() - sum(others) / 3
            assert arithmetic.rloo_advantages(rewards)[p, g].item() == pytest.approx(
                expected, abs=1e-5
            )


def test_group_relative_advantages_are_standard_scores_and_zero_for_equal_rewards() -> None:
    rewards = random(3, 4)
    rewards[1] = 0.7
    for p in range(3):
        group = rewards[p].tolist()
        mean = sum(group) / 4
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        for g in range(4):
            expected = (group[g] - mean) / (deviation + 1e-4)
            assert arithmetic.grpo_advantages(rewards)[p, g].item() == pytest.approx(
                expected, abs=1e-5
            )
    close(arithmetic.grpo_advantages(rewards)[1], [0.0] * 4)


# ---- losses -------------------------------------------------------------------------------------


def test_the_policy_loss_is_clipped_only_where_a_larger_change_would_lower_it() -> None:
    new, old, advantages = random(4, 7) * 0.5, random(4, 7, seed=1) * 0.5, random(4, 7, seed=2)
    loss, is_clipped = arithmetic.clipped_policy_loss(new, old, advantages, 0.2)
    for b in range(4):
        for t in range(7):
            ratio, a = math.exp((new - old)[b, t].item()), advantages[b, t].item()
            expected = -min(ratio * a, max(0.8, min(1.2, ratio)) * a)
            assert loss[b, t].item() == pytest.approx(expected, abs=1e-5)
            assert is_clipped[b, t].item() == ((a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8))


def test_the_gradient_is_zero_where_the_policy_loss_is_clipped() -> None:
    new = torch.tensor([1.0, -1.0, 0.1], requires_grad=True)
    loss, is_clipped = arithmetic.clipped_policy_loss(
        new, torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), 0.2
    )
    loss.sum().backward()
    assert is_clipped.tolist() == [True, True, False]
    assert new.grad is not None
    close(new.grad, [0.0, 0.0, -math.exp(0.1)])


def test_the_value_loss_is_the_larger_of_the_unclipped_and_the_clipped_one() -> None:
    new, old, returns = random(4, 7), random(4, 7, seed=1), random(4, 7, seed=2)
    loss, _ = arithmetic.clipped_value_loss(new, old, returns, 0.2)
    for b in range(4):
        for t in range(7):
            v, was, goal = (x[b, t].item() for x in (new, old, returns))
            near = max(was - 0.2, min(was + 0.2, v))
            expected = 0.5 * max((v - goal) ** 2, (near - goal) ** 2)
            assert loss[b, t].item() == pytest.approx(expected, abs=1e-5)


def test_the_coefficient_adapts_to_the_target_and_is_fixed_without_one() -> None:
    assert arithmetic.adapted_coefficient(0.1, 99.0, None) == 0.1
    assert arithmetic.adapted_coefficient(0.1, 6.6, 6.0) == pytest.approx(0.1 * 1.01)
    assert arithmetic.adapted_coefficient(0.1, 60.0, 6.0) == pytest.approx(0.1 * 1.02)
    assert arithmetic.adapted_coefficient(0.1, -5.0, 6.0) == pytest.approx(0.1 * 0.98)


# ---- TRL 1.12's PPO -----------------------------------------------------------------------------


class TrlStep:
    """The computation of `PPOTrainer.train` of TRL 1.12 between scoring and the backward pass, from
    its formulas, for completions of full length (without padding)."""

    kl_coefficient, discount, decay, clip, value_clip, value_weight = 0.05, 1.0, 0.95, 0.2, 0.2, 0.1

    def __init__(self, logprobs: Tensor, reference: Tensor, values: Tensor, scores: Tensor) -> None:
        self.logprobs, self.values = logprobs, values
        self.rewards = -self.kl_coefficient * (logprobs - reference)
        self.rewards[:, -1] += scores
        last, backwards = torch.zeros(len(scores)), []
        for t in reversed(range(logprobs.shape[1])):
            following = values[:, t + 1] if t < logprobs.shape[1] - 1 else 0.0
            delta = self.rewards[:, t] + self.discount * following - values[:, t]
            last = delta + self.discount * self.decay * last
            backwards.append(last)
        raw = torch.stack(backwards[::-1], dim=1)
        self.returns = raw + values
        mean, count = raw.mean(), raw.numel()
        variance = ((raw - mean) ** 2).mean() * (count / (count - 1))
        self.advantages = (raw - mean) * torch.rsqrt(variance + 1e-8)

    def losses(self, logprobs: Tensor, values: Tensor) -> dict[str, Tensor]:
        near = torch.clamp(values, self.values - self.value_clip, self.values + self.value_clip)
        square, square_near = (values - self.returns) ** 2, (near - self.returns) ** 2
        value_loss = 0.5 * torch.max(square, square_near).mean()
        ratio = torch.exp(logprobs - self.logprobs)
        free = -self.advantages * ratio
        clipped = -self.advantages * torch.clamp(ratio, 1 - self.clip, 1 + self.clip)
        policy_loss = torch.max(free, clipped).mean()
        return {
            "policy": policy_loss,
            "value": value_loss,
            "loss": policy_loss + self.value_weight * value_loss,
            "clipped": (clipped > free).float().mean(),
            "values_clipped": (square_near > square).float().mean(),
            "approx_kl": 0.5 * ((logprobs - self.logprobs) ** 2).mean(),
        }


def test_a_ppo_step_on_a_fixed_batch_equals_trls() -> None:
    """Completions of full length, for which both agree; docs/ppo.md lists the differences."""
    full = torch.ones(6, 9, dtype=torch.bool)
    old, reference = -random(6, 9).abs(), -random(6, 9, seed=1).abs()
    values, scores = random(6, 9, seed=2), random(6, seed=3)
    theirs = TrlStep(old, reference, values, scores)

    rewards = arithmetic.kl_penalized_rewards(scores, old, reference, full, theirs.kl_coefficient)
    close(rewards, theirs.rewards)
    raw, returns = arithmetic.gae(
        rewards, values, full, discount=theirs.discount, decay=theirs.decay
    )
    close(returns, theirs.returns)
    advantages = arithmetic.whiten(raw, full)
    close(advantages, theirs.advantages)

    logprobs = old + 0.2 * random(6, 9, seed=4)
    now = values + 0.3 * random(6, 9, seed=5)
    expected = theirs.losses(logprobs, now)
    policy = arithmetic.clipped_policy_loss(logprobs, old, advantages, theirs.clip)
    value = arithmetic.clipped_value_loss(now, values, returns, theirs.value_clip)
    close(policy.loss.mean(), expected["policy"].item())
    close(value.loss.mean(), expected["value"].item())
    total = (policy.loss + theirs.value_weight * value.loss).mean()
    close(total, expected["loss"].item())
    close(policy.clipped.float().mean(), expected["clipped"].item())
    close(value.clipped.float().mean(), expected["values_clipped"].item())
    close(arithmetic.kl_k2(logprobs, old).mean(), expected["approx_kl"].item())


def test_trls_returns_are_ours_on_a_mask_that_is_one_token_longer() -> None:
    """The first difference in docs/ppo.md: TRL adds the score to the pad token after the stop
    token. On a mask that is one token longer, our returns are TRL's."""
    lengths = torch.tensor([3, 5])
    mask = torch.arange(7)[None] < lengths[:, None]
    longer = torch.arange(7)[None] <= lengths[:, None]
    old, reference = (torch.where(mask, -random(2, 7, seed=s).abs(), 1.0) for s in (0, 1))
    values, scores = torch.where(longer, random(2, 7, seed=2), 0.0), random(2, seed=3)

    rewards = -0.05 * (old - reference)
    rewards[torch.arange(2), lengths] += scores  # sequence_lengths + 1 of TRL
    theirs, last = [], torch.zeros(2)
    for t in reversed(range(7)):
        following = values[:, t + 1] if t < 6 else 0.0
        last = rewards[:, t] + following - values[:, t] + 0.95 * last
        theirs.append(last)
    returns = torch.stack(theirs[::-1], dim=1) + values

    ours = arithmetic.kl_penalized_rewards(scores, old, reference, longer, 0.05)
    close(
        arithmetic.gae(ours, values, longer, discount=1.0, decay=0.95)[1],
        torch.where(longer, returns, 0),
    )
    earlier = arithmetic.kl_penalized_rewards(scores, old, reference, mask, 0.05)
    assert not torch.allclose(
        arithmetic.gae(earlier, values, mask, discount=1.0, decay=0.95)[1][0, :3], returns[0, :3]
    )
