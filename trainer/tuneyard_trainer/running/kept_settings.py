"""The settings with which a training stage runs, kept beside its checkpoints.

An attempt chooses settings that `auto` leaves open from what is known by then, and a later attempt
may know more. Micro-batches of another size change a result by rounding. A stage that goes on from
a checkpoint therefore keeps the settings that it began with, as long as the manifest's settings and
the devices are the same. `checkpoints/settings.json` has one entry for each of these combinations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from tuneyard.api.job_facts import ChosenSettings, Device
from tuneyard.api.meta import Report
from tuneyard.api.plan import PlannedStage, TrainRuntime
from tuneyard_trainer.storage.files import write_atomically

FILE = "checkpoints/settings.json"
"""The file in a stage's work folder. It goes with the checkpoints when the stage is done."""


class Settings(Report):
    """Settings that change how a stage runs, and its result by rounding only."""

    micro_batch_tokens: int | Literal["auto"]
    gradient_checkpointing: bool

    @classmethod
    def of(cls, runtime: TrainRuntime) -> Settings:
        return cls(
            micro_batch_tokens=runtime.micro_batch_tokens,
            gradient_checkpointing=runtime.gradient_checkpointing,
        )


class Entry(Report):
    """The settings of a stage on some devices."""

    gpu: str | None
    """Name of each GPU. None: the workers compute on the CPU."""
    memory: int
    """Bytes of each device."""
    devices: int
    """Devices that train together."""
    planned: Settings
    """The settings of the manifest."""
    used: Settings
    """The settings with which the stage runs."""
    since: int
    """The newest checkpoint when they were chosen, by its step. -1: there was none. Until a later
    one exists nothing was computed with them that a resumed stage goes on from."""

    def is_like(self, other: Entry) -> bool:
        """Return whether devices and manifest are the same."""
        return self.model_copy(update={"used": other.used, "since": other.since}) == other


_ENTRIES = TypeAdapter(list[Entry])


def settle(
    stage: PlannedStage,
    chosen: ChosenSettings | None,
    workdir: Path,
    device: Device,
    devices: int,
) -> PlannedStage:
    """Return a stage with the settings that its checkpoints were made with, else with the chosen
    ones; keep them. `chosen`: None: those of the plan. Raises StageError, and OSError if the kept
    ones cannot be read."""
    runtime, newest = stage.runtime, _newest(workdir / FILE)
    if chosen is not None:
        runtime = runtime.model_copy(update=chosen.model_dump())
    entry = Entry(
        gpu=device.gpu,
        memory=device.memory,
        devices=devices,
        planned=Settings.of(stage.runtime),
        used=Settings.of(runtime),
        since=newest,
    )
    kept = [each for each in _kept(workdir / FILE) if each.since < newest]
    found = next((each for each in kept if each.is_like(entry)), None)
    if found is None:
        write_atomically(workdir / FILE, _ENTRIES.dump_json([*kept, entry], by_alias=True))
        found = entry
    runtime = runtime.model_copy(update=found.used.model_dump())
    return stage.model_copy(update={"runtime": runtime})


def _newest(file: Path) -> int:
    """Return the step of the newest checkpoint beside a file. -1: there is none."""
    steps = (folder.name.removeprefix("step-") for folder in file.parent.glob("step-????????"))
    return max((int(step) for step in steps if step.isdecimal()), default=-1)


def _kept(file: Path) -> list[Entry]:
    """Return the entries of a file; none if it is absent or damaged."""
    try:
        return _ENTRIES.validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return []
