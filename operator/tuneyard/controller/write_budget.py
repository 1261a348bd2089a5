"""The rate at which the operator writes what changes all the time: the progress of running jobs.

A job's progress is written every 10 s at first and every 60 s once an attempt has run for half an
hour. All jobs together share a number of writes per second, one turn after the other: with 20
writes per second, the progress of each of 10,000 running jobs is written every 500 s.

Other changes of a status need no turn and never wait for one.
"""

from __future__ import annotations

import time

from tuneyard.controller import metrics
from tuneyard.controller.job_cache import CachedJob

FIRST_SECONDS, LAST_SECONDS = 10.0, 60.0
"""Least time between two writes of one job's progress: at first, and of a long attempt."""
SHARE = 1 / 30
"""The time between two writes as a share of the time that the attempt has run."""


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

    def wait(self, cached: CachedJob) -> float:
        """Return the seconds until the job's progress may be written; 0.0: now. A job takes a turn
        once its interval is over, and keeps it until its status is written."""
        now = time.monotonic()
        due = cached.written_at + cached.write_interval
        if due > now:
            return due - now
        if cached.write_turn is None:
            cached.write_turn = self._turns.take(now)
            metrics.PROGRESS_WAIT.set(cached.write_turn - now)
        return max(0.0, cached.write_turn - now)
