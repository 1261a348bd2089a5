"""Stage ppo: proximal policy optimization against a reward (Schulman et al. 2017,
arXiv:1707.06347), as language models are aligned with it (Ziegler et al. 2019, arXiv:1909.08593;
Ouyang et al. 2022, arXiv:2203.02155).

An update, run by `loop`:

1. Sample a completion of each prompt and score it (`rollouts`).
2. Reward each token with -beta (log pi - log pi_ref), and the last one with the score too.
3. Compute advantages by GAE over the value head's estimates; whiten them over the whole batch.
4. Train for some epochs of minibatches on: clipped policy loss + c_v clipped value loss
   - c_e entropy.
5. Adapt beta towards the target KL.

`docs/ppo.md` lists the differences from TRL's last PPOTrainer and their reasons. Shapes: B
completions of one worker, R of all workers, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tuneyard.api.stage_settings import PpoSettings
from tuneyard_trainer.reinforcement import arithmetic, loop
from tuneyard_trainer.reinforcement.actor import Scored
from tuneyard_trainer.reinforcement.method import Experience, Loss
from tuneyard_trainer.reinforcement.rollouts import Rollouts
from tuneyard_trainer.worker import StageContext, StageOutcome


def run(context: StageContext) -> StageOutcome:
    """Train and write `weights/` (an adapter or a whole model) and `metrics.jsonl`."""
    settings = context.settings(PpoSettings)
    return loop.run(context, settings, Ppo(settings))


@dataclass(frozen=True)
class Ppo:
    """Proximal policy optimization."""

    settings: PpoSettings

    group_size = 1
    with_values = True
    with_reference = True
    loss_metrics = (
        "policyLoss",
        "valueLoss",
        "clipFraction",
        "valueClipFraction",
        "approximateKl",
    )

    @property
    def completions(self) -> int:
        return self.settings.rollouts

    @property
    def optimization_epochs(self) -> int:
        return self.settings.optimization_epochs

    @property
    def target_kl(self) -> float | None:
        """The target of step 5, which is `arithmetic.adapted_coefficient`."""
        return self.settings.target_kl

    @property
    def rewards_entropy(self) -> bool:
        return self.settings.entropy_coefficient > 0

    @property
    def requires_ends(self) -> bool:
        return self.settings.missing_eos_penalty > 0

    def experience(
        self, rollouts: Rollouts, kl_coefficient: float, /
    ) -> tuple[Experience, dict[str, float]]:
        """Carry out steps 2 and 3 of the update."""
        scores_R = arithmetic.penalize_missing_end(
            rollouts.scores_R, rollouts.ended_R, self.settings.missing_eos_penalty
        )
        mask_BT = rollouts.mask_BT
        rewards_BT = arithmetic.kl_penalized_rewards(
            rollouts.own(scores_R),
            rollouts.logprobs_BT,
            rollouts.reference_BT,
            mask_BT,
            kl_coefficient,
        )
        advantages_BT, returns_BT = arithmetic.gae(
            rewards_BT,
            rollouts.values_BT,
            mask_BT,
            discount=self.settings.discount,
            decay=self.settings.gae_lambda,
        )
        reduce = rollouts.reduce
        explained = arithmetic.explained_variance(rollouts.values_BT, returns_BT, mask_BT, reduce)
        whitened_BT = arithmetic.whiten(advantages_BT, mask_BT, reduce=reduce)
        return Experience.of(rollouts, whitened_BT, returns_BT), {
            "explainedVariance": float(explained),
            "penalizedReward": float(scores_R.mean()),
            "return": float(arithmetic.masked_mean(returns_BT, mask_BT, reduce)),
        }

    def loss(self, now: Scored, then: Experience, /) -> Loss:
        """Return the loss of step 4, summed over the completions' tokens (Schulman et al. 2017, eq.
        9, negated). The rewards already include the KL penalty."""
        settings = self.settings
        policy = arithmetic.clipped_policy_loss(
            now.logprobs_BT, then.logprobs_BT, then.advantages_BT, settings.clip_range
        )
        value = arithmetic.clipped_value_loss(
            now.values_BT, then.values_BT, then.returns_BT, settings.value_clip_range
        )
        total_BT = (
            policy.loss
            + settings.value_coefficient * value.loss
            - settings.entropy_coefficient * now.entropy_BT
        )
        metrics_BT = {
            "policyLoss": policy.loss,
            "valueLoss": value.loss,
            "clipFraction": policy.clipped.float(),
            "valueClipFraction": value.clipped.float(),
            "approximateKl": arithmetic.kl_k2(now.logprobs_BT, then.logprobs_BT),
        }
        return Loss.over_tokens(total_BT, metrics_BT, then.mask_BT)

    def divisor(self, lengths: Tensor, /) -> Tensor:
        """Return the tokens of the minibatch: each token has the same weight, however long its
        completion is."""
        return lengths.sum()

    def objective(self, metrics: Mapping[str, float], /) -> float:
        """Return the mean reward of a completion less its mean KL, at the coefficient's first
        value."""
        return metrics["reward"] - self.settings.kl_coefficient * metrics["kl"]
