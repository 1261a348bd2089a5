"""Event files for TensorBoard: a folder for each stage, since their steps begin anew.

An attempt writes files of its own. The first event of a file makes TensorBoard forget the steps
from there on, so that steps which an earlier attempt wrote as well are shown once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import yaml
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from tuneyard.api.plan import Plan, PlannedStage, StageRecord
from tuneyard_trainer.reporting.summary import shareable
from tuneyard_trainer.running.failures import last_line
from tuneyard_trainer.tracking.state import TrackerState
from tuneyard_trainer.tracking.steps import Step
from tuneyard_trainer.tracking.tracker import Status

MANIFEST_FOLDER = "job"
"""The folder of the manifest, which TensorBoard shows as text."""
_NUMBERS = itertools.count()
"""The numbers of the files of this process."""


class EventFiles:
    """The event files of a job."""

    name = "tensorboard"
    title = "TensorBoard"

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        persist: Callable[[Path], None],
        *,
        place: str,
        where: str,
    ) -> None:
        """`folder`: a local one. `persist`: copies a file in it to durable storage. `place`: as in
        `Tracker`. `where`: where users find the files."""
        self._folder, self._plan, self._persist = folder, plan, persist
        self.place, self._where = place, where
        self._writers: dict[str, EventsWriter] = {}
        self._state = TrackerState("", [])
        self._first: dict[str, int] = {}
        """By stage: the first step of this attempt's file."""
        self._written: dict[str, int] = {}
        """By stage: the last step since the last `flush`."""

    def environment(self) -> AbstractContextManager[None]:
        """Nothing is needed."""
        return nullcontext()

    def open(self, state: TrackerState) -> str:
        """Begin files that continue those of the state."""
        self.close()
        self._state, self._first, self._written = state, dict(state.steps), {}
        if MANIFEST_FOLDER not in state.steps:  # TensorBoard forgets no texts
            manifest = yaml.safe_dump(shareable(self._plan.manifest), sort_keys=False)
            self._write(MANIFEST_FOLDER, 0, summary.text("manifest", f"```yaml\n{manifest}```"))
            self._written[MANIFEST_FOLDER] = 0
        return self._where

    def add_steps(self, stage: str, steps: Sequence[Step]) -> None:
        """Add the metrics of steps, as `STAGE/METRIC`, from the last one that earlier files have:
        its evaluation may be missing there."""
        for each in steps:
            if each.step >= self._first.get(stage, 0):
                self._add(stage, each.step, each.metrics)
                self._written[stage] = each.step

    def add_record(self, stage: PlannedStage, record: StageRecord) -> None:
        """TensorBoard compares no single values."""

    def add_evaluation(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an evaluation, as `STAGE/METRIC`."""
        self._add(stage, 0, metrics)

    def add_file(self, path: Path, folder: str | None) -> None:
        """TensorBoard shows no files."""

    def flush(self) -> None:
        """Write the files."""
        for stage, writer in self._writers.items():
            writer.flush()
            for file in (self._folder / stage).iterdir():
                self._persist(file)
        self._state.steps |= self._written
        self._written = {}

    def end(self, status: Status) -> None:
        """Event files have no end."""

    def explain(self, error: Exception) -> str:
        """Return what is wrong."""
        return f"cannot be written: {last_line(error)}"

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            with suppress(OSError):
                writer.close()
        self._writers = {}

    def _add(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._write(stage, step, summary.scalar(f"{stage}/{name}", value))

    def _write(self, stage: str, step: int, value: Summary) -> None:
        if stage not in self._writers:
            folder = self._folder / stage
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads files in the order of their names, which hold the time in seconds.
            writer = EventsWriter(str(folder / "events"), f".{next(_NUMBERS):06}")
            start = SessionLog(status=SessionLog.START)
            first = self._first.get(stage, 0)
            writer.write_event(Event(wall_time=time.time(), step=first, session_log=start))
            self._writers[stage] = writer
        self._writers[stage].write_event(Event(wall_time=time.time(), step=step, summary=value))
