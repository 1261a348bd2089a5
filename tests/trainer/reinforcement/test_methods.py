"""Losses of PPO, GRPO and RLOO on a fixed batch, against TRL's formulas and plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.speaking import grpo_stage, ppo_stage
from tuneyard.api.stage_settings import GrpoSettings, PpoSettings
from tuneyard_trainer.reinforcement import arithmetic
from tuneyard_trainer.reinforcement.actor import Scored, Sequences
from tuneyard_trainer.reinforcement.group_methods import Grpo, Rloo
from tuneyard_trainer.reinforcement.method import Experience
from tuneyard_trainer.reinforcement.ppo import Ppo
from tuneyard_trainer.reinforcement.rollouts import Rollouts

LENGTHS = [5, 1, 3, 7, 2, 4]
MASK = torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]
GROUPS = {"group_size": 3, "kl_coefficient": 0.2}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(x_BT: Tensor) -> Tensor:
    return torch.where(MASK, x_BT, torch.zeros_like(x_BT))


OLD, REFERENCE = masked(-noise(6, 7, seed=0).abs()), masked(-noise(6, 7, seed=1).abs())
VALUES, SCORES = masked(noise(6, 7, seed=2)), noise(6, seed=3)
NEW = masked(OLD + 0.2 * noise(6, 7, seed=4))
ENTROPY, NOW_VALUES = masked(noise(6, 7, seed=5).abs()), masked(VALUES + 0.3 * noise(6, 7, seed=6))


def rollouts(**changes: Any) -> Rollouts:
    given: dict[str, Any] = {
        "owned": list(range(6)),
        "sequences": Sequences([], []),
        "mask_BT": MASK,
        "logprobs_BT": OLD,
        "values_BT": VALUES,
        "reference_BT": REFERENCE,
        "scores_R": SCORES,
        "ended_R": torch.tensor([True, True, False, True, False, True]),
        "lengths_R": torch.tensor(LENGTHS, dtype=torch.float32),
        "kl_R": (OLD - REFERENCE).sum(1),
        "entropy_R": torch.ones(6),
        "gap_R": torch.zeros(len(LENGTHS)),
        "seconds": {},
        "completions": [],
    }
    return Rollouts(**(given | changes))


def grpo() -> Grpo:
    settings = grpo_stage(**GROUPS).settings
    assert isinstance(settings, GrpoSettings)
    return Grpo(settings)


def rloo() -> Rloo:
    settings = grpo_stage(estimator="rloo", **GROUPS).settings
    assert isinstance(settings, GrpoSettings)
    return Rloo(settings)


def mean_loss(method: Any, experience: Experience) -> float:
    loss = method.loss(Scored(NEW, ENTROPY, NOW_VALUES), experience)
    return float(loss.total / method.divisor(torch.tensor(LENGTHS, dtype=torch.float32)))


def test_the_loss_of_grpo_is_trls_with_the_kl_term() -> None:
    """GRPOTrainer of TRL 1.16 with loss_type "dapo", importance sampling by token, beta 0.2."""
    experience, _ = grpo().experience(rollouts(), 0.2)
    grouped = SCORES.view(-1, 3)
    mean = grouped.mean(1).repeat_interleave(3)
    deviation = grouped.std(1).repeat_interleave(3)
    advantages = ((SCORES - mean) / (deviation + 1e-4))[:, None]
    ratio = torch.exp(NEW - OLD)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    per_token_kl = torch.exp(REFERENCE - NEW) - (REFERENCE - NEW) - 1
    per_token = -torch.min(ratio * advantages, clipped * advantages) + 0.2 * per_token_kl
    expected = (per_token * MASK).sum() / MASK.sum()
    assert mean_loss(grpo(), experience) == pytest.approx(expected.item(), abs=1e-5)


def test_the_loss_of_rloo_is_trls_over_whole_completions() -> None:
    """RLOOTrainer of TRL 1.16: KL in the reward, sequence ratios, mean over completions."""
    experience, _ = rloo().experience(rollouts(), 0.2)
    rewards = SCORES - 0.2 * ((OLD - REFERENCE) * MASK).sum(1)
    grouped = rewards.view(-1, 3)
    baseline = (grouped.sum(1, keepdim=True) - grouped) / 2
    advantages = rewards - baseline.view(-1)
    ratio = torch.exp((NEW * MASK).sum(1) - (OLD * MASK).sum(1))
    clipped = torch.clamp(ratio, 0.8, 1.2)
    expected = -torch.min(ratio * advantages, clipped * advantages).mean()
    assert mean_loss(rloo(), experience) == pytest.approx(expected.item(), abs=1e-5)


def test_the_loss_of_ppo_equals_a_plain_loop_over_tokens() -> None:
    settings = ppo_stage(entropy_coefficient=0.01, missing_eos_penalty=0.5).settings
    assert isinstance(settings, PpoSettings)
    method = Ppo(settings)
    experience, metrics = method.experience(rollouts(), 0.3)
    raw, returns, flat = {}, {}, []
    for b, length in enumerate(LENGTHS):
        score = SCORES[b].item() - (0.5 if b in (2, 4) else 0.0)
        rewards = [-0.3 * (OLD[b, t] - REFERENCE[b, t]).item() for t in range(length)]
        rewards[-1] += score
        advantage, following = 0.0, 0.0
        for t in reversed(range(length)):
            value = VALUES[b, t].item()
            advantage = rewards[t] + following - value + 0.95 * advantage
            raw[b, t], returns[b, t], following = advantage, advantage + value, value
            flat.append(advantage)
    mean = sum(flat) / len(flat)
    variance = sum((a - mean) ** 2 for a in flat) / (len(flat) - 1)
    total = 0.0
    for (b, t), advantage in raw.items():
        white = (advantage - mean) / math.sqrt(variance + 1e-8)
        ratio = math.exp((NEW[b, t] - OLD[b, t]).item())
        policy = -min(ratio * white, max(0.8, min(1.2, ratio)) * white)
        now, was = NOW_VALUES[b, t].item(), VALUES[b, t].item()
        near = max(was - 0.2, min(was + 0.2, now))
        value = 0.5 * max((now - returns[b, t]) ** 2, (near - returns[b, t]) ** 2)
        total += policy + 0.1 * value - 0.01 * ENTROPY[b, t].item()
    assert mean_loss(method, experience) == pytest.approx(total / len(raw), abs=1e-5)
    assert metrics["penalizedReward"] == pytest.approx(SCORES.mean().item() - 0.5 * 2 / 6, abs=1e-5)


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_values_in_the_padding_change_no_loss_and_no_gradient(method: str) -> None:
    stage = ppo_stage().settings
    assert isinstance(stage, PpoSettings)
    chosen = {"ppo": Ppo(stage), "grpo": grpo(), "rloo": rloo()}[method]
    experience, _ = chosen.experience(rollouts(), 0.2)
    found = []
    for filling in (0.0, 7.0):
        logprobs = torch.where(MASK, NEW, torch.full_like(NEW, filling)).requires_grad_()
        loss = chosen.loss(Scored(logprobs, ENTROPY, NOW_VALUES), experience).total
        loss.backward()
        assert logprobs.grad is not None
        assert not logprobs.grad[~MASK].any()
        found.append((loss.item(), logprobs.grad[MASK]))
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_group_with_equal_rewards_has_no_advantage_and_is_counted() -> None:
    same = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    experience, metrics = grpo().experience(rollouts(scores_R=same), 0.2)
    assert metrics == {"groupsAlike": 0.5}
    assert not experience.advantages_BT[:3].any()
    assert experience.advantages_BT[3:].any()


def test_some_of_the_completions_are_as_wide_as_the_longest_of_them() -> None:
    experience, _ = grpo().experience(rollouts(), 0.2)
    part = experience.take([1, 2])
    assert part.mask_BT.tolist() == [[True, False, False], [True, True, True]]
    assert torch.equal(part.logprobs_BT, OLD[[1, 2], :3])


def test_the_metrics_of_an_update() -> None:
    metrics = rollouts(entropy_R=torch.tensor([5.0, 1, 3, 7, 2, 4])).metrics()
    assert metrics["entropy"] == pytest.approx(1.0)
    assert metrics["completionLength"] == pytest.approx(22 / 6)
    assert metrics["endedShare"] == pytest.approx(4 / 6)
    assert metrics["kl"] == pytest.approx(
        arithmetic.kl_k1(OLD, REFERENCE).sum().item() / 6, abs=1e-5
    )


def test_the_objective_of_each_method_is_what_its_loss_maximizes() -> None:
    """The KL of a completion for PPO and RLOO, of a token for GRPO."""
    metrics = {"reward": 3.0, "kl": 4.0, "completionLength": 8.0}
    settings = ppo_stage(kl_coefficient=0.1).settings
    assert isinstance(settings, PpoSettings)
    assert Ppo(settings).objective(metrics) == pytest.approx(3 - 0.1 * 4)
    assert rloo().objective(metrics) == pytest.approx(3 - 0.2 * 4)
    assert grpo().objective(metrics) == pytest.approx(3 - 0.2 * 0.5)
