"""A cache of jobs and their objects, fed by the watches and reduced to what decisions need.

The cache keeps the body of a job only while the job has work left. Of a finished job it keeps the
phase alone, so that ten thousand finished jobs need little memory.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from tuneyard.api.job_facts import FitAnswer
from tuneyard.api.meta import GROUP
from tuneyard.api.progress import Post
from tuneyard.api.status import AttemptStatus, MemoryEstimate
from tuneyard.controller import metrics
from tuneyard.controller.cluster import Key, without_managed_fields
from tuneyard.manifests.manifest import KINDS
from tuneyard.planning.decision import Decision
from tuneyard.rendering.names import ray_job_of
from tuneyard.status import observed
from tuneyard.status.observe import is_preparing
from tuneyard.status.observed import (
    NOT_STORED,
    CreateError,
    Item,
    ObservedState,
    Pod,
    Preparation,
    RayJob,
    Workload,
)

Object = dict[str, Any]

MOST_DELETED_PODS = 64
"""Deleted pods of one attempt that are kept as evidence, the newest ones."""

FORMER_SECONDS = 600.0
"""How long a deleted job is remembered: ten times as long as until the next resync, which finds
objects that the watches have missed."""


class AttemptFit(NamedTuple):
    """The decision whether an attempt of a job trains."""

    attempt: int
    """Number of the attempt."""
    is_preparing: bool
    """Whether it asked before it had workers: on these it asks again, and knows their devices."""
    decision: Decision | None
    """None: it could not be decided."""

    @property
    def estimate(self) -> MemoryEstimate | None:
        """The estimate for the status. None: there is none."""
        return self.decision.estimate if self.decision else None

    @property
    def answer(self) -> FitAnswer | None:
        """The answer to the driver. None: there is none."""
        return self.decision.answer if self.decision else None


@dataclass
class CachedJob:
    """One job with work left."""

    uid: str = ""
    """UID of the job; "": no version of it is known yet."""
    created: str = ""
    """When the job was created (RFC 3339)."""
    version: int = 0
    """The newest resource version of the job that was read; the body may be a newer one, which the
    operator wrote."""
    ray_jobs: dict[str, tuple[int, RayJob]] = field(default_factory=dict)
    """By name, each with its resource version. RayJobs, Jobs and pods may be those of a deleted job
    with the same name."""
    preparations: dict[str, tuple[int, Preparation]] = field(default_factory=dict)
    """The Jobs that prepare data."""
    pods: dict[str, tuple[int, Pod]] = field(default_factory=dict)
    deleted_pods: dict[str, Pod] = field(default_factory=dict)
    """Deleted pods that had a problem, in their last state."""
    workloads: dict[str, Workload] = field(default_factory=dict)
    """By the UID of the RayJob or the Job."""
    warnings: tuple[str, ...] = ()
    create_error: CreateError | None = None
    create_failures: int = 0
    """Failed tries in a row to create the attempt's objects."""
    create_after: float = 0.0
    """When a reported create error may be tried again (monotonic)."""
    post: Post | None = None
    """The newest post of the job with this UID."""
    fit: AttemptFit | None = None
    """What was decided of the newest attempt that asked. None: none has asked since the operator
    started."""
    unknown_fields: tuple[str, ...] = ()
    """The spec fields that were left out when the job was last planned."""
    missing_since: float | None = None
    """Since when the current attempt's RayJob, or before that its Job, is missing (monotonic).
    None: it is not missing."""
    written_at: float = -math.inf
    """When the status was last written (monotonic)."""
    write_interval: float = 0.0
    """Least seconds from then until its progress may be written."""
    write_turn: float | None = None
    """When its progress may be written, as far as other jobs' writes allow it (monotonic). None:
    the interval is not over, or nothing is to be written."""
    warnings_due: float = 0.0
    """When the RayCluster's warnings may be read again (monotonic)."""
    _json: bytes | None = None
    """The body as JSON: a sixth of the memory of parsed JSON, and parsed in 20 us."""

    @property
    def body(self) -> Object | None:
        """A copy of the newest known version of the job; None: read it from the API server."""
        return None if self._json is None else json.loads(self._json)

    @body.setter
    def body(self, value: Object | None) -> None:
        if value is None:
            self._json = None
        else:
            self._json = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def waits_for_next_try(self) -> bool:
        """Whether the attempt's objects were refused, until `create_after`. A plan that was not
        stored is made again at once."""
        return self.create_error is not None and self.create_error.reason != NOT_STORED

    def observed_state(self, attempt: AttemptStatus | None) -> ObservedState:
        """Return the state that a decision is based on. `attempt`: the job's newest."""
        number = attempt.number if attempt else None
        ray_jobs = tuple(item for _, item in self.ray_jobs.values())
        preparations = tuple(item for _, item in self.preparations.values())
        prepares = attempt is not None and is_preparing(attempt)
        awaited = preparations if prepares else ray_jobs
        current = next((item for item in awaited if self._is_of(item, number)), None)
        uid = attempt and (attempt.prepare_job_uid if prepares else attempt.ray_job_uid)
        existed = attempt and uid and not attempt.finished_at
        missing = bool(existed) and current is None
        if not missing:
            self.missing_since = None
        elif self.missing_since is None:
            self.missing_since = time.monotonic()
        since = self.missing_since
        return ObservedState(
            ray_jobs=ray_jobs,
            preparations=preparations,
            pods=tuple(item for _, item in self.pods.values() if self._owns(item)),
            foreign_pods=tuple(item for _, item in self.pods.values() if not self._owns(item)),
            deleted_pods=tuple(
                item for item in self.deleted_pods.values() if self._is_of(item, number)
            ),
            workload=self.workloads.get(current.uid) if current else None,
            warnings=self.warnings,
            create_error=self.create_error,
            post=self.post,
            memory=self.fit.estimate if self.fit and self.fit.attempt == number else None,
            unknown_fields=self.unknown_fields,
            missing_seconds=0.0 if since is None else time.monotonic() - since,
        )

    def _owns(self, item: Item) -> bool:
        if isinstance(item, Pod):
            return item.belongs_to(self.uid, self.created)
        return item.owner == self.uid

    def _is_of(self, item: Item, attempt: int | None) -> bool:
        return item.attempt == attempt and self._owns(item)

    def other_objects(self, attempt: int) -> list[Item]:
        """Return the RayJobs, Jobs and pods that do not belong to this attempt of this job."""
        return [item for item in self.objects if not self._is_of(item, attempt)]

    @property
    def objects(self) -> list[Item]:
        """The job's RayJobs, Jobs and pods."""
        return [item for kept in self.collections.values() for _, item in kept.values()]

    @property
    def collections(self) -> Mapping[str, Mapping[str, tuple[int, Item]]]:
        """The objects that are watched, by their plural and their name."""
        return {"rayjobs": self.ray_jobs, "jobs": self.preparations, "pods": self.pods}

    @property
    def is_empty(self) -> bool:
        return not (self.ray_jobs or self.preparations or self.pods)


class JobCache:
    """The cache of all jobs."""

    def __init__(self) -> None:
        self.jobs: dict[Key, CachedJob] = {}
        self._phases: dict[Key, str] = {}
        self._deleted: dict[Key, float] = {}
        """When each job was dropped (monotonic), in this order, for FORMER_SECONDS."""

    def job(self, key: Key) -> CachedJob:
        """Return the cached job; a new one if there is none."""
        return self.jobs.setdefault(key, CachedJob())

    def forget(self, key: Key, uid: str | None = None) -> bool:
        """Drop a job that does not exist any more, but not a new job of its name; return whether it
        was dropped. `uid` None: no job has the name. Its objects are kept until they are
        removed: a new job of the same name waits for them."""
        cached = self.jobs.get(key)
        if cached is not None and uid and cached.uid not in ("", uid):
            return False
        self._drop(key)
        self.count_phase(key, None)
        return True

    def _drop(self, key: Key) -> None:
        """Drop what is known of a job, except its objects."""
        self._remember_deletion(key)
        cached = self.jobs.pop(key, None)
        if cached is not None and not cached.is_empty:
            self.jobs[key] = CachedJob(
                ray_jobs=cached.ray_jobs, preparations=cached.preparations, pods=cached.pods
            )
        metrics.drop_progress((key.namespace, key.kind, key.name))

    def _remember_deletion(self, key: Key) -> None:
        now = time.monotonic()
        self._deleted.pop(key, None)
        self._deleted[key] = now
        expired = takewhile(lambda item: item[1] <= now - FORMER_SECONDS, self._deleted.items())
        for each, _ in list(expired):
            del self._deleted[each]

    def had_former(self, key: Key) -> bool:
        """Return whether a job of this name was deleted recently: its objects may still exist, even
        if no watch has reported them yet."""
        return time.monotonic() - self._deleted.get(key, -math.inf) < FORMER_SECONDS

    def evict(self, key: Key) -> None:
        """Drop a job without work left, unless it still has objects."""
        cached = self.jobs.get(key)
        if cached is not None and cached.is_empty:
            del self.jobs[key]
            metrics.drop_progress((key.namespace, key.kind, key.name))

    def has_object(self, key: Key, collection: str, name: str) -> bool:
        """Return whether an object is known; `collection`: rayjobs, jobs or pods."""
        cached = self.jobs.get(key)
        return cached is not None and name in cached.collections[collection]

    def known_jobs(self) -> set[Key]:
        """Return the jobs that are cached or counted."""
        return {*self.jobs, *self._phases}

    def count_phase(self, key: Key, phase: str | None) -> None:
        """Update the gauge of jobs by phase. None: the job does not exist any more."""
        before = self._phases.pop(key, None)
        if phase is not None:
            self._phases[key] = phase
        if before != phase:
            if before is not None:
                metrics.JOBS.labels(key.kind, before).dec()
            if phase is not None:
                metrics.JOBS.labels(key.kind, phase).inc()

    # ---- updates by the watches -------------------------------------------------------------

    def update_job(self, key: Key, body: Object) -> bool:
        """Store a job's version if it is newer; return whether it was. The operator's own writes
        come back as watch events, which are not newer."""
        cached = self.job(key)
        known = cached.body
        if max(cached.version, version(known) if known else 0) >= version(body):
            return False
        self.store_job(key, body)
        return True

    def store_job(self, key: Key, body: Object) -> CachedJob:
        """Store a job's version and return the cached job. Of a deleted job with the same name only
        the objects are kept."""
        metadata = body["metadata"]
        if self.job(key).uid not in ("", metadata["uid"]):
            self._drop(key)
        cached = self.job(key)
        cached.uid, cached.created = metadata["uid"], metadata.get("creationTimestamp") or ""
        cached.body, cached.version = without_managed_fields(body), version(body)
        return cached

    def update_ray_job(self, key: Key, item: Object, *, deleted: bool) -> bool:
        """Store the object; return whether anything changed that decisions depend on."""
        return _update(self.job(key).ray_jobs, item, observed.ray_job(item), deleted=deleted)

    def update_preparation(self, key: Key, item: Object, *, deleted: bool) -> bool:
        """Store the object; return whether anything changed that decisions depend on."""
        known = self.job(key).preparations
        return _update(known, item, observed.preparation(item), deleted=deleted)

    def add_created(self, key: Key, item: Object) -> None:
        """Store a RayJob or a Job that was just created, without a status. A status that a watch
        reported earlier is kept."""
        cached = self.job(key)
        if item["kind"] == "RayJob":
            _add(cached.ray_jobs, item, observed.ray_job(item))
        else:
            _add(cached.preparations, item, observed.preparation(item))

    def update_pod(self, key: Key, item: Object, *, deleted: bool) -> bool:
        """Store the object; return whether anything changed that decisions depend on."""
        cached, pod = self.job(key), observed.pod(item)
        is_evidence = deleted and bool(pod.problems)
        if is_evidence:
            _keep_evidence(cached.deleted_pods, pod)
        return _update(cached.pods, item, pod, deleted=deleted) or is_evidence

    def update_workload(self, key: Key, owner: str, item: Object, *, deleted: bool) -> None:
        """Store the Workload of the RayJob or the Job with this UID."""
        workloads = self.job(key).workloads
        workloads.pop(owner, None)
        if not deleted:
            workloads[owner] = observed.workload(item)

    def replace_objects(
        self,
        key: Key,
        ray_jobs: Iterable[Object],
        preparations: Iterable[Object],
        pods: Iterable[Object],
    ) -> None:
        """Replace the objects of a job by those read from the API server: a watch may have missed
        an event."""
        cached = self.job(key)
        cached.ray_jobs = {
            item["metadata"]["name"]: (version(item), observed.ray_job(item)) for item in ray_jobs
        }
        cached.preparations = {
            item["metadata"]["name"]: (version(item), observed.preparation(item))
            for item in preparations
        }
        known = {item["metadata"]["name"]: (version(item), observed.pod(item)) for item in pods}
        for name, (_, pod) in cached.pods.items():
            if name not in known and pod.problems:
                _keep_evidence(cached.deleted_pods, pod)
        cached.pods = known
        current = {item.uid for _, item in cached.ray_jobs.values()}
        current |= {item.uid for _, item in cached.preparations.values()}
        cached.workloads = {n: item for n, item in cached.workloads.items() if n in current}


def _keep_evidence(deleted: dict[str, Pod], pod: Pod) -> None:
    """Store a deleted pod. Only pods of the newest attempt explain anything, and a few suffice:
    KubeRay replaces a worker that cannot start again and again."""
    for name in [name for name, other in deleted.items() if other.attempt != pod.attempt]:
        del deleted[name]
    deleted[pod.name] = pod
    while len(deleted) > MOST_DELETED_PODS:
        del deleted[next(iter(deleted))]


def _add(known: dict[str, tuple[int, Any]], item: Object, reduced: Any) -> None:
    if reduced.name not in known or known[reduced.name][1].uid != reduced.uid:
        known[reduced.name] = (version(item), reduced)


def _update(
    known: dict[str, tuple[int, Any]], item: Object, reduced: Any, *, deleted: bool
) -> bool:
    """Store `item`, whose reduced form is given; return whether the reduced form changed."""
    name, number = item["metadata"]["name"], version(item)
    before = known.get(name)
    if before is not None and before[0] > number:
        return False
    if deleted:
        return known.pop(name, None) is not None
    known[name] = (number, reduced)
    return before is None or before[1] != reduced


def version(item: Mapping[str, Any]) -> int:
    """Return the resource version as a number, so that versions can be compared. Kubernetes
    guarantees this order since 1.35 (KEP-5504); earlier versions have it too."""
    text = item["metadata"].get("resourceVersion") or ""
    return int(text) if text.isdecimal() else 0


def key_of_job(item: Mapping[str, Any]) -> Key:
    """Return the key of a job."""
    metadata = item["metadata"]
    return Key(item["kind"], metadata["namespace"], metadata["name"])


def key_from_labels(item: Mapping[str, Any]) -> Key | None:
    """Return the job that the labels of a RayJob, a Job or a pod name; None: they name none.
    Everybody who may create pods can write such labels."""
    metadata = item["metadata"]
    labels = metadata.get("labels") or {}
    kind, name = labels.get(f"{GROUP}/kind", ""), labels.get(f"{GROUP}/job")
    return Key(kind, metadata["namespace"], name) if kind in KINDS and name else None


def key_of_owner(namespace: str, kind: str, name: str) -> Key | None:
    """Return the job that a Workload's owner of this kind and name belongs to; None: to none."""
    if kind == "Job" and name != (ray_job := ray_job_of(name)):
        return key_of_ray_job(namespace, ray_job)
    return key_of_ray_job(namespace, name) if kind == "RayJob" else None


def key_of_ray_job(namespace: str, name: str) -> Key:
    """Return the job that a RayJob of this name belongs to: the inverse of `names.ray_job_name`."""
    job, _, attempt = name.rpartition("-")
    return Key("AlignmentJob" if attempt.startswith("a") else "FineTuneJob", namespace, job)
