"""The context that a stage runs in, and the outcome that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tuneyard.api.gates import GateResult
from tuneyard.api.plan import PlannedStage

if TYPE_CHECKING:
    import torch

SettingsT = TypeVar("SettingsT")


class Report(Protocol):
    """Report the stage's progress. Cheap; never blocks and never raises."""

    def __call__(
        self,
        *,
        step: int = 0,
        total_steps: int = 0,
        metrics: Mapping[str, float] | None = None,
        message: str | None = None,
        resumed_step: int | None = None,
        gates: Sequence[GateResult] = (),
    ) -> None:
        """`resumed_step`: the step that this attempt resumes from, reported once; 0: from the
        start. `gates`: the verdicts of an evaluation, reported once."""


LOST_PEER = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")
"""Texts in the errors of a worker whose peer was lost."""


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error says that another worker was lost: torch has no class for it."""
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in LOST_PEER)


def is_host_memory(error: BaseException) -> bool:
    """Return whether the host's memory ran out: torch raises RuntimeError for it."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def report_nothing(
    *,
    step: int = 0,
    total_steps: int = 0,
    metrics: Mapping[str, float] | None = None,
    message: str | None = None,
    resumed_step: int | None = None,
    gates: Sequence[GateResult] = (),
) -> None:
    """The `Report` of ranks other than 0."""


def never_stop() -> bool:
    """A `stop` that never requests an end."""
    return False


def persist_nothing(path: Path) -> None:
    """A `persist` for a work folder that is itself durable."""


@dataclass(frozen=True)
class Worker:
    """One of `world_size` equal processes. With more than one, torch.distributed is initialized."""

    rank: int
    world_size: int
    device: torch.device
    report: Report = report_nothing
    stop: Callable[[], bool] = never_stop
    """True once an orderly end is requested: save a checkpoint at the next step and raise
    `Interrupted`."""
    persist: Callable[[Path], None] = persist_nothing
    """Copies a file or a folder inside the stage's work folder to durable storage."""
    owned: Callable[[], AbstractContextManager[None]] = nullcontext
    """Returns a context for changes of files that a newer attempt may use. It raises StageError
    StaleAttempt if there is a newer attempt; on a file system, none can start before its end."""
    attempt: int = 1
    stage: str = ""
    """The name of the stage that runs."""
    identity: str = ""
    """The stage's identity, on rank 0. Files left in the work folder are reused only if they carry
    the same identity."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """The job's manifest with its defaults, for the export. Other stages do not read it."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results of all processes."""
        return self.rank == 0

    @property
    def alone(self) -> Worker:
        """This worker as the only one, for a part that the other ranks do not take part in."""
        return replace(self, rank=0, world_size=1)

    def check_stop(self) -> None:
        """Raise Interrupted if a stop is requested. Only for a part that no other rank waits for:
        elsewhere the ranks must agree on the request first."""
        if self.stop():
            raise Interrupted(self.stage, 0)


SuitesOf = Callable[["StageContext", Any, Any], Callable[[], dict[str, float]]]
"""Returns the measurement of a stage's suites, from the stage, its training loop's settings and the
model that it trains. All workers call it and the measurement together."""


@dataclass(frozen=True)
class StageContext:
    """The arguments of a stage's `run`."""

    stage: PlannedStage
    inputs: Mapping[str, Path]
    """The local path of each input, by role."""
    workdir: Path
    """The stage's own folder. It may hold the files of an earlier, killed run."""
    worker: Worker
    digests: Mapping[str, str] = field(default_factory=dict)
    """The content digest of each input, by role, on rank 0. {}: unknown."""
    suites_of: SuitesOf | None = None
    """Opens the suites that a stage measures while it trains. They are parts of an evaluation,
    which the stages that train do not import, so the runner passes it on. None: the stage has no
    suites."""

    def settings(self, kind: type[SettingsT]) -> SettingsT:
        """Return the stage's settings. Raises TypeError if they belong to another kind of stage."""
        if not isinstance(self.stage.settings, kind):
            found = f"stage {self.stage.name} is of kind {self.stage.kind}"
            raise TypeError(f"{found}, and its settings are not {kind.__name__}")
        return self.stage.settings


@dataclass(frozen=True)
class StageOutcome:
    """The result of a finished stage. The runner makes the StageRecord from it."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    contents: tuple[str, ...] | None = None
    """Names in the work folder that are the stage's output and determine its digest. None: every
    file."""


class Interrupted(Exception):  # noqa: N818 - a requested end, not an error
    """Raised when a stage stops on request after `step`; the same plan resumes from there."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step
        super().__init__(f"stopped in {stage} after step {step}")

    def __reduce__(self) -> tuple[object, ...]:
        return (Interrupted, (self.stage, self.step))
