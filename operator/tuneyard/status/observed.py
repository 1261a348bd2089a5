"""What was seen of a job's objects, reduced to what decisions need; made from Kubernetes' JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tuneyard.api.meta import GROUP
from tuneyard.api.progress import Post

Object = Mapping[str, Any]

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""KubeRay's job states that are final."""
_MESSAGE = 4096
"""Characters of a message that are kept, from its end: KubeRay's carry the tail of a log."""


class RayJob(NamedTuple):
    """One attempt's RayJob."""

    name: str
    uid: str
    attempt: int
    deleting: bool
    """Deletion was asked for; it is still there."""
    owner: str | None
    """Its controller's uid; None: it has none."""
    suspended: bool
    """Its cluster shall not exist: a queue holds it back or took its quota away."""
    job_status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED; "" before there is one."""
    deployment_status: str
    """Initializing, Running, Complete, Failed, ValidationFailed, Suspending, Suspended, ..."""
    reason: str
    message: str
    cluster: str
    """The RayCluster's name; "" before there is one."""
    start_time: str | None
    """When KubeRay began (RFC 3339); None: it did not."""
    cluster_failure: str
    """Why the RayCluster could not create pods; "": it could."""

    @property
    def ended(self) -> bool:
        return self.job_status in ENDED or self.deployment_status in (
            "Complete",
            "Failed",
            "ValidationFailed",
        )

    @property
    def running(self) -> bool:
        return self.job_status == "RUNNING" and self.deployment_status == "Running"

    @property
    def withdrawn(self) -> bool:
        """A queue took its cluster away, or is about to."""
        return self.suspended or self.deployment_status in ("Suspending", "Suspended")


class Trouble(NamedTuple):
    """What is wrong with a pod or one of its containers."""

    reason: str
    """Kubernetes' word: OOMKilled, ImagePullBackOff, Unschedulable, Evicted, ..."""
    message: str
    container: str = ""
    """The container; "" for the pod as a whole."""


class Pod(NamedTuple):
    """One pod of an attempt."""

    name: str
    attempt: int
    role: str
    """head, worker, submitter or erase."""
    phase: str
    deleting: bool
    troubles: tuple[Trouble, ...]


class Workload(NamedTuple):
    """Kueue's view of an attempt."""

    admitted: bool
    message: str
    """Why it waits, or why it was evicted; "": it does neither."""


class Obstacle(NamedTuple):
    """Why the API server refused the attempt's objects."""

    code: int
    """HTTP status."""
    reason: str
    """Kubernetes' word: Forbidden, NotFound, Invalid, ..."""
    message: str


@dataclass(frozen=True)
class Seen:
    """Everything that bears on one job at one moment."""

    ray_jobs: tuple[RayJob, ...] = ()
    pods: tuple[Pod, ...] = ()
    gone: tuple[Pod, ...] = ()
    """Pods of the current attempt that are no more, as they last were."""
    workload: Workload | None = None
    """None: no queue has taken notice."""
    warnings: tuple[str, ...] = ()
    """Texts of the RayCluster's warning events; asked for only while an attempt does not start."""
    obstacle: Obstacle | None = None
    """None: nothing was refused."""
    post: Post | None = None
    """The newest post of the current attempt."""
    missing_seconds: float = 0.0
    """For how long the current attempt's RayJob, once there, has not been found."""

    def ray_job(self, attempt: int) -> RayJob | None:
        return next((item for item in self.ray_jobs if item.attempt == attempt), None)


# ---- from Kubernetes' JSON ----------------------------------------------------------------------


def attempt_of(item: Object) -> int:
    """The attempt that an object belongs to; 0 if its label says none."""
    text = (item["metadata"].get("labels") or {}).get(f"{GROUP}/attempt", "")
    return int(text) if text.isdecimal() else 0


def ray_job(item: Object) -> RayJob:
    metadata, status = item["metadata"], item.get("status") or {}
    owners = (o["uid"] for o in metadata.get("ownerReferences") or () if o.get("controller"))
    return RayJob(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=attempt_of(item),
        deleting="deletionTimestamp" in metadata,
        owner=next(owners, None),
        suspended=bool((item.get("spec") or {}).get("suspend")),
        job_status=status.get("jobStatus") or "",
        deployment_status=status.get("jobDeploymentStatus") or "",
        reason=status.get("reason") or "",
        message=(status.get("message") or "")[-_MESSAGE:],
        cluster=status.get("rayClusterName") or "",
        start_time=status.get("startTime"),
        cluster_failure=_cluster_failure(status.get("rayClusterStatus") or {}),
    )


def _cluster_failure(status: Object) -> str:
    for condition in status.get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            text = condition.get("message") or condition.get("reason") or ""
            return ": ".join(str(text).splitlines())
    return str(status.get("reason") or "") if status.get("state") == "failed" else ""


def pod(item: Object) -> Pod:
    metadata, status = item["metadata"], item.get("status") or {}
    labels = metadata.get("labels") or {}
    return Pod(
        name=metadata["name"],
        attempt=attempt_of(item),
        role=_role(labels),
        phase=status.get("phase") or "Pending",
        deleting="deletionTimestamp" in metadata,
        troubles=tuple(_troubles(status)),
    )


def _role(labels: Object) -> str:
    """KubeRay labels its nodes' pods; of the others, those of an attempt submit."""
    node_type = labels.get("ray.io/node-type")
    return str(node_type or ("submitter" if f"{GROUP}/attempt" in labels else "erase"))


def _troubles(status: Object) -> Iterator[Trouble]:
    if status.get("reason"):
        yield Trouble(status["reason"], status.get("message") or "")
    for condition in status.get("conditions") or ():
        type_, value = condition.get("type"), condition.get("status")
        if type_ == "PodScheduled" and value == "False":
            yield Trouble(condition.get("reason") or "", condition.get("message") or "")
        if type_ == "DisruptionTarget" and value == "True":
            yield Trouble("DisruptionTarget", condition.get("message") or "")
    states = [
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ]
    for container in states:
        state = container.get("state") or {}
        waiting, ended = state.get("waiting"), state.get("terminated")
        if waiting and waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            yield Trouble(waiting["reason"], waiting.get("message") or "", container["name"])
        last = ended or (container.get("lastState") or {}).get("terminated")
        if last and last.get("exitCode"):
            text = last.get("message") or f"exit code {last['exitCode']}"
            yield Trouble(last.get("reason") or "Error", text, container["name"])


def workload(item: Object) -> Workload:
    conditions = {c["type"]: c for c in (item.get("status") or {}).get("conditions") or ()}
    admitted = conditions.get("Admitted", {}).get("status") == "True"
    evicted, reserved = conditions.get("Evicted", {}), conditions.get("QuotaReserved", {})
    if evicted.get("status") == "True":
        message = evicted.get("message")
    else:
        message = None if reserved.get("status") == "True" else reserved.get("message")
    return Workload(admitted=admitted, message=message or "")
