"""Jobs, pods and events of a cluster, reduced to the fields that the commands use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic import ValidationError

from tuneyard.api.meta import GROUP
from tuneyard.api.status import JobStatus

Object = Mapping[str, Any]


class Kind(NamedTuple):
    """A kind of job."""

    name: str
    plural: str


KINDS: Mapping[str, Kind] = {
    "finetune": Kind("FineTuneJob", "finetunejobs"),
    "alignment": Kind("AlignmentJob", "alignmentjobs"),
}
"""The kinds of jobs by the value of `--kind`."""


@dataclass(frozen=True)
class JobView:
    """The fields of a job that the commands use."""

    kind: Kind
    name: str
    namespace: str
    uid: str
    generation: int
    created: datetime
    deleting: bool
    """Whether the job is being deleted and the operator still cleans up."""
    suspend: bool
    """Whether the spec requests suspension; the job may still be running."""
    cancel: bool
    """Whether the spec requests cancellation."""
    output_uri: str
    deletes_output: bool
    """Whether the output is deleted with the job."""
    finalizers: tuple[str, ...]
    """What the job waits for when it is deleted."""
    status: JobStatus | None
    """The status. None: another version of the operator wrote it, and this version cannot read
    it."""
    raw_status: Object
    """The status as JSON."""

    @property
    def phase(self) -> str:
        """The state of the job in one word."""
        if self.status is None:
            return str(self.raw_status.get("phase") or "Unreadable")
        return self.status.phase or "Pending"

    @property
    def is_finished(self) -> bool:
        """Whether no attempt will run any more.

        A job that could not be planned is planned again when its spec changes: it is finished only
        if the operator has observed the newest spec.
        """
        if self.phase not in ("Succeeded", "Failed"):
            return False
        planned = self.raw_status.get("planDigest") is not None
        return planned or self.raw_status.get("observedGeneration") == self.generation

    @property
    def was_canceled(self) -> bool:
        failure = self.status.failure if self.status else None
        return failure is not None and failure.reason == "Canceled"

    @property
    def has_begun(self) -> bool:
        """Whether the job has had an attempt; only then it has an output."""
        return bool(self.raw_status.get("attempts"))

    @property
    def newest_attempt(self) -> int:
        """The number of the newest attempt; 0: there is none. A status does not list all of more
        than a hundred attempts."""
        attempts = self.raw_status.get("attempts") or []
        return int(attempts[-1]["number"]) if attempts else 0

    @property
    def has_open_attempt(self) -> bool:
        """Whether an attempt has pods, or is about to have them."""
        return self._open_attempt is not None

    @property
    def has_running_driver(self) -> bool:
        """Whether an attempt's driver runs; only then a checkpoint can be written."""
        attempt = self._open_attempt
        return attempt is not None and bool(attempt.get("runningAt"))

    @property
    def _open_attempt(self) -> Object | None:
        attempts = self.raw_status.get("attempts") or []
        ended = not attempts or attempts[-1].get("finishedAt") or self.is_finished
        return None if ended else attempts[-1]


def read_job(kind: Kind, item: Object) -> JobView:
    """Return a job from the API server's JSON. Any object that the API server accepts is read."""
    metadata, spec = item["metadata"], item.get("spec") or {}
    policy, output = spec.get("runPolicy") or {}, spec.get("output") or {}
    status = item.get("status") or {}
    return JobView(
        kind=kind,
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=metadata["generation"],
        created=time_of(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        suspend=bool(policy.get("suspend")),
        cancel=bool(policy.get("cancel")),
        output_uri=str(output.get("uri") or ""),
        deletes_output=output.get("deletionPolicy") == "Delete",
        finalizers=tuple(metadata.get("finalizers") or ()),
        status=_status(status),
        raw_status=status,
    )


def _status(value: Object) -> JobStatus | None:
    try:
        return JobStatus.model_validate(value)
    except ValidationError:
        return None


def to_json(job: JobView) -> dict[str, Any]:
    """Return a job as `--json` prints it."""
    return {
        "kind": job.kind.name,
        "namespace": job.namespace,
        "name": job.name,
        "uid": job.uid,
        "createdAt": job.created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "deleting": job.deleting,
        "finished": job.is_finished,
        "status": dict(job.raw_status),
    }


class Pod(NamedTuple):
    """A pod of a job."""

    name: str
    uid: str
    attempt: int
    """Number of the attempt. 0: the pod belongs to no attempt."""
    role: str
    """head, worker, driver (KubeRay's submitter, whose log is the driver's) or erase."""
    container: str
    """Name of the container whose log is shown."""
    created: str
    started: bool
    """Whether the container has started; only then it has a log."""
    running: bool
    start_problem: str
    """Why the pod does not start. "": unknown."""


_CONTAINERS = {"head": "ray-head", "worker": "ray-worker", "driver": "ray-job-submitter"}


def read_pod(item: Object) -> Pod:
    """Return a pod from the API server's JSON."""
    metadata, status = item["metadata"], item.get("status") or {}
    labels = metadata.get("labels") or {}
    role = _role(labels, metadata["name"])
    names = [container["name"] for container in item["spec"]["containers"]]
    container = _CONTAINERS.get(role, names[0])
    if container not in names:
        container = names[0]
    states = [s["state"] for s in status.get("containerStatuses") or () if s["name"] == container]
    state: Object = states[0] if states else {}
    attempt = labels.get(f"{GROUP}/attempt", "")
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=int(attempt) if attempt.isdecimal() else 0,
        role=role,
        container=container,
        created=metadata["creationTimestamp"],
        started="running" in state or "terminated" in state,
        running="running" in state,
        start_problem=_start_problem(status, state),
    )


def _role(labels: Object, name: str) -> str:
    node_type = labels.get("ray.io/node-type")
    if node_type:
        return str(node_type)
    return "erase" if name.split("-")[-2:-1] in (["erase"], ["aerase"]) else "driver"


def _start_problem(status: Object, state: Object) -> str:
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return str(condition.get("message") or condition.get("reason") or "")
    waiting = state.get("waiting") or {}
    return ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))


class Event(NamedTuple):
    """An event of a job."""

    time: datetime
    """Time of the last occurrence."""
    is_warning: bool
    reason: str
    message: str
    occurrences: int


def read_event(item: Object) -> Event:
    """Return an event from the JSON of core/v1, which may hold the fields of events.k8s.io too."""
    series = item.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        item.get("lastTimestamp"),
        item.get("eventTime"),
        item["metadata"].get("creationTimestamp"),
    )
    return Event(
        time=time_of(next(filter(None, times))),
        is_warning=item.get("type") == "Warning",
        reason=str(item.get("reason") or ""),
        message=str(item.get("message") or ""),
        occurrences=int(series.get("count") or item.get("count") or 1),
    )


def time_of(text: str) -> datetime:
    """Return a time in RFC 3339; without a zone it is UTC."""
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def pods_of(pods: Sequence[Pod], role: str, attempt: int | None) -> list[Pod]:
    """Return the pods of one role and attempt by name. `attempt` None: the newest that has any.

    KubeRay replaces a lost driver: only the newest driver is returned.
    """
    matching = [pod for pod in pods if pod.role == role and pod.attempt]
    chosen = attempt if attempt is not None else max((pod.attempt for pod in matching), default=0)
    matching = sorted((pod for pod in matching if pod.attempt == chosen), key=lambda pod: pod.name)
    return matching if role != "driver" else sorted(matching, key=lambda pod: pod.created)[-1:]
