"""The losses of reward models, DPO, its variants and KTO, as functions of tensors alone.

Shapes: G groups (pairs, rankings), K places of the longest ranking, P pairs, N single completions.
Every function returns one loss for each group, pair or completion.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down"]


# ---- reward models ------------------------------------------------------------------------------


def ranking_loss(scores_GK: Tensor, sizes_G: Tensor, margin: float = 0.0) -> Tensor:
    """Return the negative log-likelihood of each ranking (G,), best first, under the Plackett-Luce
    model (Plackett 1975; Rafailov et al. 2023, arXiv:2305.18290, eq. 18).

        -log prod_k exp(s_k) / sum_{j >= k} exp(s_j)

    With two places it is Bradley-Terry, -log sigmoid(s_1 - s_2) (Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1). The margin is subtracted from the chosen score at each place (Touvron
    et al. 2023, arXiv:2307.09288, eq. 2). Places from `sizes_G` on are ignored.
    """
    places_K = torch.arange(scores_GK.shape[1], device=scores_GK.device)
    empty_GK = places_K[None, :] >= sizes_G[:, None]
    scores_GK = scores_GK.masked_fill(empty_GK, -torch.inf)
    # log-sum-exp of the places after each one; -inf after the last.
    after_GK = torch.logcumsumexp(scores_GK.flip(1), dim=1).flip(1).roll(-1, dims=1)
    after_GK = after_GK.masked_fill(places_K[None, :] >= sizes_G[:, None] - 1, -torch.inf)
    chosen_GK = scores_GK.masked_fill(empty_GK, 0.0) - margin
    last_GK = after_GK.isinf()
    loss_GK = F.softplus(after_GK.masked_fill(last_GK, 0.0) - chosen_GK)
    return loss_GK.masked_fill(last_GK, 0.0).sum(dim=1)


def reward_loss(
    scores_GK: Tensor, sizes_G: Tensor, labels_G: Tensor, *, margin: float, centering: float
) -> Tensor:
    """Return the loss of a reward model (G,).

    `labels_G`: the probability that the order is right. Below 1, which only pairs have, the loss is
    the cross-entropy of the label. `centering`: the weight of the mean square of the sum of two
    rewards of a group (Eisenstein et al. 2023, arXiv:2312.09244), which pulls rewards to zero.
    """
    loss_G = ranking_loss(scores_GK, sizes_G, margin)
    if bool((labels_G < 1).any()):
        swapped_GK = scores_GK.clone()
        swapped_GK[:, :2] = scores_GK[:, :2].flip(1)
        loss_G = labels_G * loss_G + (1 - labels_G) * ranking_loss(swapped_GK, sizes_G, margin)
    if centering:
        loss_G = loss_G + centering * _square_of_sums(scores_GK, sizes_G)
    return loss_G


def _square_of_sums(scores_GK: Tensor, sizes_G: Tensor) -> Tensor:
    """Return the mean of (s_i + s_j)^2 over the pairs i < j of each group (G,)."""
    places_K = torch.arange(scores_GK.shape[1], device=scores_GK.device)
    filled_GK = places_K[None, :] < sizes_G[:, None]
    pairs_GKK = (filled_GK[:, :, None] & filled_GK[:, None, :]).triu(diagonal=1)
    sums_GKK = (scores_GK[:, :, None] + scores_GK[:, None, :]).masked_fill(~pairs_GKK, 0.0)
    return sums_GKK.square().sum(dim=(1, 2)) / pairs_GKK.sum(dim=(1, 2))


# ---- DPO, its variants and KTO ------------------------------------------------------------------


def pair_loss(
    kind: PairLoss,
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    labels_P: Tensor | None = None,
) -> Tensor:
    """Return the loss of each pair (P,), as TRL 1.16's DPOTrainer computes it.

    `chosen_P`, `rejected_P`: log pi(y|x) - log ref(y|x), the policy's log-ratio to the reference,
    summed over tokens, or averaged for ipo. `labels_P`: the probability that the order is right;
    the loss is the expectation over both orders. None: the order is right.
    """
    loss_P = _ordered(kind, chosen_P, rejected_P, beta, label_smoothing)
    if labels_P is None:
        return loss_P
    swapped_P = _ordered(kind, rejected_P, chosen_P, beta, label_smoothing)
    return labels_P * loss_P + (1 - labels_P) * swapped_P


def _ordered(
    kind: PairLoss, chosen_P: Tensor, rejected_P: Tensor, beta: float, smoothing: float
) -> Tensor:
    margin_P = beta * (chosen_P - rejected_P)
    right_P, wrong_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
    if kind == "sigmoid":  # Rafailov et al. 2023, eq. 7; smoothed: cDPO (Mitchell 2023)
        return (1 - smoothing) * right_P + smoothing * wrong_P
    if kind == "robust":  # Chowdhury et al. 2024 (arXiv:2403.00409)
        return ((1 - smoothing) * right_P - smoothing * wrong_P) / (1 - 2 * smoothing)
    if kind == "ipo":  # Azar et al. 2023 (arXiv:2310.12036), eq. 17
        return (chosen_P - rejected_P - 1 / (2 * beta)).square()
    if kind == "hinge":  # Zhao et al. 2023 (arXiv:2305.10425), at beta's scale
        return torch.relu(1 - margin_P)
    if kind == "apo_zero":  # D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7
        return 1 - torch.sigmoid(beta * chosen_P) + torch.sigmoid(beta * rejected_P)
    if kind == "apo_down":  # ibid., eq. 8
        return torch.sigmoid(beta * chosen_P) + 1 - torch.sigmoid(margin_P)
    raise ValueError(f"unknown loss {kind}")


def kto_loss(ratios_N: Tensor, good_N: Tensor, kl: Tensor, *, beta: float) -> Tensor:
    """Return the loss of each completion (N,): one minus its value against the reference point
    `kl` (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    `ratios_N`: log pi(y|x) - log ref(y|x). `good_N`: True for a good completion. `kl`: the policy's
    divergence from the reference on completions of other prompts; it gets no gradient.
    """
    gain_N = beta * (ratios_N - kl.detach().clamp(min=0))
    return 1 - torch.sigmoid(torch.where(good_N, gain_N, -gain_N))
