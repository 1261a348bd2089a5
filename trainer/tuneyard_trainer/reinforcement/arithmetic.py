"""Formulas of reinforcement learning from rewards, as pure functions of tensors.

Shapes: B completions, T their tokens (padded on the right, `mask_BT` True on a completion's
tokens), P prompts, G completions of each, N positions, V the vocabulary. If workers share a batch,
`reduce` sums a tensor over them, so that a mean is the whole batch's and not a mean of the workers'
means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]

WHITENING_EPSILON = 1e-8
GROUP_EPSILON = 1e-4
"""Added to a group's standard deviation, as in TRL; that of mixed 0s and 1s is about 0.3."""


def single_worker(tensor: Tensor) -> Tensor:
    """Return the tensor: the `Reduce` of a single worker."""
    return tensor


# ---- masked statistics --------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean and variance of the values under a mask, over all workers; scalars."""

    mean: Tensor
    variance: Tensor
    """Unbiased (divided by count - 1); 0 for a single value."""


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the sum of the values under the mask (scalar). Padding may hold anything, even NaN."""
    return torch.where(mask_BT, x_BT, torch.zeros_like(x_BT)).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor, reduce: Reduce = single_worker) -> Tensor:
    """Return the mean of the values under the mask (scalar); 0 if the mask is empty."""
    total, count = reduce(torch.stack([masked_sum(x_BT, mask_BT), mask_BT.sum().to(x_BT.dtype)]))
    return total / count.clamp(min=1)


def masked_moments(x_BT: Tensor, mask_BT: Tensor, reduce: Reduce = single_worker) -> Moments:
    """Return mean and variance, computed in two steps: squares of values that are not centered
    cancel in float32."""
    mean = masked_mean(x_BT, mask_BT, reduce)
    squares = masked_sum((x_BT - mean).square(), mask_BT)
    squares, count = reduce(torch.stack([squares, mask_BT.sum().to(x_BT.dtype)]))
    return Moments(mean, squares / (count - 1).clamp(min=1))


def whiten(
    x_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True, reduce: Reduce = single_worker
) -> Tensor:
    """Return (B, T) with unit variance under the mask and 0 elsewhere; the mean is 0, or unchanged
    without `shift_mean`. PPO's advantages are whitened as in the code of Ziegler et al. 2019
    (arXiv:1909.08593), as Huang et al. 2024 (arXiv:2403.17031) describe it."""
    mean, variance = masked_moments(x_BT, mask_BT, reduce)
    white_BT = (x_BT - mean) * torch.rsqrt(variance + WHITENING_EPSILON)
    white_BT = white_BT if shift_mean else white_BT + mean
    return torch.where(mask_BT, white_BT, torch.zeros_like(white_BT))


def explained_variance(
    values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, reduce: Reduce = single_worker
) -> Tensor:
    """Return 1 - Var[returns - values] / Var[returns] (scalar): 1 for a perfect critic, 0 for a
    constant one, negative for one that is worse than a constant. 0 if the returns do not vary."""
    total = masked_moments(returns_BT, mask_BT, reduce).variance
    residual = masked_moments(returns_BT - values_BT, mask_BT, reduce).variance
    return torch.where(total > 0, 1 - residual / total.clamp(min=1e-12), torch.zeros_like(total))


# ---- probabilities ------------------------------------------------------------------------------


def token_logprobs(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Return the log-probability of each chosen token (N,), in nats."""
    chosen_N = logits_NV.gather(-1, ids_N.unsqueeze(-1)).squeeze(-1)
    return chosen_N - logits_NV.logsumexp(-1)


def entropy(logits_NV: Tensor) -> Tensor:
    """Return the entropy of each position's distribution (N,), in nats:
    log Z - sum_v p_v logit_v."""
    return logits_NV.logsumexp(-1) - (logits_NV.softmax(-1) * logits_NV).sum(-1)


def kl_k1(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """Return log p - log q (B, T): unbiased for KL(p || q) on samples of p, of high variance,
    sometimes negative (Schulman 2020, "Approximating KL Divergence")."""
    return logprobs_BT - reference_BT


def kl_k2(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """Return (log p - log q)^2 / 2 (B, T): never negative, of low variance, biased."""
    return 0.5 * (logprobs_BT - reference_BT).square()


def kl_k3(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """Return q/p - 1 - log(q/p) (B, T): never negative, unbiased, of low variance. GRPO's penalty
    (Shao et al. 2024, eq. 4)."""
    log_ratio_BT = reference_BT - logprobs_BT
    return log_ratio_BT.expm1() - log_ratio_BT


# ---- rewards ------------------------------------------------------------------------------------


def correlation(x_N: Tensor, y_N: Tensor) -> float | None:
    """Return Pearson's correlation, computed in float64; None: one of the variables is constant, or
    not finite."""
    x_N, y_N = x_N.double(), y_N.double()
    if len(x_N) < 2 or bool((x_N == x_N[0]).all()) or bool((y_N == y_N[0]).all()):
        return None
    found = float(torch.corrcoef(torch.stack([x_N, y_N]))[0, 1])
    return found if math.isfinite(found) else None


def ended(last_ids_B: Tensor, stop_ids: Tensor) -> Tensor:
    """Return whether each completion's last token is a stop token (B,); if not, the length limit
    truncated it."""
    return torch.isin(last_ids_B, stop_ids)


def penalize_missing_end(scores_B: Tensor, ended_B: Tensor, penalty: float) -> Tensor:
    """Return the scores (B,), less `penalty` for truncated completions: a reward model is trained
    on complete ones, and its score of a truncated one is noise (the "EOS trick" of Huang et al.
    2024, arXiv:2403.17031)."""
    return torch.where(ended_B, scores_B, scores_B - penalty)


def kl_penalized_rewards(
    scores_B: Tensor,
    logprobs_BT: Tensor,
    reference_BT: Tensor,
    mask_BT: Tensor,
    coefficient: float,
) -> Tensor:
    """Return each token's reward (B, T): -beta (log pi - log pi_ref), and on the last token the
    completion's score too (Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, arXiv:2203.02155,
    eq. 2)."""
    rewards_BT = -coefficient * kl_k1(logprobs_BT, reference_BT)
    rewards_BT = torch.where(mask_BT, rewards_BT, torch.zeros_like(rewards_BT))
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).clamp(min=0)
    return rewards_BT.scatter_add(1, last_B1, scores_B.unsqueeze(1).to(rewards_BT.dtype))


# ---- advantages ---------------------------------------------------------------------------------


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, discount: float, decay: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, each (B, T), 0 outside the mask (Schulman et al. 2016,
    arXiv:1506.02438).

    A_t = sum_l (gamma lambda)^l delta_{t+l} (eq. 16) with delta_t = r_t + gamma V_{t+1} - V_t, and
    V = 0 after a completion's last token; the return is A_t + V_t.
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
    # Padding is on the right, where reward and value are 0, so advantages are 0 there.
    advantages_BT = torch.stack(backwards[::-1], dim=1)
    return advantages_BT, advantages_BT + values_BT


def rloo_advantages(rewards_PG: Tensor) -> Tensor:
    """Return each completion's reward less the mean of the others in its group (P, G): G / (G - 1)
    times the distance from the group's mean (Ahmadian et al. 2024, arXiv:2402.14740)."""
    size = rewards_PG.shape[1]
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) * (size / (size - 1))


def grpo_advantages(rewards_PG: Tensor) -> Tensor:
    """Return (r - mean) / std in each group (P, G) (Shao et al. 2024, arXiv:2402.03300, section
    4.1.2); 0 if all rewards of a group are equal."""
    centered_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return centered_PG / (rewards_PG.std(1, keepdim=True) + GROUP_EPSILON)


# ---- losses -------------------------------------------------------------------------------------


class Clipped(NamedTuple):
    """A clipped loss, by element."""

    loss: Tensor
    clipped: Tensor
    """True if the clipped term is the larger one; its gradient is 0."""


def clipped_policy_loss(
    logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, clip_range: float
) -> Clipped:
    """Return -min(rho A, clip(rho, 1 - eps, 1 + eps) A) with rho = pi / pi_old (Schulman et al.
    2017, arXiv:1707.06347, eq. 7, negated). Any shape: (B,) for whole completions."""
    ratio_BT = (logprobs_BT - old_BT).exp()
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_range, 1 + clip_range)
    return Clipped(torch.maximum(unclipped_BT, clipped_BT), clipped_BT > unclipped_BT)


def clipped_value_loss(
    values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, clip_range: float
) -> Clipped:
    """Return max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2, as in the code of
    Schulman et al. 2017 (OpenAI Baselines, ppo2); the paper has the plain square (eq. 9)."""
    near_BT = old_BT + (values_BT - old_BT).clamp(-clip_range, clip_range)
    unclipped_BT = (values_BT - returns_BT).square()
    clipped_BT = (near_BT - returns_BT).square()
    return Clipped(0.5 * torch.maximum(unclipped_BT, clipped_BT), clipped_BT > unclipped_BT)


# ---- the KL coefficient -------------------------------------------------------------------------


def adapted_coefficient(
    coefficient: float, kl: float, target: float | None, *, gain: float = 0.1, bound: float = 0.2
) -> float:
    """Return the next update's beta, by proportional control in log space (Ziegler et al. 2019,
    section 2.2): e = clip((KL - target) / target, -0.2, 0.2), beta' = beta (1 + 0.1 e).

    `kl`: the KL of this update, in nats per completion. `target`: in the same unit; None: beta is
    fixed.
    """
    if target is None:
        return coefficient
    error = min(bound, max(-bound, (kl - target) / target))
    return coefficient * (1 + gain * error)
