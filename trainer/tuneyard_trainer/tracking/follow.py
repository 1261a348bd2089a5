"""Follow a run: each tracker gets the steps, records and reports in a thread of its own.

The driver hands over which stages run or are done, and no step: a thread reads the steps from the
output. So nothing waits for a tracker, and the memory of one that does not respond is bounded.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tuneyard.api.plan import Plan
from tuneyard.api.pods import STALE_ATTEMPT, stage_folder
from tuneyard.api.stage_settings import EVALUATION_KINDS
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation.result import EVALUATION
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.tracking.seen import SeenStage, SeenStages
from tuneyard_trainer.tracking.state import TrackerState
from tuneyard_trainer.tracking.steps import StepReader
from tuneyard_trainer.tracking.tracker import Status, Tracker
from tuneyard_trainer.worker import Interrupted

POLL_SECONDS = 5.0
"""The time between two looks at the steps of a stage that runs."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 120.0
"""The wait after an error; it doubles each time."""
FINAL_SECONDS = 60.0
"""How long a job that has ended waits for a tracker."""
LAST_TRIES = 3
"""How often it tries again meanwhile. A tracker that failed as often before gets a last try."""
HANDOVER_SECONDS = 10.0
"""How long an attempt that was stopped waits: the next one hands over the rest."""
REPORTS = ("README.md", "report.html", "report.json", "loss.png", "job.yaml")
"""The files of the export that trackers get: no weights."""


@dataclass(frozen=True)
class Listener:
    """Shows what the trackers say to the user. Any thread may call it."""

    note: Callable[[str], None]
    warn: Callable[[str], None]


class Tracking:
    """The trackers of one attempt."""

    def __init__(
        self,
        plan: Plan,
        attempt: int,
        trackers: Sequence[Tracker],
        new_store: Callable[[], Store],
        listener: Listener,
    ) -> None:
        """`new_store`: returns a store of the output for one thread."""
        self._seen = SeenStages(plan)
        self._followers = [
            Follower(plan, attempt, tracker, new_store(), self._seen, listener)
            for tracker in trackers
        ]

    def follow(self, event: Mapping[str, Any]) -> None:
        """Note an event of the runner. Returns at once."""
        if self._seen.add(event):
            for follower in self._followers:
                follower.wake()

    def end(self, status: Status | None) -> None:
        """Hand over the rest, for a limited time, and say what could not be. `status` None: the run
        goes on in the next attempt."""
        for follower in self._followers:
            follower.end(status)
        for follower in self._followers:
            follower.wait()

    def abandon(self) -> None:
        """Hand over nothing more: a newer attempt does."""
        for follower in self._followers:
            follower.abandon()


class Follower:
    """Hands the run over to one tracker."""

    def __init__(
        self,
        plan: Plan,
        attempt: int,
        tracker: Tracker,
        store: Store,
        seen: SeenStages,
        listener: Listener,
    ) -> None:
        self._plan, self._attempt, self._tracker = plan, attempt, tracker
        self._store, self._seen, self._listener = store, seen, listener
        self._reader = StepReader(store)
        self._state: TrackerState | None = None
        self._stored: dict[str, Any] = {}
        """The state as the output holds it."""
        self._is_open = self._was_shown = self._warned = False
        self._done: set[str] = set()
        """The stages whose records were handed over."""
        self._failures = 0
        self._news = threading.Condition()
        self._ending = self._abandoned = self._complete = False
        self._has_news = True
        self._status: Status | None = None
        self._deadline = 0.0
        """When a follower that ends gives up (monotonic)."""
        self._thread = threading.Thread(
            target=self._run, daemon=True, name=f"tracker-{tracker.name}"
        )
        self._thread.start()

    def wake(self) -> None:
        """Look at the stages soon."""
        with self._news:
            self._has_news = True
            self._news.notify_all()

    def end(self, status: Status | None) -> None:
        """Hand over the rest and end."""
        with self._news:
            self._ending, self._status, self._has_news = True, status, True
            self._deadline = time.monotonic() + _patience(status)
            self._news.notify_all()

    def abandon(self) -> None:
        """End as soon as possible."""
        with self._news:
            self._ending = self._abandoned = True
            self._news.notify_all()

    def wait(self) -> None:
        """Wait for the end; say what was not handed over."""
        self._thread.join(_patience(self._status))
        if self._complete or self._abandoned:
            return
        self.abandon()
        if self._status is None:
            return
        self._listener.warn(
            f"{self._tracker.title} ({self._tracker.place}) did not get the whole run: "
            f"{self._missing()} and its end are missing"
        )

    def _missing(self) -> str:
        try:
            count = sum(self._reader.unread(stage.name) for stage in self._seen.all())
        except Exception:  # the output cannot be read, which is no fault of the job
            return "lines of metrics"
        return f"{count} lines of metrics" if count != 1 else "1 line of metrics"

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._try():
                pass
        finally:
            self._tracker.close()

    def _try(self) -> bool:
        """Wait until something is due, and hand it over. Return whether the thread ends."""
        self._wait_until_due()
        ending = self._ending
        if self._abandoned:
            return True
        try:
            self._hand_over(ending=ending)
        except Exception as error:
            if isinstance(error, StageError) and error.reason == STALE_ATTEMPT:
                self._abandoned = True
                return True
            self._note_failure(error)
            is_late = time.monotonic() >= self._deadline
            return ending and (is_late or self._failures >= LAST_TRIES)
        self._note_success()
        self._complete = ending
        return ending

    def _wait_until_due(self) -> None:
        pause = POLL_SECONDS
        if self._failures:
            doubled = FIRST_RETRY_SECONDS * 2 ** min(self._failures - 1, 10)
            pause = min(LAST_RETRY_SECONDS, doubled)
        with self._news:
            ending = self._ending
            if ending:
                pause = min(pause, FIRST_RETRY_SECONDS)
            self._news.wait_for(
                lambda: self._ending != ending or (self._has_news and not self._failures), pause
            )
            self._has_news = False

    def _note_failure(self, error: Exception) -> None:
        self._is_open = False
        self._failures += 1
        if not self._warned:
            self._warned = True
            why = self._tracker.explain(error)
            self._listener.warn(
                f"{self._tracker.title} ({self._tracker.place}) {why}; the job goes on, and what "
                "is missing there is handed over later"
            )

    def _note_success(self) -> None:
        if self._failures:
            self._listener.note(f"{self._tracker.title} has the run up to now again")
        self._failures = 0

    # ---- what is handed over --------------------------------------------------------------------

    def _hand_over(self, *, ending: bool) -> None:
        """Hand over everything that is new. Raises any error."""
        self._store.refuse_stale(self._attempt)
        stages = self._seen.all()
        if not stages and not (ending and self._store.tracker_state(self._tracker.name)):
            return  # which run is continued depends on the stages' identities
        self._open(stages)
        for stage in stages:
            self._hand_over_stage(stage, ending=ending)
        if ending and self._status:
            self._tracker.end(self._status)
            self._keep(ended=self._status == "FINISHED")

    def _open(self, stages: Sequence[SeenStage]) -> None:
        """Open the run; another one if a stage does not continue what the run has."""
        state = self._state or self._stored_state()
        others = [
            stage.name
            for stage in stages
            if state.identities.get(stage.name, stage.identity) != stage.identity
        ]
        if others:
            state = state.renewed()
        if state is not self._state:
            self._is_open = False
        self._state = state
        state.identities |= {stage.name: stage.identity for stage in stages}
        self._keep(ended=False)
        if self._is_open:
            return
        self._reader.restart()
        self._done.clear()
        where = self._tracker.open(state)
        self._is_open = True
        if not self._was_shown:
            self._was_shown = True
            self._listener.note(f"{self._tracker.title}: {where}")

    def _stored_state(self) -> TrackerState:
        name, place = self._tracker.name, self._tracker.place
        return TrackerState.of(self._store, name, place, self._plan)

    def _keep(self, *, ended: bool) -> None:
        """Store the state if it has changed."""
        assert self._state is not None
        self._state.ended = ended
        value = json.loads(json.dumps(self._state.to_json()))
        if value != self._stored:
            self._store.keep_tracker_state(self._tracker.name, value, self._attempt)
            self._stored = value

    def _hand_over_stage(self, stage: SeenStage, *, ending: bool) -> None:
        if stage.readable:
            self._hand_over_steps(stage.name)
        if stage.name in self._done:
            return
        if stage.kind in EVALUATION_KINDS and (stage.record or ending):
            self._hand_over_evaluation(stage.name)
        if stage.record:
            planned = next(each for each in self._plan.stages if each.name == stage.name)
            self._tracker.add_record(planned, stage.record)
            if stage.kind == "export":
                for name in REPORTS:
                    self._hand_over_file(f"{stage_folder(stage.name)}/{name}", None)
            self._tracker.flush()
            self._done.add(stage.name)

    def _hand_over_steps(self, stage: str) -> None:
        steps, end = self._reader.next(stage)
        while steps and not self._abandoned:
            self._tracker.add_steps(stage, steps)
            self._tracker.flush()
            self._reader.advance(stage, end)
            self._keep(ended=False)
            steps, end = self._reader.next(stage)

    def _hand_over_evaluation(self, stage: str) -> None:
        """Hand over the evaluation, which is there without a record if a gate was missed."""
        relative = f"{stage_folder(stage)}/{EVALUATION}"
        if data := self._store.read(relative):
            self._tracker.add_evaluation(stage, json.loads(data)["metrics"])
            self._hand_over_file(relative, stage)
            self._tracker.flush()

    def _hand_over_file(self, relative: str, folder: str | None) -> None:
        """Hand over a file of the output, if there is one."""
        data = self._store.read(relative)
        if not data:
            return
        with TemporaryDirectory() as scratch:
            file = Path(scratch, Path(relative).name)
            file.write_bytes(data)
            self._tracker.add_file(file, folder)


def _patience(status: Status | None) -> float:
    return FINAL_SECONDS if status in ("FINISHED", "FAILED") else HANDOVER_SECONDS


# ---- for drivers --------------------------------------------------------------------------------


@contextmanager
def followed(
    plan: Plan,
    attempt: int,
    trackers: Sequence[Tracker],
    new_store: Callable[[], Store],
    listener: Listener,
    *,
    interrupted: Callable[[], Status | None] = lambda: None,
    succeeded: Status | None = "FINISHED",
) -> Iterator[Tracking]:
    """Yield the tracking of what runs in the context, whose end is the end of the run.

    `interrupted`: returns the run's status after an interruption. `succeeded`: that after success.
    None: it goes on in the next attempt. Raises StageError for wrong settings.
    """
    with ExitStack() as environments:
        for tracker in trackers:
            environments.enter_context(tracker.environment())
        tracking = Tracking(plan, attempt, trackers, new_store, listener)
        try:
            yield tracking
        except BaseException as error:
            if isinstance(error, StageError) and error.reason == STALE_ATTEMPT:
                tracking.abandon()
            elif isinstance(error, Interrupted):
                tracking.end(interrupted())
            elif isinstance(error, Exception):
                tracking.end("FAILED")
            raise
        tracking.end(succeeded)
