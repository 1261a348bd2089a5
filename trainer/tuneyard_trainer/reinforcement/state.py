"""The position of a reinforcement run, as its checkpoints keep it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tuneyard_trainer.training.checkpoints import ADDED, LoopState


@dataclass(frozen=True)
class RlState(LoopState):
    """The position after `step` updates. `best_loss` is the negated objective on the held-out
    prompts."""

    optimizer_steps: int = 0
    kl_coefficient: float = 0.0
    first_length: float = 0.0
    """Mean completion length of the first update, in tokens; 0: there was no update yet."""
    truncated: int = 0
    """Updates in a row in which every completion was truncated."""
    alike: int | None = 0
    """Updates since the start in which all rewards that are compared with each other were equal;
    None: in some update they differed."""
    stopped: str | None = None
    """Reason of an early stop; None: the run did not stop early."""
    base: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first update."""
    best: dict[str, float] = field(default_factory=dict)
    """Held-out metrics at `best_step`."""
    last: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last measurement."""
    first_samples: list[dict[str, Any]] = field(default_factory=list, metadata=ADDED)
    """Completions of the first measurement, for the record."""
    last_samples: list[dict[str, Any]] = field(default_factory=list, metadata=ADDED)
    """Completions of the last measurement; empty after the first."""

    def optimizer_age(self) -> int:
        return self.optimizer_steps

    def measured(
        self, found: Mapping[str, float], samples: Sequence[dict[str, Any]] = ()
    ) -> RlState:
        """Return the state after a measurement with the metrics `found`; the best measurement has
        the highest `objective`."""
        state, objective = replace(self, last=dict(found), unmeasured=False), found["objective"]
        if state.first_samples:
            state = replace(state, last_samples=list(samples))
        else:
            state = replace(state, first_samples=list(samples))
        if state.best_loss is None or -objective < state.best_loss:
            best = dict(found)
            return replace(state, best_step=state.step, best_loss=-objective, best=best, stale=0)
        return replace(state, stale=state.stale + 1)
