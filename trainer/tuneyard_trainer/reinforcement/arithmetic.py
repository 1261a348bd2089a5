"""The arithmetic of reinforcement learning from rewards, and nothing else.

Pure functions of tensors: no model, no state, no randomness. Shapes: B answers, T their tokens
(padded on the right, `mask_BT` True on an answer's own tokens), P prompts, G answers to each, N
positions, V the vocabulary. Where workers share a batch, `reduce` sums a tensor over them, so that
a mean is the whole batch's and not a mean of the workers' means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]

WHITENING_EPSILON = 1e-8
GROUP_EPSILON = 1e-4
"""Added to a group's standard deviation, as TRL does: mixed 0s and 1s deviate by 0.3 or so."""


def alone(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single worker."""
    return tensor


# ---- masked statistics --------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of the values under a mask, over all workers; scalars."""

    mean: Tensor
    variance: Tensor
    """Unbiased (divided by count - 1); 0 of a single value."""


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The sum of the values under the mask (scalar). Padding may hold anything, NaN included."""
    return torch.where(mask_BT, x_BT, torch.zeros_like(x_BT)).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor, reduce: Reduce = alone) -> Tensor:
    """The mean of the values under the mask (scalar); 0 where the mask is empty."""
    total, count = reduce(torch.stack([masked_sum(x_BT, mask_BT), mask_BT.sum().to(x_BT.dtype)]))
    return total / count.clamp(min=1)


def masked_moments(x_BT: Tensor, mask_BT: Tensor, reduce: Reduce = alone) -> Moments:
    """Mean and variance in two passes: the squares of uncentred values cancel in float32."""
    mean = masked_mean(x_BT, mask_BT, reduce)
    squares = masked_sum((x_BT - mean).square(), mask_BT)
    squares, count = reduce(torch.stack([squares, mask_BT.sum().to(x_BT.dtype)]))
    return Moments(mean, squares / (count - 1).clamp(min=1))


def whiten(
    x_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True, reduce: Reduce = alone
) -> Tensor:
    """(B, T) with unit variance under the mask, 0 elsewhere; mean 0, or, without `shift_mean`, the
    mean that it had. PPO's advantages are whitened as in the code of Ziegler et al. 2019
    (arXiv:1909.08593; Huang et al. 2024, arXiv:2403.17031, tell how)."""
    mean, variance = masked_moments(x_BT, mask_BT, reduce)
    white_BT = (x_BT - mean) * torch.rsqrt(variance + WHITENING_EPSILON)
    white_BT = white_BT if shift_mean else white_BT + mean
    return torch.where(mask_BT, white_BT, torch.zeros_like(white_BT))


def explained_variance(
    values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, reduce: Reduce = alone
) -> Tensor:
    """1 - Var[returns - values] / Var[returns] (scalar): 1 of a perfect critic, 0 of a constant,
    negative of one that is worse than none. 0 where the returns do not vary."""
    total = masked_moments(returns_BT, mask_BT, reduce).variance
    left = masked_moments(returns_BT - values_BT, mask_BT, reduce).variance
    return torch.where(total > 0, 1 - left / total.clamp(min=1e-12), torch.zeros_like(total))


# ---- probabilities ------------------------------------------------------------------------------


def token_logprobs(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """(N,) log-probability of each chosen token, in nats."""
    chosen_N = logits_NV.gather(-1, ids_N.unsqueeze(-1)).squeeze(-1)
    return chosen_N - logits_NV.logsumexp(-1)


def entropy(logits_NV: Tensor) -> Tensor:
    """(N,) entropy of each position's distribution, in nats: log Z - sum_v p_v logit_v."""
    return logits_NV.logsumexp(-1) - (logits_NV.softmax(-1) * logits_NV).sum(-1)


def kl_k1(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """(B, T) log p - log q: unbiased for KL(p || q) on samples of p, of high variance, negative at
    times (Schulman 2020, "Approximating KL Divergence")."""
    return logprobs_BT - reference_BT


def kl_k2(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """(B, T) (log p - log q)^2 / 2: never negative, of low variance, biased to second order."""
    return 0.5 * (logprobs_BT - reference_BT).square()


def kl_k3(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """(B, T) q/p - 1 - log(q/p): never negative, unbiased, of low variance. GRPO's penalty (Shao et
    al. 2024, eq. 4)."""
    log_ratio_BT = reference_BT - logprobs_BT
    return log_ratio_BT.expm1() - log_ratio_BT


# ---- rewards ------------------------------------------------------------------------------------


def ended(last_ids_B: Tensor, stop_ids: Tensor) -> Tensor:
    """(B,) whether an answer's last token is one that stops it, or the length limit did."""
    return torch.isin(last_ids_B, stop_ids)


def without_end_penalised(scores_B: Tensor, ended_B: Tensor, penalty: float) -> Tensor:
    """(B,) the scores, less `penalty` where an answer was cut off by the length limit: a reward
    model judges whole answers, and what it says of a torso is noise (the "EOS trick" of Huang et
    al. 2024, arXiv:2403.17031)."""
    return torch.where(ended_B, scores_B, scores_B - penalty)


def penalised_rewards(
    scores_B: Tensor,
    logprobs_BT: Tensor,
    reference_BT: Tensor,
    mask_BT: Tensor,
    coefficient: float,
) -> Tensor:
    """(B, T) each token's reward: -beta (log pi - log pi_ref), and the answer's score on its last
    token (Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""
    rewards_BT = -coefficient * kl_k1(logprobs_BT, reference_BT)
    rewards_BT = torch.where(mask_BT, rewards_BT, torch.zeros_like(rewards_BT))
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).clamp(min=0)
    return rewards_BT.scatter_add(1, last_B1, scores_B.unsqueeze(1).to(rewards_BT.dtype))


# ---- advantages ---------------------------------------------------------------------------------


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, discount: float, decay: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each (B, T), 0 outside the mask (Schulman et al. 2016,
    arXiv:1506.02438).

    A_t = sum_l (gamma lambda)^l delta_{t+l} (eq. 16) with delta_t = r_t + gamma V_{t+1} - V_t, and
    V = 0 after an answer's last token; the return is A_t + V_t.
    """
    values_BT = torch.where(mask_BT, values_BT, torch.zeros_like(values_BT))
    rewards_BT = torch.where(mask_BT, rewards_BT, torch.zeros_like(rewards_BT))
    next_value_B = torch.zeros_like(values_BT[:, 0])
    advantage_B = torch.zeros_like(next_value_B)
    backwards: list[Tensor] = []
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + discount * next_value_B - values_BT[:, t]
        advantage_B = delta_B + discount * decay * advantage_B
        backwards.append(advantage_B)
        next_value_B = values_BT[:, t]
    # Padding is on the right, where reward and value are 0: what passes through it stays 0.
    advantages_BT = torch.stack(backwards[::-1], dim=1)
    return advantages_BT, advantages_BT + values_BT


def rloo_advantages(rewards_PG: Tensor) -> Tensor:
    """(P, G) each answer's reward less the mean of its siblings' (Ahmadian et al. 2024,
    arXiv:2402.14740: the RLOO estimator), G / (G - 1) times the distance from the group's mean."""
    size = rewards_PG.shape[1]
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) * (size / (size - 1))


def grpo_advantages(rewards_PG: Tensor) -> Tensor:
    """(P, G) (r - mean) / std in each group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2);
    0 where all answers of a group earn the same."""
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return centred_PG / (rewards_PG.std(1, keepdim=True) + GROUP_EPSILON)


# ---- losses -------------------------------------------------------------------------------------


class Clipped(NamedTuple):
    """A clipped loss, element by element."""

    loss: Tensor
    bound: Tensor
    """True where the clip decides, so that no gradient flows."""


def clipped_policy_loss(
    logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, clip_range: float
) -> Clipped:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A) with rho = pi / pi_old (Schulman et al. 2017,
    arXiv:1707.06347, eq. 7, negated: to be minimised). Any shape; B alone for whole answers."""
    ratio_BT = (logprobs_BT - old_BT).exp()
    free_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_range, 1 + clip_range)
    return Clipped(torch.maximum(free_BT, clipped_BT), clipped_BT > free_BT)


def clipped_value_loss(
    values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, clip_range: float
) -> Clipped:
    """max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2, as in the code of Schulman et
    al. 2017 (OpenAI Baselines, ppo2); the paper has the plain square (eq. 9)."""
    near_BT = old_BT + (values_BT - old_BT).clamp(-clip_range, clip_range)
    free_BT = (values_BT - returns_BT).square()
    clipped_BT = (near_BT - returns_BT).square()
    return Clipped(0.5 * torch.maximum(free_BT, clipped_BT), clipped_BT > free_BT)


# ---- the KL coefficient -------------------------------------------------------------------------


def adapted_coefficient(
    coefficient: float, kl: float, target: float | None, *, gain: float = 0.1, bound: float = 0.2
) -> float:
    """The next update's beta. None: fixed. Else proportional control in log space (Ziegler et al.
    2019, section 2.2): e = clip((KL - target) / target, -0.2, 0.2), beta' = beta (1 + 0.1 e).

    `kl`: what this update's answers had, in nats per answer, as is the target.
    """
    if target is None:
        return coefficient
    error = min(bound, max(-bound, (kl - target) / target))
    return coefficient * (1 + gain * error)
