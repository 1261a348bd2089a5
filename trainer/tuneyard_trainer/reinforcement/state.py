"""The position of a reinforcement run, as its checkpoints keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tuneyard_trainer.training.checkpoints import LoopState


@dataclass(frozen=True)
class RlState(LoopState):
    """Where the loop stands after `step` updates. `best_loss` is the method's objective on the
    held-out prompts, negated."""

    optimizer_steps: int = 0
    kl_coefficient: float = 0.0
    first_length: float = 0.0
    """Mean length of the first update's answers; 0: there was none yet."""
    truncated: int = 0
    """Updates in a row in which no answer ended."""
    alike: int | None = 0
    """Updates since the start, in none of which a reward differed from one that it is compared
    with; None: one did."""
    stopped: str | None = None
    """Why the run ended early; None: it did not."""
    base: dict[str, float] = field(default_factory=dict)
    """What was measured before the first update."""
    best: dict[str, float] = field(default_factory=dict)
    """What was measured at `best_step`."""
    last: dict[str, float] = field(default_factory=dict)
    """What was measured last."""

    def optimizer_age(self) -> int:
        return self.optimizer_steps

    def measured(self, found: Mapping[str, float]) -> RlState:
        """Return the state after a measurement on the held-out prompts. `found`: its metrics, of
        which `objective` decides what is best."""
        state, objective = replace(self, last=dict(found)), found["objective"]
        if state.best_loss is None or -objective < state.best_loss:
            best = dict(found)
            return replace(state, best_step=state.step, best_loss=-objective, best=best, stale=0)
        return replace(state, stale=state.stale + 1)
