"""What a stage knows of the process that runs it, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tuneyard.api.plan import PlannedStage

if TYPE_CHECKING:
    import torch

SettingsT = TypeVar("SettingsT")


class Report(Protocol):
    """Tells whoever watches how far the stage is. Cheap, never blocks, never raises."""

    def __call__(
        self,
        *,
        step: int = 0,
        total_steps: int = 0,
        metrics: Mapping[str, float] | None = None,
        message: str | None = None,
        resumed_step: int | None = None,
    ) -> None:
        """`resumed_step`: the step at which this attempt takes the stage up, told once; 0: from
        the start."""


def silent(
    *,
    step: int = 0,
    total_steps: int = 0,
    metrics: Mapping[str, float] | None = None,
    message: str | None = None,
    resumed_step: int | None = None,
) -> None:
    """A `Report` that nobody watches: ranks other than 0."""


def never() -> bool:
    """A `stop` that is never asked."""
    return False


def durable(folder: Path) -> None:
    """A `persist` for a work folder that is itself the durable place."""


@dataclass(frozen=True)
class Worker:
    """One of `world_size` equal processes. With more than one, torch.distributed is initialised."""

    rank: int
    world_size: int
    device: torch.device
    report: Report = silent
    stop: Callable[[], bool] = never
    """True once somebody asked for an orderly end: checkpoint at the next step and raise
    `Interrupted`."""
    persist: Callable[[Path], None] = durable
    """Makes a folder of the stage's work folder outlive this machine."""
    attempt: int = 1
    identity: str = ""
    """The stage's identity, on rank 0: a leftover in the work folder is of use if it carries it."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """The job as the user wrote it, for the model card; no part of what a stage computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them have in common."""
        return self.rank == 0


@dataclass(frozen=True)
class StageContext:
    """Everything that a stage's `run` receives."""

    stage: PlannedStage
    inputs: Mapping[str, Path]
    """The local path of each input, by role."""
    workdir: Path
    """The stage's own folder. It may hold what a killed run left behind."""
    worker: Worker

    def settings(self, kind: type[SettingsT]) -> SettingsT:
        """Return the stage's settings. Raises TypeError if they belong to another kind of stage."""
        if not isinstance(self.stage.settings, kind):
            found = f"stage {self.stage.name} is of kind {self.stage.kind}"
            raise TypeError(f"{found}, and its settings are not {kind.__name__}")
        return self.stage.settings


@dataclass(frozen=True)
class StageOutcome:
    """What a finished stage says of itself; the runner makes the StageRecord from it."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    contents: tuple[str, ...] | None = None
    """Names in the work folder that are the result, and so its digest. None: every file."""


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The stage stopped in good order after `step`; the same plan goes on from there."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step
        super().__init__(f"stopped in {stage} after step {step}")

    def __reduce__(self) -> tuple[object, ...]:
        return (Interrupted, (self.stage, self.step))
