"""GRPO and RLOO: several completions of each prompt, compared with each other; no value head.

Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300) and REINFORCE leave-one-out
(Ahmadian et al. 2024, arXiv:2402.14740), run by `loop`. Both take one optimizer step on an update's
completions. They differ in three points:

| | advantage of a completion | place of the KL | loss is the mean over |
| --- | --- | --- | --- |
| grpo | (r - mean) / std of its group | in the loss, per token (k3) | tokens of the batch |
| rloo | r - mean of the others in its group | in the reward, per completion (k1) | completions |

`docs/adr/0009-own-loop-for-reinforcement.md` states the reasons for a loop of Tuneyard's own; TRL's
trainers, which `trl_engine` runs, have the same losses. Shapes: B completions of one worker, R of
all workers, T tokens, P prompts, G completions of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tuneyard.api.stage_settings import GrpoSettings
from tuneyard_trainer.reinforcement import arithmetic
from tuneyard_trainer.reinforcement.actor import Scored
from tuneyard_trainer.reinforcement.method import Experience, Loss
from tuneyard_trainer.reinforcement.rollouts import Rollouts


@dataclass(frozen=True)
class GroupMethod:
    """The settings that GRPO and RLOO share: advantages within a group, and no value head."""

    settings: GrpoSettings

    optimization_epochs = 1
    with_values = False
    requires_ends = True
    target_kl = None
    rewards_entropy = False

    @property
    def completions(self) -> int:
        """All completions of an update are one optimizer step, so training is always on-policy."""
        return self.settings.training.batch_size

    @property
    def group_size(self) -> int:
        return self.settings.group_size

    @property
    def with_reference(self) -> bool:
        limits = self.settings.stop_on
        limited = limits is not None and limits.max_kl is not None
        return self.settings.kl_coefficient > 0 or limited


class Grpo(GroupMethod):
    """Group relative policy optimization."""

    loss_metrics = ("policyLoss", "clipFraction", "tokenKl")

    def experience(
        self, rollouts: Rollouts, _kl_coefficient: float, /
    ) -> tuple[Experience, dict[str, float]]:
        """Give all tokens of a completion the same advantage."""
        rewards_PG = rollouts.scores_R.view(-1, self.group_size)
        return _with_advantages(rollouts, rewards_PG, arithmetic.grpo_advantages(rewards_PG))

    def loss(self, now: Scored, then: Experience, /) -> Loss:
        """Return eq. 3 of Shao et al. 2024, negated and summed over the completions' tokens."""
        policy = arithmetic.clipped_policy_loss(
            now.logprobs_BT, then.logprobs_BT, then.advantages_BT, self.settings.clip_range
        )
        kl_BT = arithmetic.kl_k3(now.logprobs_BT, then.reference_BT)
        return Loss.over_tokens(
            policy.loss + self.settings.kl_coefficient * kl_BT,
            {
                "policyLoss": policy.loss,
                "clipFraction": policy.clipped.float(),
                "tokenKl": kl_BT,
            },
            then.mask_BT,
        )

    def divisor(self, lengths: Tensor, /) -> Tensor:
        """Return the tokens of the batch, as DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 8) and TRL
        do. The paper first takes the mean over each completion: the tokens of a long wrong
        completion then count less than those of a short one, so completions grow longer."""
        return lengths.sum()

    def objective(self, metrics: Mapping[str, float], /) -> float:
        """Return the mean reward of a completion less the mean KL of a token."""
        per_token = metrics.get("kl", 0.0) / metrics["completionLength"]
        return metrics["reward"] - self.settings.kl_coefficient * per_token


class Rloo(GroupMethod):
    """REINFORCE leave-one-out."""

    loss_metrics = ("policyLoss", "clipFraction")

    def experience(
        self, rollouts: Rollouts, kl_coefficient: float, /
    ) -> tuple[Experience, dict[str, float]]:
        """Subtract the KL from the reward of a completion (Ahmadian et al. 2024, eq. 2)."""
        rewards_R = rollouts.scores_R
        if rollouts.kl_R is not None:
            rewards_R = rewards_R - kl_coefficient * rollouts.kl_R
        rewards_PG = rewards_R.view(-1, self.group_size)
        return _with_advantages(rollouts, rewards_PG, arithmetic.rloo_advantages(rewards_PG))

    def loss(self, now: Scored, then: Experience, /) -> Loss:
        """Return the loss summed over completions. A completion is one action: the ratio is that of
        the whole completion, clipped as in PPO."""
        mask_BT = then.mask_BT
        now_B = torch.where(mask_BT, now.logprobs_BT, 0.0).sum(1)
        then_B = torch.where(mask_BT, then.logprobs_BT, 0.0).sum(1)
        policy = arithmetic.clipped_policy_loss(
            now_B, then_B, then.advantages_BT[:, 0], self.settings.clip_range
        )
        lengths_B = mask_BT.sum(1)
        return Loss(
            policy.loss.sum(),
            {
                "policyLoss": (policy.loss * lengths_B).sum(),
                "clipFraction": (policy.clipped * lengths_B).sum().float(),
            },
        )

    def divisor(self, lengths: Tensor, /) -> Tensor:
        """Return the number of completions."""
        return torch.tensor(float(len(lengths)), device=lengths.device)

    def objective(self, metrics: Mapping[str, float], /) -> float:
        """Return the mean reward of a completion less its mean KL."""
        return metrics["reward"] - self.settings.kl_coefficient * metrics.get("kl", 0.0)


def _with_advantages(
    rollouts: Rollouts, rewards_PG: Tensor, advantages_PG: Tensor
) -> tuple[Experience, dict[str, float]]:
    """Return each completion's advantage on all of its tokens, and `groupsAlike`: the share of
    groups that give no gradient, since all of their rewards are equal."""
    advantages_B = rollouts.own(advantages_PG.flatten())
    advantages_BT = advantages_B[:, None].expand_as(rollouts.mask_BT)
    same_P = (rewards_PG == rewards_PG[:, :1]).all(1)
    metrics = {"groupsAlike": float(same_P.float().mean())}
    return Experience.of(rollouts, advantages_BT, returns_BT=advantages_BT), metrics
