"""A job's log: of its driver, or of its workers; as it is, or as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING

from tuneyard.cli import views
from tuneyard.cli.errors import NotFoundError, RemoteError, UnreachableError
from tuneyard.cli.jobs import Found, Pod, newest

if TYPE_CHECKING:
    from tuneyard.cli.cluster import Cluster

LOOK_SECONDS = 2.0
MAX_LINES = 10_000
"""Lines that may wait to be written: a slow terminal slows the reading down."""
Say = Callable[[str], None]


class Reader:
    """Prints the log of one job. `write` takes a line of it, `note` what is said about it."""

    def __init__(
        self, cluster: Cluster, role: str, attempt: int | None, *, write: Say, note: Say
    ) -> None:
        self._cluster, self._role, self._attempt = cluster, role, attempt
        self._write, self._note = write, note
        self._queue: Queue[str | RemoteError] = Queue(MAX_LINES)

    def show(self, job: Found) -> None:
        """What there is by now. Raises RemoteError where there is nothing."""
        pods = self._pods(job)
        started = [pod for pod in pods if pod.started]
        if not started:
            raise RemoteError(self._why_none(job, pods))
        for pod in started:
            for _, line in self._lines(job, pod):
                self._write(line)

    def follow(self, job: Found) -> None:
        """What there is and what comes, from one attempt to the next, until the job is over. Each
        pod is read by a thread of its own: a worker may start long after the first."""
        threads: dict[str, Thread] = {}
        told = ""
        pods = self._pods(job)
        while True:
            for pod in pods:
                if pod.started and pod.uid not in threads:
                    self._note(f"attempt {pod.attempt}, pod {pod.name}")
                    threads[pod.uid] = self._start(job, pod)
            idle = not any(thread.is_alive() for thread in threads.values())
            if idle and self._is_over(job):
                break
            if idle and (text := f"waiting: {self._not_started(job, pods)}") != told:
                self._note(text)
                told = text
            self._write_for(LOOK_SECONDS)
            with suppress(UnreachableError):  # it is looked for again
                job, pods = self._refreshed(job), self._pods(job)
        self._write_for(0.0)
        if not threads:
            raise RemoteError(self._why_none(job, pods))

    # ---- what is there --------------------------------------------------------------------------

    def _pods(self, job: Found) -> list[Pod]:
        return newest(self._cluster.pods(job), self._role, self._attempt)

    def _refreshed(self, job: Found) -> Found:
        now = self._cluster.refresh(job)
        if now is None:
            raise NotFoundError(f"{job.kind.name} {job.name} was deleted")
        return now

    def _is_over(self, job: Found) -> bool:
        """Whether no pod will come any more whose log is asked for."""
        if job.is_finished:
            return True
        attempts = job.status.attempts if job.status else []
        return self._attempt is not None and any(
            attempt.number == self._attempt and attempt.finished_at for attempt in attempts
        )

    def _not_started(self, job: Found, pods: Sequence[Pod]) -> str:
        obstacle = next((pod.obstacle for pod in pods if pod.obstacle), "")
        failure = job.status.failure if job.status else None
        why = obstacle or views.waits_for(job) or (failure.message if failure else "")
        attempt = f"attempt {self._attempt}" if self._attempt else "the job"
        what = f"{attempt} has no {self._role} that started ({views.phase(job)})"
        return f"{what}: {views.plain(why)}" if why else what

    def _why_none(self, job: Found, pods: Sequence[Pod]) -> str:
        """Why there is no log, with what the status keeps of the attempts."""
        attempts = job.status.attempts if job.status else []
        if self._attempt is not None and self._attempt > len(attempts):
            return f"{job.name} has had no attempt {self._attempt}: the last one is {len(attempts)}"
        current = self._attempt is None or self._attempt == len(attempts)
        if not attempts or (current and attempts[-1].finished_at is None):
            return f"there is no log of {job.name}: {self._not_started(job, pods)}"
        lines = [f"attempt {one.number}: {views.ending(one)}" for one in attempts]
        gone = f"the pods of {job.name} are gone, and their logs with them. What is known of them:"
        return "\n  ".join([gone, *lines])

    # ---- reading --------------------------------------------------------------------------------

    def _start(self, job: Found, pod: Pod) -> Thread:
        thread = Thread(target=self._follow, args=(job, pod), daemon=True)
        thread.start()
        return thread

    def _follow(self, job: Found, pod: Pod) -> None:
        """To the log's end; a connection that breaks off before is taken up where it ended."""
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
            time.sleep(LOOK_SECONDS)

    def _lines(
        self, job: Found, pod: Pod, *, follow: bool = False, after: str = ""
    ) -> Iterator[tuple[str, str]]:
        """The lines after a moment ("": all). One pod's moments are written by one clock with a
        fixed number of digits, so they compare as text."""
        prefix = f"{pod.name}: " if pod.role == "worker" else ""
        for stamp, line in self._cluster.log(job, pod, follow=follow, since=after or None):
            if stamp > after:
                yield stamp, prefix + line

    def _write_for(self, seconds: float) -> None:
        """Writes what the threads read, and what they still read within this time."""
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
