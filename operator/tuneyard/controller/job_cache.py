"""What the watches have told so far, job by job; reduced to what decisions need.

Only jobs with something going on keep their body here. Ten thousand finished ones cost a few words
each.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneyard.api.meta import GROUP
from tuneyard.api.progress import Post
from tuneyard.api.status import AttemptStatus
from tuneyard.controller import metrics
from tuneyard.controller.cluster import Key
from tuneyard.status import observed
from tuneyard.status.observed import Obstacle, Pod, RayJob, Seen, Workload

Object = dict[str, Any]


@dataclass
class Entry:
    """One job that something is going on with."""

    body: Object | None = None
    """The job as last seen; None: ask for it."""
    ray_jobs: dict[str, tuple[int, RayJob]] = field(default_factory=dict)
    """By name, each with its resource version."""
    pods: dict[str, tuple[int, Pod]] = field(default_factory=dict)
    gone: dict[str, Pod] = field(default_factory=dict)
    workloads: dict[str, Workload] = field(default_factory=dict)
    """By the RayJob's name."""
    warnings: tuple[str, ...] = ()
    obstacle: Obstacle | None = None
    post: Post | None = None
    missing_since: float | None = None
    read_at: float = 0.0
    """When everything was last read afresh (monotonic); 0.0: never."""
    told_at: float = 0.0
    """When progress was last written into the status (monotonic)."""

    def seen(self, attempt: AttemptStatus | None) -> Seen:
        """As a decision sees it. `attempt`: the newest."""
        number = attempt.number if attempt else None
        ray_jobs = tuple(item for _, item in self.ray_jobs.values())
        current = next((item for item in ray_jobs if item.attempt == number), None)
        was_there = attempt and attempt.ray_job_uid and not attempt.finished_at
        missing = bool(was_there) and current is None
        if not missing:
            self.missing_since = None
        elif self.missing_since is None:
            self.missing_since = time.monotonic()
        since = self.missing_since
        return Seen(
            ray_jobs=ray_jobs,
            pods=tuple(item for _, item in self.pods.values()),
            gone=tuple(item for item in self.gone.values() if item.attempt == number),
            workload=self.workloads.get(current.name) if current else None,
            warnings=self.warnings,
            obstacle=self.obstacle,
            post=self.post,
            missing_seconds=0.0 if since is None else time.monotonic() - since,
        )

    @property
    def is_empty(self) -> bool:
        return not (self.ray_jobs or self.pods)


class World:
    """All jobs."""

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}
        self._phases: dict[Key, str] = {}

    def entry(self, key: Key) -> Entry:
        return self.entries.setdefault(key, Entry())

    def forget(self, key: Key) -> None:
        """The job is no more."""
        self.entries.pop(key, None)
        self.count_phase(key, None)
        metrics.drop_progress((key.namespace, key.kind, key.name))

    def rest(self, key: Key) -> None:
        """Nothing is going on with the job."""
        entry = self.entries.get(key)
        if entry is not None and entry.is_empty:
            del self.entries[key]

    def count_phase(self, key: Key, phase: str | None) -> None:
        """Keeps the gauge of jobs by phase. None: the job is no more."""
        before = self._phases.pop(key, None)
        if phase is not None:
            self._phases[key] = phase
        if before != phase:
            if before is not None:
                metrics.JOBS.labels(key.kind, before).dec()
            if phase is not None:
                metrics.JOBS.labels(key.kind, phase).inc()

    def phases(self) -> Counter[str]:
        return Counter(self._phases.values())

    # ---- what watches tell ------------------------------------------------------------------

    def see_job(self, key: Key, body: Object) -> bool:
        """Takes a job's newer version; whether it was one. The answer to a write of our own comes
        back as an event, and is nothing new then."""
        entry = self.entry(key)
        if entry.body is not None and version(entry.body) >= version(body):
            return False
        entry.body = body
        return True

    def see_ray_job(self, key: Key, item: Object, *, deleted: bool) -> bool:
        """Whether anything changed that decisions look at."""
        return _see(self.entry(key).ray_jobs, item, observed.ray_job(item), deleted=deleted)

    def expect_ray_job(self, key: Key, item: Object) -> None:
        """Takes a RayJob as it was sent, without a status. It may have been there before, with a
        status that a watch has told meanwhile: that stays."""
        known = self.entry(key).ray_jobs
        known.setdefault(item["metadata"]["name"], (version(item), observed.ray_job(item)))

    def see_pod(self, key: Key, item: Object, *, deleted: bool) -> bool:
        """Whether anything changed that decisions look at."""
        entry, pod = self.entry(key), observed.pod(item)
        is_evidence = deleted and bool(pod.troubles)
        if is_evidence:
            entry.gone[pod.name] = pod
        return _see(entry.pods, item, pod, deleted=deleted) or is_evidence

    def see_workload(self, key: Key, ray_job: str, item: Object, *, deleted: bool) -> None:
        workloads = self.entry(key).workloads
        workloads.pop(ray_job, None)
        if not deleted:
            workloads[ray_job] = observed.workload(item)

    def read_afresh(self, key: Key, ray_jobs: Iterable[Object], pods: Iterable[Object]) -> None:
        """Puts what was read in the place of what watches told: they may have missed something."""
        entry = self.entry(key)
        entry.ray_jobs = {
            item["metadata"]["name"]: (version(item), observed.ray_job(item)) for item in ray_jobs
        }
        known = {item["metadata"]["name"]: (version(item), observed.pod(item)) for item in pods}
        for name, (_, pod) in entry.pods.items():
            if name not in known and pod.troubles:
                entry.gone[name] = pod
        entry.pods = known
        entry.read_at = time.monotonic()


def _see(known: dict[str, tuple[int, Any]], item: Object, made: Any, *, deleted: bool) -> bool:
    name, number = item["metadata"]["name"], version(item)
    before = known.get(name)
    if before is not None and before[0] > number:
        return False
    if deleted:
        return known.pop(name, None) is not None
    known[name] = (number, made)
    return before is None or before[1] != made


def version(item: Mapping[str, Any]) -> int:
    """The resource version as a number: comparable since Kubernetes 1.35 (KEP-5504), and in
    practice ever since."""
    text = item["metadata"].get("resourceVersion") or ""
    return int(text) if text.isdecimal() else 0


def key_of_job(item: Mapping[str, Any]) -> Key:
    metadata = item["metadata"]
    return Key(item["kind"], metadata["namespace"], metadata["name"])


def key_of_part(item: Mapping[str, Any]) -> Key | None:
    """The job that a RayJob or a pod belongs to, by its labels; None: no job's."""
    metadata = item["metadata"]
    labels = metadata.get("labels") or {}
    kind, name = labels.get(f"{GROUP}/kind"), labels.get(f"{GROUP}/job")
    return Key(kind, metadata["namespace"], name) if kind and name else None


def key_of_ray_job(namespace: str, name: str) -> Key:
    """The job whose attempt a RayJob of this name would be: `rayjob.ray_job_name` backwards."""
    job, _, attempt = name.rpartition("-")
    return Key("AlignmentJob" if attempt.startswith("a") else "FineTuneJob", namespace, job)
