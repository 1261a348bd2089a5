"""The interface of a tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol

from tuneyard.api.plan import PlannedStage, StageRecord
from tuneyard_trainer.tracking.state import TrackerState
from tuneyard_trainer.tracking.steps import Step

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """One place that shows a run. One thread calls it. After any error it is opened again, and what
    was added since the last `flush` is added again: it must show that once."""

    name: str
    """Of its state in the output, and of its field in the manifest."""
    title: str
    """For users."""
    place: str
    """Decides, with the state's id, which run is continued."""

    def environment(self) -> AbstractContextManager[None]:
        """Return a context for the whole attempt. Raises StageError for wrong settings."""

    def open(self, state: TrackerState) -> str:
        """Begin the run, or continue it. Return where users find it."""

    def add_steps(self, stage: str, steps: Sequence[Step]) -> None:
        """Add steps, in order. It may have had some of them before."""

    def add_record(self, stage: PlannedStage, record: StageRecord) -> None:
        """Add what a finished stage measured."""

    def add_evaluation(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Add what a stage that evaluates measured."""

    def add_file(self, path: Path, folder: str | None) -> None:
        """Add a file. `folder` None: at the top."""

    def flush(self) -> None:
        """Make durable what was added, and note it in the state."""

    def end(self, status: Status) -> None:
        """End the run."""

    def explain(self, error: Exception) -> str:
        """Return what is wrong, as the predicate of a sentence about the tracker."""

    def close(self) -> None:
        """Release what is open. Never raises."""
