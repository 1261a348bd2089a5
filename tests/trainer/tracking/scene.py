"""An output that a job writes step by step, and a tracker that keeps what it gets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.jobs import manifest, planned
from tuneyard.api.plan import Plan, PlannedStage, StageRecord
from tuneyard_trainer.running.runner import stage_event
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.tracking.follow import Listener, Tracking, followed
from tuneyard_trainer.tracking.state import TrackerState
from tuneyard_trainer.tracking.steps import Step
from tuneyard_trainer.tracking.tracker import Status, Tracker


class KeepingTracker:
    """A tracker in memory, which shows what is added before a `flush` only after it."""

    name, title, place = "kept", "Keeper", "here"

    def __init__(self) -> None:
        self.runs: dict[str, list[Any]] = {}
        """By the state's id: what was added, and the status at the end."""
        self.steps: dict[tuple[str, str, int], float] = {}
        """By run, metric and step: the first value."""
        self.errors: list[Exception] = []
        """Raised one after another, before anything is added."""
        self._run = ""

    @contextmanager
    def environment(self) -> Iterator[None]:
        yield

    def open(self, state: TrackerState) -> str:
        self._raise()
        self._run = state.id
        self.runs.setdefault(state.id, [])
        return "at home"

    def add_steps(self, stage: str, steps: Sequence[Step]) -> None:
        self._raise()
        for each in steps:
            for name, value in each.metrics.items():
                self.steps.setdefault((self._run, f"{stage}/{name}", each.step), value)

    def add_record(self, stage: PlannedStage, record: StageRecord) -> None:
        self._raise()
        assert record.stage == stage.name
        self.runs[self._run].append(("record", stage.name))

    def add_evaluation(self, stage: str, metrics: Mapping[str, float]) -> None:
        self.runs[self._run].append(("evaluation", stage, dict(metrics)))

    def add_file(self, path: Path, folder: str | None) -> None:
        self.runs[self._run].append(("file", path.name, folder))

    def flush(self) -> None:
        pass

    def end(self, status: Status) -> None:
        self._raise()
        self.runs[self._run].append(("end", status))

    def explain(self, error: Exception) -> str:
        return f"says {error}"

    def close(self) -> None:
        pass

    def _raise(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    def line(self, metric: str) -> list[tuple[int, float]]:
        """Return the steps of a metric of the newest run, and their values."""
        run = list(self.runs)[-1]
        mine = {key[2]: value for key, value in self.steps.items() if key[:2] == (run, metric)}
        return list(mine.items())


@dataclass
class Scene:
    """One job, over several attempts."""

    folder: Path
    attempt: int = 1
    said: list[str] = field(default_factory=list)
    """The notes and, with `!`, the warnings."""

    def __post_init__(self) -> None:
        value = manifest(self.folder / "model", tracking={"tensorboard": {}})
        self.plan: Plan = planned(value)
        self.store.claim(self.plan.job, self.attempt)

    @property
    def store(self) -> Store:
        return Store(str(self.folder / "out"), self.folder / "scratch")

    @contextmanager
    def followed(self, tracker: Tracker, **arguments: Any) -> Iterator[Tracking]:
        """Follow what runs in the context."""
        listener = Listener(self.said.append, lambda text: self.said.append(f"! {text}"))
        with followed(
            self.plan, self.attempt, [tracker], lambda: self.store, listener, **arguments
        ) as tracking:
            yield tracking

    @contextmanager
    def ended_by(self, error: Exception, tracker: Tracker, **arguments: Any) -> Iterator[Tracking]:
        """Follow what runs in the context, after which the job ends with this error."""
        raises = pytest.raises(type(error))
        with raises, self.followed(tracker, **arguments) as tracking:
            yield tracking
            raise error

    def next_attempt(self) -> None:
        """Begin the next attempt."""
        self.attempt += 1
        self.store.claim(self.plan.job, self.attempt)

    def write(self, steps: Sequence[int], *, stage: str = "sft") -> None:
        """Append steps to the metrics of a stage."""
        with (self.store.workdir(stage) / "metrics.jsonl").open("a") as file:
            for step in steps:
                file.write(json.dumps({"step": step, "loss": 10.0 / step}) + "\n")

    def truncate(self, step: int) -> None:
        """Cut the metrics of sft back to a checkpoint."""
        path = self.store.workdir("sft") / "metrics.jsonl"
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in lines))


def running(stage: str = "sft", identity: str = "sha256:1") -> dict[str, Any]:
    """Return the event of a stage that begins."""
    return stage_event(stage, "Running", identity)


def resumed(step: int, stage: str = "sft") -> dict[str, Any]:
    """Return the event of a stage that trains from here on."""
    return progress(step, stage) | {"resumedStep": step}


def progress(step: int, stage: str = "sft") -> dict[str, Any]:
    """Return the event of a step."""
    return {
        "type": "progress",
        "stage": stage,
        "step": step,
        "totalSteps": 100,
        "metrics": {"loss": 1.0},
        "message": None,
        "resumedStep": None,
    }


def succeeded(stage: str = "sft", identity: str = "sha256:1", **metrics: float) -> dict[str, Any]:
    """Return the event of a stage that is done."""
    time = "2026-01-01T00:00:00Z"
    kind: Any = stage
    record = StageRecord(
        stage=stage,
        kind=kind,
        identity=identity,
        input_digests={"model": "sha256:m"},
        digest="sha256:d",
        attempt=1,
        started_at=time,
        finished_at=time,
        metrics=metrics,
        versions={"torch": "2"},
    )
    return stage_event(stage, "Succeeded", identity, record)


class Blocked(KeepingTracker):
    """A tracker whose server accepts a request and never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def open(self, state: TrackerState) -> str:
        self.entered.set()
        self.released.wait()
        return super().open(state)
