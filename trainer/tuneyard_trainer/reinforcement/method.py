"""The interface between the reinforcement loop and its methods PPO, GRPO and RLOO.

Shapes: B completions of one worker, T their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tuneyard_trainer.reinforcement.actor import Scored
from tuneyard_trainer.reinforcement.arithmetic import masked_sum
from tuneyard_trainer.reinforcement.rollouts import Rollouts


class Experience(NamedTuple):
    """The data of an update on one worker: its completions, scored by the policy that sampled them;
    (B, T) each."""

    mask_BT: Tensor
    logprobs_BT: Tensor
    reference_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor

    @classmethod
    def of(cls, rollouts: Rollouts, advantages_BT: Tensor, returns_BT: Tensor) -> Experience:
        """Return the rollouts with advantages and returns."""
        return cls(
            mask_BT=rollouts.mask_BT,
            logprobs_BT=rollouts.logprobs_BT,
            reference_BT=rollouts.reference_BT,
            values_BT=rollouts.values_BT,
            advantages_BT=advantages_BT,
            returns_BT=returns_BT,
        )

    def take(self, rows: Sequence[int]) -> Experience:
        """Return some of the completions, as wide as the longest of them."""
        chosen = torch.tensor(rows, device=self.mask_BT.device)
        width = max(1, int(self.mask_BT[chosen].sum(1).max()))
        return Experience(*(x_BT[chosen, :width] for x_BT in self))


class Loss(NamedTuple):
    """The loss of some completions."""

    total: Tensor
    """The sum to minimize, not yet divided by the method's `divisor` (scalar)."""
    metrics: Mapping[str, Tensor]
    """Sums of the metrics over tokens, by the names in the method's `loss_metrics`."""

    @classmethod
    def over_tokens(
        cls, total_BT: Tensor, metrics_BT: Mapping[str, Tensor], mask_BT: Tensor
    ) -> Loss:
        """Return the sums over the tokens under the mask."""
        return cls(
            masked_sum(total_BT, mask_BT),
            {name: masked_sum(x_BT, mask_BT) for name, x_BT in metrics_BT.items()},
        )


class Method(Protocol):
    """The parts in which PPO, GRPO and RLOO differ."""

    @property
    def completions(self) -> int:
        """Completions of an update, over all workers."""
        ...

    @property
    def group_size(self) -> int:
        """Completions of one prompt."""
        ...

    @property
    def optimization_epochs(self) -> int:
        """The number of times that an update trains on its completions."""
        ...

    @property
    def with_values(self) -> bool:
        """Whether the method needs a value head."""
        ...

    @property
    def with_reference(self) -> bool:
        """Whether the method needs the model as it was at the start."""
        ...

    @property
    def requires_ends(self) -> bool:
        """Whether a run fails if all of its completions are truncated."""
        ...

    @property
    def loss_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of `loss`."""
        ...

    @property
    def target_kl(self) -> float | None:
        """The KL that the coefficient adapts to, in nats per completion; None: the coefficient is
        fixed."""
        ...

    @property
    def rewards_entropy(self) -> bool:
        """Whether the loss needs the entropy's gradient."""
        ...

    def experience(
        self, rollouts: Rollouts, kl_coefficient: float, /
    ) -> tuple[Experience, dict[str, float]]:
        """Return the completions with their advantages, and metrics of the advantages."""
        ...

    def loss(self, now: Scored, then: Experience, /) -> Loss:
        """Return the loss of some completions. `now`: their scores by the policy in training.
        `then`: their data at the time of sampling."""
        ...

    def divisor(self, lengths: Tensor, /) -> Tensor:
        """Return the divisor of a minibatch's summed loss (scalar). `lengths`: tokens of each
        completion in the minibatch, over all workers."""
        ...

    def objective(self, metrics: Mapping[str, float], /) -> float:
        """Return the value that the method maximizes, from `Rollouts.metrics`. The best
        checkpoint has the highest value."""
        ...
