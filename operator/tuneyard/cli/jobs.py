"""Jobs, pods and events as the API server has them, reduced to what is shown and decided by."""

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
    """One of the two kinds of jobs."""

    name: str
    plural: str


KINDS: Mapping[str, Kind] = {
    "finetune": Kind("FineTuneJob", "finetunejobs"),
    "alignment": Kind("AlignmentJob", "alignmentjobs"),
}
"""By the word that `--kind` takes."""


@dataclass(frozen=True)
class Found:
    """A job."""

    kind: Kind
    name: str
    namespace: str
    uid: str
    generation: int
    created: datetime
    deleting: bool
    """Deletion was asked for; the operator is clearing up."""
    suspend: bool
    """What the spec asks for, whatever became of it yet."""
    cancel: bool
    output_uri: str
    erases: bool
    """Deleting the job deletes its output too."""
    status: JobStatus | None
    """None: written by another version of the operator, and not readable by this one."""
    raw_status: Object
    """As it was stored."""

    @property
    def phase(self) -> str:
        """The status in one word."""
        if self.status is None:
            return str(self.raw_status.get("phase") or "Unreadable")
        return self.status.phase or "Pending"

    @property
    def is_finished(self) -> bool:
        """Whether nothing will run any more. A job that could not be planned gets another chance
        when its spec changes."""
        if self.phase not in ("Succeeded", "Failed"):
            return False
        planned = self.raw_status.get("planDigest") is not None
        return planned or self.raw_status.get("observedGeneration") == self.generation

    @property
    def was_canceled(self) -> bool:
        failure = self.status.failure if self.status else None
        return failure is not None and failure.reason == "Canceled"

    @property
    def is_under_way(self) -> bool:
        """Whether an attempt has pods, or is about to."""
        return self._open_attempt is not None

    @property
    def is_running(self) -> bool:
        """Whether an attempt's driver runs: it has something to checkpoint."""
        attempt = self._open_attempt
        return attempt is not None and bool(attempt.get("runningAt"))

    @property
    def _open_attempt(self) -> Object | None:
        attempts = self.raw_status.get("attempts") or []
        ended = not attempts or attempts[-1].get("finishedAt") or self.is_finished
        return None if ended else attempts[-1]


def found(kind: Kind, item: Object) -> Found:
    """A job from its JSON; whatever the API server lets pass can be read."""
    metadata, spec = item["metadata"], item.get("spec") or {}
    policy, output = spec.get("runPolicy") or {}, spec.get("output") or {}
    status = item.get("status") or {}
    return Found(
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
        erases=output.get("deletionPolicy") == "Delete",
        status=_status(status),
        raw_status=status,
    )


def _status(value: Object) -> JobStatus | None:
    try:
        return JobStatus.model_validate(value)
    except ValidationError:
        return None


def to_json(job: Found) -> dict[str, Any]:
    """What `--json` prints of a job."""
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
    """One pod of a job."""

    name: str
    uid: str
    attempt: int
    """0: it belongs to none."""
    role: str
    """head, worker, driver or erase."""
    container: str
    """The one whose log matters."""
    created: str
    started: bool
    """Whether its container ever ran: before that there is no log."""
    running: bool
    obstacle: str
    """Why it does not start; "": nothing is known."""


_CONTAINERS = {"head": "ray-head", "worker": "ray-worker", "driver": "ray-job-submitter"}


def pod(item: Object) -> Pod:
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
        obstacle=_obstacle(status, state),
    )


def _role(labels: Object, name: str) -> str:
    node_type = labels.get("ray.io/node-type")
    if node_type:
        return str(node_type)
    return "erase" if name.split("-")[-2:-1] in (["erase"], ["aerase"]) else "driver"


def _obstacle(status: Object, state: Object) -> str:
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return str(condition.get("message") or condition.get("reason") or "")
    waiting = state.get("waiting") or {}
    return ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))


class Event(NamedTuple):
    """One event about a job."""

    time: datetime
    """When it was last seen."""
    warns: bool
    reason: str
    message: str
    times: int


def event(item: Object) -> Event:
    """An event from core/v1's JSON; the newer API's fields stand in it under other names."""
    series = item.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        item.get("lastTimestamp"),
        item.get("eventTime"),
        item["metadata"].get("creationTimestamp"),
    )
    return Event(
        time=time_of(next(filter(None, times))),
        warns=item.get("type") == "Warning",
        reason=str(item.get("reason") or ""),
        message=str(item.get("message") or ""),
        times=int(series.get("count") or item.get("count") or 1),
    )


def time_of(text: str) -> datetime:
    """A moment from RFC 3339; one without a zone is UTC."""
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def newest(pods: Sequence[Pod], role: str, attempt: int | None) -> list[Pod]:
    """The pods of one role and attempt (None: the newest that has any), in order of their names. Of
    several drivers, of which KubeRay starts another when one is lost, the last."""
    mine = [pod for pod in pods if pod.role == role and pod.attempt]
    last = attempt if attempt is not None else max((pod.attempt for pod in mine), default=0)
    mine = sorted((pod for pod in mine if pod.attempt == last), key=lambda pod: pod.name)
    return mine if role != "driver" else sorted(mine, key=lambda pod: pod.created)[-1:]
