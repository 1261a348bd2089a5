"""Where the loop of reinforcement meets its methods: what they make of answers.

Shapes: B answers of one worker, T their tokens.
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
    """What a method optimises on: this worker's answers, as they were when sampled."""

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

    def take(self, chosen: Sequence[int]) -> Experience:
        """Some of the answers, as wide as the longest of them."""
        rows = torch.tensor(chosen, device=self.mask_BT.device)
        width = max(1, int(self.mask_BT[rows].sum(1).max()))
        return Experience(*(x_BT[rows, :width] for x_BT in self))


class Loss(NamedTuple):
    """Of some answers."""

    total: Tensor
    """The sum to minimise, before it is divided by the method's `divisor`."""
    watched: Mapping[str, Tensor]
    """Sums over the answers' tokens of what is watched per token."""

    @classmethod
    def over_tokens(
        cls, total_BT: Tensor, watched_BT: Mapping[str, Tensor], mask_BT: Tensor
    ) -> Loss:
        """Return the sums over the tokens under the mask."""
        return cls(
            masked_sum(total_BT, mask_BT),
            {name: masked_sum(x_BT, mask_BT) for name, x_BT in watched_BT.items()},
        )


class Method(Protocol):
    """What PPO, GRPO and RLOO differ in."""

    @property
    def answers(self) -> int:
        """Answers of an update, over all workers."""
        ...

    @property
    def group_size(self) -> int:
        """Answers to one prompt."""
        ...

    @property
    def optimization_epochs(self) -> int:
        """Passes over an update's answers."""
        ...

    @property
    def with_values(self) -> bool:
        """Whether it needs a value head."""
        ...

    @property
    def with_reference(self) -> bool:
        """Whether it needs the model as it was at the start."""
        ...

    @property
    def ends_matter(self) -> bool:
        """Whether a run in which no answer ever ends is a failed one."""
        ...

    @property
    def watched(self) -> tuple[str, ...]:
        """The names that `loss` watches."""
        ...

    @property
    def target_kl(self) -> float | None:
        """What the KL coefficient is adapted towards, in nats per answer; None: it is fixed."""
        ...

    @property
    def rewards_entropy(self) -> bool:
        """Whether the loss needs the entropy's gradient."""
        ...

    def experience(
        self, rollouts: Rollouts, kl_coefficient: float, /
    ) -> tuple[Experience, dict[str, float]]:
        """The answers with their advantages, and what is watched of these."""
        ...

    def loss(self, now: Scored, then: Experience, /) -> Loss:
        """Of some answers, as they are now against as they were."""
        ...

    def divisor(self, lengths: Tensor, /) -> Tensor:
        """What a minibatch's summed loss is divided by; `lengths`: of all of its answers."""
        ...

    def objective(self, watched: Mapping[str, float], /) -> float:
        """What it makes larger, of a policy's answers as `Rollouts.watched` tells of them: the best
        checkpoint has the most."""
        ...
