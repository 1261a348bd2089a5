"""Print the log of a job's driver or of its workers, once or until the job ends.

While the pods exist, the log comes from them; after that, from the job's output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING

from tuneyard.cli import kept_logs, views
from tuneyard.cli.errors import NotFoundError, RemoteError, UnreachableError
from tuneyard.cli.jobs import JobView, Pod, pods_of

if TYPE_CHECKING:
    from tuneyard.cli.cluster import Cluster

POLL_SECONDS = 2.0
MAX_LINES = 10_000
"""Most lines that are read but not yet written: a slow terminal slows the reading down."""
Print = Callable[[str], None]


def refreshed(cluster: Cluster, job: JobView) -> JobView:
    """Return the job's current state. Raises NotFoundError if it was deleted."""
    current = cluster.refresh(job)
    if current is None:
        raise NotFoundError(f"{job.kind.name} {job.name} was deleted")
    return current


class Reader:
    """Print the log of one job: `write` prints its lines, `note` prints remarks about the log."""

    def __init__(
        self, cluster: Cluster, role: str, attempt: int | None, *, write: Print, note: Print
    ) -> None:
        self._cluster, self._role, self._attempt = cluster, role, attempt
        self._write, self._note = write, note
        self._queue: Queue[str | RemoteError] = Queue(MAX_LINES)

    def show(self, job: JobView) -> None:
        """Write the log so far. Raises RemoteError if there is none."""
        pods = self._pods(job)
        started = [pod for pod in pods if pod.started]
        if not started:
            self._show_kept(job, pods)
        for pod in started:
            for _, line in self._lines(job, pod):
                self._write(line)

    def follow(self, job: JobView) -> None:
        """Write the logs of all attempts until the job ends. Raises RemoteError.

        Each pod is read by its own thread: a worker may start long after the first one.
        """
        threads: dict[str, Thread] = {}
        last_note = ""
        pods = self._pods(job)
        while True:
            for pod in pods:
                if pod.started and pod.uid not in threads:
                    self._note(f"attempt {pod.attempt}, pod {pod.name}")
                    threads[pod.uid] = self._start(job, pod)
            idle = not any(thread.is_alive() for thread in threads.values())
            if idle and self._has_ended(job):
                break
            if idle and (text := f"waiting: {self._not_started(job, pods)}") != last_note:
                self._note(text)
                last_note = text
            self._write_for(POLL_SECONDS)
            with suppress(UnreachableError):  # the next round tries again
                job, pods = refreshed(self._cluster, job), self._pods(job)
        self._write_for(0.0)
        if not threads:
            self._show_kept(job, pods)

    def show_kept(self, job: JobView) -> None:
        """Write the log in the job's output. Raises RemoteError."""
        where, lines = kept_logs.read(job, self._role, self._attempt)
        self._note(f"from {where}")
        for line in lines:
            self._write(line)

    def _show_kept(self, job: JobView, pods: Sequence[Pod]) -> None:
        """Write the kept log of an attempt whose pods are gone. Raises RemoteError."""
        if reason := self._no_log(job, pods):
            raise RemoteError(reason)
        try:
            self.show_kept(job)
        except RemoteError as error:
            raise RemoteError("\n".join([error.message, *self._outcomes(job)])) from error

    # ---- pods -----------------------------------------------------------------------------------

    def _pods(self, job: JobView) -> list[Pod]:
        return pods_of(self._cluster.pods(job), self._role, self._attempt)

    def _has_ended(self, job: JobView) -> bool:
        """Return whether no further pod with a requested log will start."""
        if job.is_finished:
            return True
        attempts = job.status.attempts if job.status else []
        return self._attempt is not None and any(
            attempt.number == self._attempt and attempt.finished_at for attempt in attempts
        )

    def _not_started(self, job: JobView, pods: Sequence[Pod]) -> str:
        """Return why no requested pod has started."""
        problem = next((pod.start_problem for pod in pods if pod.start_problem), "")
        failure = job.status.failure if job.status else None
        reason = problem or views.waits_for(job) or (failure.message if failure else "")
        attempt = f"attempt {self._attempt}" if self._attempt else "the job"
        state = f"{attempt} has no started {self._role} ({views.phase(job)})"
        return f"{state}: {views.plain(reason)}" if reason else state

    def _no_log(self, job: JobView, pods: Sequence[Pod]) -> str:
        """Return why there can be no log; "": the attempt has ended, and its log may be kept."""
        attempts, newest = job.status.attempts if job.status else [], job.newest_attempt
        if self._attempt is not None and self._attempt > newest:
            return f"{job.name} has no attempt {self._attempt}: the last one is {newest}"
        current = self._attempt in (None, newest)
        if not attempts or (current and attempts[-1].finished_at is None):
            return f"there is no log of {job.name}: {self._not_started(job, pods)}"
        return ""

    def _outcomes(self, job: JobView) -> list[str]:
        attempts = job.status.attempts if job.status else []
        lines = [f"  attempt {one.number}: {views.outcome(one)}" for one in attempts]
        return [f"the status of {job.name} records:", *lines]

    # ---- reading --------------------------------------------------------------------------------

    def _start(self, job: JobView, pod: Pod) -> Thread:
        thread = Thread(target=self._read_to_end, args=(job, pod), daemon=True)
        thread.start()
        return thread

    def _read_to_end(self, job: JobView, pod: Pod) -> None:
        """Queue a pod's log to its end; after a lost connection, continue with the next line."""
        last = ""
        while True:
            try:
                for stamp, line in self._lines(job, pod, follow=True, after=last):
                    self._queue.put(line)
                    last = stamp
                if not any(p.uid == pod.uid and p.running for p in self._cluster.pods(job)):
                    return
            except UnreachableError:
                pass
            except NotFoundError:
                return
            except RemoteError as error:
                self._queue.put(error)
                return
            time.sleep(POLL_SECONDS)

    def _lines(
        self, job: JobView, pod: Pod, *, follow: bool = False, after: str = ""
    ) -> Iterator[tuple[str, str]]:
        """Yield the lines after a time ("": all lines).

        The times of one pod come from one clock and have a fixed number of digits, so they compare
        as text.
        """
        prefix = f"{pod.name}: " if pod.role == "worker" else ""
        for stamp, line in self._cluster.log(job, pod, follow=follow, since=after or None):
            if stamp > after:
                yield stamp, prefix + line

    def _write_for(self, seconds: float) -> None:
        """Write the queued lines, and those that are queued within this time."""
        end = time.monotonic() + seconds
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                return
            if isinstance(item, RemoteError):
                raise item
            self._write(item)
            if seconds and time.monotonic() >= end:
                return
