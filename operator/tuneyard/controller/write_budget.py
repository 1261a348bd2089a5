"""The rate at which the operator writes what changes all the time: the progress of running jobs.

A job's progress is written every 10 s at first and every 60 s once an attempt has run for half an
hour. All jobs together share a number of writes per second, one turn after the other: with 20
writes per second, the progress of each of 10,000 running jobs is written every 500 s.

Other changes of a status need no turn and never wait for one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tuneyard.api.progress import Post
from tuneyard.api.status import JobStatus, Progress
from tuneyard.controller import metrics
from tuneyard.controller.job_cache import CachedJob
from tuneyard.status.reported import was_done
from tuneyard.status.times import moment_of

FIRST_SECONDS, LAST_SECONDS = 10.0, 60.0
"""Least time between two writes of one job's progress: at first, and of a long attempt."""
SHARE = 1 / 30
"""The time between two writes as a share of the time that the attempt has run."""
UID_SECONDS = 60.0
"""How long the UID of a new RayJob waits for another change to be written with: in a burst of new
jobs, separate writes of the UID would be one in seven writes."""


def write_interval(running_seconds: float) -> float:
    """Return the least seconds between two writes of the progress of an attempt that has run for
    `running_seconds`."""
    return min(max(FIRST_SECONDS, running_seconds * SHARE), LAST_SECONDS)


class Turns:
    """Evenly spaced turns, which all jobs share."""

    def __init__(self, per_second: float) -> None:
        self._step = 1 / per_second
        self._next = 0.0

    def take(self, earliest: float) -> float:
        """Return the next free turn (monotonic), which is not before `earliest`. Successive calls
        must not go back in time."""
        turn = max(self._next, earliest)
        self._next = turn + self._step
        return turn


class WriteBudget:
    """The turns in which progress is written."""

    def __init__(self, writes_per_second: float) -> None:
        self._turns = Turns(writes_per_second)

    def wait(self, cached: CachedJob, before: JobStatus | None, after: JobStatus) -> float:
        """Return the seconds until a change of the status may be written; 0.0: now."""
        if before is None or not _changes_numbers_alone(before, after):
            return 0.0
        since = time.monotonic() - cached.written_at
        if _states_of(before) != _states_of(after):
            return max(0.0, FIRST_SECONDS - since)
        is_uid_alone = _without_uids(before) == _without_uids(after)
        if is_uid_alone and since < UID_SECONDS:
            return UID_SECONDS - since
        return self._wait_for_turn(cached)

    def wait_of_post(self, cached: CachedJob, post: Post) -> float:
        """Return the seconds until what a post without an outcome tells may be written."""
        if _changes_stage(post, (cached.body or {}).get("status") or {}):
            return max(0.0, cached.written_at + FIRST_SECONDS - time.monotonic())
        return self._wait_for_turn(cached)

    def count(
        self, cached: CachedJob, before: JobStatus | None, after: JobStatus, now: datetime
    ) -> None:
        """Record that a change of the status was written."""
        if _changes_numbers_alone(before, after):
            metrics.PROGRESS_WRITES.inc()
        cached.written_at, cached.write_turn = time.monotonic(), None
        running_at = after.attempts[-1].running_at if after.attempts else None
        running = (now - moment_of(running_at)).total_seconds() if running_at else 0.0
        cached.write_interval = write_interval(running)

    def _wait_for_turn(self, cached: CachedJob) -> float:
        """Return the seconds until the job's progress may be written. A job takes a turn once its
        interval is over, and keeps it until its status is written."""
        now = time.monotonic()
        due = cached.written_at + cached.write_interval
        if due > now:
            return due - now
        if cached.write_turn is None:
            cached.write_turn = self._turns.take(now)
            metrics.PROGRESS_WAIT.set(cached.write_turn - now)
        return max(0.0, cached.write_turn - now)


# ---- changes of a status -------------------------------------------------------------------------


def _changes_stage(post: Post, stored: Mapping[str, Any]) -> bool:
    """Return whether a post is the job's first or changes the state of a stage in the status."""
    reported = {s.name: s.state for s in (post.tuneyard.stages if post.tuneyard else ())}
    known = {stage["name"]: stage["state"] for stage in stored.get("stages") or ()}
    return "progress" not in stored or any(
        state != reported[name] and not was_done(state, reported[name])
        for name, state in known.items()
        if name in reported
    )


def _states_of(status: JobStatus) -> list[tuple[str, str]]:
    return [(stage.name, stage.state) for stage in status.stages]


def _changes_numbers_alone(before: JobStatus | None, after: JobStatus) -> bool:
    """Return whether a change may wait. Without a change there is nothing to wait for."""
    if before is None or before == after:
        return False
    return _without_numbers(before) == _without_numbers(after)


_NO_UIDS = {"ray_job_uid": None, "prepare_job_uid": None}


def _without_uids(status: JobStatus) -> JobStatus:
    attempts = [attempt.model_copy(update=_NO_UIDS) for attempt in status.attempts]
    return status.model_copy(update={"attempts": attempts})


def _without_numbers(status: JobStatus) -> JobStatus:
    quiet = {"stage": None, "last_step": None, **_NO_UIDS}
    attempts = [attempt.model_copy(update=quiet) for attempt in status.attempts]
    rest: dict[str, Any] = {"stages": [], "attempts": attempts}
    if status.progress is not None:
        rest["progress"] = _FIXED_PROGRESS
    return status.model_copy(update=rest)


_FIXED_PROGRESS = Progress(
    stage="", step=0, total_steps=0, percentage=0, last_updated_time="1970-01-01T00:00:00Z"
)
