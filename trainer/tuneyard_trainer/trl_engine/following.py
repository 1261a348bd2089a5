"""Following the steps of a trainer with the `Course` of the attempt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuneyard_trainer.data.sharing import any_stops
from tuneyard_trainer.training.checkpoints import LoopState
from tuneyard_trainer.training.course import Course, require_finite
from tuneyard_trainer.training.seeds import derive_seed
from tuneyard_trainer.trl_engine.batches import StepBatches


class Following(TrainerCallback):
    """Follow each step. An exception of the course (a stop request, a loss that is not finite) ends
    the trainer, on all ranks at the same step."""

    def __init__(self, course: Course, state: LoopState, batches: StepBatches) -> None:
        self.course, self.state, self._batches = course, state, batches

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002  the signature of a callback
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        """Make the step's dropout a function of seed, step and worker: a resumed run repeats it."""
        seed, rank = self.course.settings.seed, self.course.worker.rank
        torch.manual_seed(derive_seed(seed, self.state.step, rank))
        return control

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Follow the step that was logged; the log at the end of the run is of no step."""
        if not logs or "loss" not in logs:
            return control
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        require_finite(loss, norm, self.state.step + 1)
        rows = self._batches.taken.pop(0)
        self.state = self.course.follow(
            self.state,
            rows,
            {"loss": loss, **self.other_metrics(logs, len(rows)), "gradientNorm": norm},
            stop=any_stops(self.course.worker),
        )
        if self.course.should_stop_early(self.state):
            control.should_training_stop = True
        return control

    def other_metrics(
        self,
        logs: dict[str, Any],  # noqa: ARG002  of the step
        count: int,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return the means of a step's metrics over its `count` rows, beside its loss and gradient
        norm."""
        return {}
