"""The observed state of a job's objects, reduced from Kubernetes' JSON to what decisions need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from tuneyard.api.meta import GROUP
from tuneyard.api.progress import Post
from tuneyard.api.status import MemoryEstimate
from tuneyard.rendering.names import QUEUE_LABEL, ROLE_LABEL, UID_LABEL
from tuneyard.status.times import moment_of

Object = Mapping[str, Any]

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""KubeRay's job states that are final."""
_MESSAGE = 4096
"""Characters kept of a message, from its end: KubeRay's messages carry the tail of a log."""
LOST_SECONDS = 300.0
"""How long after its deletion time an object may still exist before it counts as lost. The deletion
time of a pod includes its grace period: a pod that exists 5 minutes later is on a node that does
not respond."""


class RayJob(NamedTuple):
    """One attempt's RayJob."""

    name: str
    uid: str
    attempt: int
    deleting: bool
    """Whether the RayJob is marked for deletion."""
    owner: str | None
    """UID of the controller; None: the RayJob has none."""
    suspended: bool
    """`spec.suspend`: a queue evicted or has not admitted the RayJob, which then has no cluster."""
    job_status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED; "": not set yet."""
    deployment_status: str
    """Initializing, Running, Complete, Failed, ValidationFailed, Suspending, Suspended, ..."""
    reason: str
    message: str
    cluster: str
    """Name of the RayCluster; "": the cluster does not exist yet."""
    start_time: str | None
    """When KubeRay started the job (RFC 3339); None: not yet."""
    cluster_failure: str
    """Why the RayCluster could not create pods; "": no problem."""
    workers: int
    """Workers that it asks for; KubeRay starts the driver once all of them run."""
    min_workers: int
    """Fewest workers that the job continues with; `workers` unless the job is elastic."""
    queue: str | None
    """The Kueue LocalQueue of its label, which Kueue sets if the namespace has a default queue.
    None: no queue."""
    deletion_time: str | None = None
    """When Kubernetes may remove it (RFC 3339); None: it is not marked for deletion."""
    creation_time: str | None = None
    """When it was created (RFC 3339)."""

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
    def evicted_by_queue(self) -> bool:
        """Whether a queue has removed the RayJob's cluster, or is removing it."""
        return self.suspended or self.deployment_status in ("Suspending", "Suspended")


class Preparation(NamedTuple):
    """The Job that prepares the data of one attempt before its RayJob exists."""

    name: str
    uid: str
    attempt: int
    deleting: bool
    """Whether the Job is marked for deletion."""
    owner: str | None
    """UID of the controller; None: the Job has none."""
    suspended: bool
    """`spec.suspend`: a queue evicted or has not admitted the Job, which then has no pod."""
    succeeded: bool
    failed: bool
    """Whether its pod failed or was lost. Its pod may still be ending."""
    message: str
    """Why the Job failed; "": it did not."""
    start_time: str | None = None
    """When it was started, or admitted by a queue (RFC 3339). None: not yet."""
    deletion_time: str | None = None
    """When Kubernetes may remove it (RFC 3339); None: it is not marked for deletion."""
    creation_time: str | None = None
    """When it was created (RFC 3339)."""

    @property
    def ended(self) -> bool:
        return self.succeeded or self.failed


class PodProblem(NamedTuple):
    """A problem of a pod or one of its containers."""

    reason: str
    """Kubernetes' reason: OOMKilled, ImagePullBackOff, Unschedulable, Evicted, ..."""
    message: str
    container: str = ""
    """The container; "" for the pod as a whole."""
    exit_code: int = 0
    """The exit code of a container that has ended; 0: it runs, or it succeeded."""


class Pod(NamedTuple):
    """One pod of an attempt."""

    name: str
    attempt: int
    role: str
    """head, worker, submitter, prepare or erase."""
    phase: str
    deleting: bool
    problems: tuple[PodProblem, ...]
    placed_at: str | None
    """When the pod got a node (RFC 3339); None: it has none."""

    @property
    def has_ended(self) -> bool:
        return self.deleting or self.phase in ("Succeeded", "Failed")

    deletion_time: str | None = None
    """When its grace period ends (RFC 3339); None: the pod is not marked for deletion."""
    node: str = ""
    """"": the pod has no node yet."""
    job_uid: str = ""
    """UID of the job; "": release 0.2 started the pod."""
    created: str = ""
    """When the pod was created (RFC 3339)."""

    def belongs_to(self, job_uid: str, job_created: str) -> bool:
        """Return whether the pod, which names a job with this name, belongs to the job with this
        UID. A pod without a UID does, unless it is older than the job."""
        if self.job_uid:
            return self.job_uid == job_uid
        return not self.created or self.created >= job_created


Item = RayJob | Preparation | Pod
"""An object of a job that a next attempt waits for."""


def is_lost(item: Item, now: datetime) -> bool:
    """Return whether an object has existed for too long after its deletion time to be waited for.
    Whatever still runs in a lost pod cannot write to the output: a newer attempt claims it."""
    if item.deletion_time is None:
        return False
    return (now - moment_of(item.deletion_time)).total_seconds() > LOST_SECONDS


def is_erasing(item: Item) -> bool:
    """Return whether an object is a pod that erases the output."""
    return isinstance(item, Pod) and item.role == "erase"


def names_of(items: Iterable[Item]) -> str:
    """Return the names of at most three objects, with the nodes of pods, for a message."""
    names = sorted(
        f"{item.name} on node {item.node}" if isinstance(item, Pod) and item.node else item.name
        for item in items
    )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class Workload(NamedTuple):
    """Kueue's view of an attempt."""

    admitted: bool
    message: str
    """Why the attempt waits or was evicted; "": neither."""


NOT_STORED = "PlanNotStored"
"""The reason of a CreateError: no attempt has begun with the recorded plan, which is not
stored."""


class CreateError(NamedTuple):
    """Why an attempt's objects could not be created."""

    code: int
    """HTTP status. 0: the operator did not send them."""
    reason: str
    """Kubernetes' reason: Forbidden, NotFound, Invalid, ...; or PlanLost, PlanUnreadable,
    NOT_STORED."""
    message: str


@dataclass(frozen=True)
class ObservedState:
    """The state of one job's objects at one moment."""

    ray_jobs: tuple[RayJob, ...] = ()
    preparations: tuple[Preparation, ...] = ()
    pods: tuple[Pod, ...] = ()
    foreign_pods: tuple[Pod, ...] = ()
    """Pods of a deleted job with the same name."""
    deleted_pods: tuple[Pod, ...] = ()
    """Deleted pods of the current attempt, in their last state."""
    workload: Workload | None = None
    """None: no queue has processed the attempt."""
    warnings: tuple[str, ...] = ()
    """Messages of the warning events of the object that creates the pods, a RayCluster or a Job;
    read only while an attempt does not start."""
    create_error: CreateError | None = None
    """None: the API server refused nothing."""
    post: Post | None = None
    """The newest post of the current attempt."""
    memory: MemoryEstimate | None = None
    """The memory that was estimated for the newest attempt. None: its driver has not asked since
    the operator started, and the status keeps the estimate that it has."""
    unknown_fields: tuple[str, ...] = ()
    """The spec fields that this version does not know and plans without: after a rollback, the job
    may be of a newer one."""
    missing_seconds: float = 0.0
    """For how long the current attempt's object, which existed, has been missing: its RayJob, or
    before that the Job that prepares its data."""

    def ray_job(self, attempt: int) -> RayJob | None:
        """Return the RayJob of an attempt; None: it does not exist."""
        return next((item for item in self.ray_jobs if item.attempt == attempt), None)

    def preparation(self, attempt: int) -> Preparation | None:
        """Return the Job that prepares the data of an attempt; None: it does not exist."""
        return next((item for item in self.preparations if item.attempt == attempt), None)


# ---- from Kubernetes' JSON ----------------------------------------------------------------------


def attempt_of(item: Object) -> int:
    """Return the attempt that an object's label names; 0: it has no such label."""
    text = (item["metadata"].get("labels") or {}).get(f"{GROUP}/attempt", "")
    return int(text) if text.isdecimal() else 0


def ray_job(item: Object) -> RayJob:
    """Return the reduced form of a RayJob."""
    metadata, status = item["metadata"], item.get("status") or {}
    workers, min_workers = _group_size(item.get("spec") or {})
    return RayJob(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=attempt_of(item),
        deleting="deletionTimestamp" in metadata,
        owner=_owner(metadata),
        suspended=bool((item.get("spec") or {}).get("suspend")),
        job_status=status.get("jobStatus") or "",
        deployment_status=status.get("jobDeploymentStatus") or "",
        reason=status.get("reason") or "",
        message=(status.get("message") or "")[-_MESSAGE:],
        cluster=status.get("rayClusterName") or "",
        start_time=status.get("startTime"),
        cluster_failure=_cluster_failure(status.get("rayClusterStatus") or {}),
        workers=workers,
        min_workers=min_workers,
        queue=(metadata.get("labels") or {}).get(QUEUE_LABEL) or None,
        deletion_time=metadata.get("deletionTimestamp"),
        creation_time=metadata.get("creationTimestamp"),
    )


def preparation(item: Object) -> Preparation:
    """Return the reduced form of a Job that prepares data."""
    metadata, status = item["metadata"], item.get("status") or {}
    conditions = status.get("conditions") or ()
    holds = {c["type"]: c.get("message") or "" for c in conditions if c.get("status") == "True"}
    # A Job with a pod on a lost node has FailureTarget and never Failed.
    failed = [type_ for type_ in ("Failed", "FailureTarget") if type_ in holds]
    return Preparation(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=attempt_of(item),
        deleting="deletionTimestamp" in metadata,
        owner=_owner(metadata),
        suspended=bool((item.get("spec") or {}).get("suspend")),
        succeeded="Complete" in holds,
        failed=bool(failed),
        message=holds[failed[0]] if failed else "",
        start_time=status.get("startTime"),
        deletion_time=metadata.get("deletionTimestamp"),
        creation_time=metadata.get("creationTimestamp"),
    )


def _owner(metadata: Object) -> str | None:
    owners = (o["uid"] for o in metadata.get("ownerReferences") or () if o.get("controller"))
    return next(owners, None)


def _group_size(spec: Object) -> tuple[int, int]:
    """Return the workers that a RayJob asks for, and the fewest. 0, 0: another client's RayJob has
    no such group."""
    groups: list[Object] = (spec.get("rayClusterSpec") or {}).get("workerGroupSpecs") or [{}]
    workers = int(groups[0].get("replicas") or 0)
    return workers, int(groups[0].get("minReplicas", workers))


def _cluster_failure(status: Object) -> str:
    for condition in status.get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            text = condition.get("message") or condition.get("reason") or ""
            return ": ".join(str(text).splitlines())
    return str(status.get("reason") or "") if status.get("state") == "failed" else ""


def pod(item: Object) -> Pod:
    """Return the reduced form of a pod."""
    metadata, status = item["metadata"], item.get("status") or {}
    labels = metadata.get("labels") or {}
    return Pod(
        name=metadata["name"],
        attempt=attempt_of(item),
        role=_role(labels),
        phase=status.get("phase") or "Pending",
        deleting="deletionTimestamp" in metadata,
        problems=tuple(_problems(status)),
        placed_at=_placed_at(status),
        deletion_time=metadata.get("deletionTimestamp"),
        node=(item.get("spec") or {}).get("nodeName") or "",
        job_uid=labels.get(UID_LABEL) or "",
        created=metadata.get("creationTimestamp") or "",
    )


def _placed_at(status: Object) -> str | None:
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "True":
            time: str | None = condition.get("lastTransitionTime")
            return time
    return None


def _role(labels: Object) -> str:
    """Return the role of a pod. KubeRay labels the pods of Ray nodes; of the other pods without a
    role, the one with an attempt label is the submitter."""
    role = labels.get(ROLE_LABEL) or labels.get("ray.io/node-type")
    return str(role or ("submitter" if f"{GROUP}/attempt" in labels else "erase"))


def _problems(status: Object) -> Iterator[PodProblem]:
    if status.get("reason"):
        yield PodProblem(status["reason"], status.get("message") or "")
    for condition in status.get("conditions") or ():
        type_, value = condition.get("type"), condition.get("status")
        if type_ == "PodScheduled" and value == "False":
            yield PodProblem(condition.get("reason") or "", condition.get("message") or "")
        if type_ == "DisruptionTarget" and value == "True":
            yield PodProblem("DisruptionTarget", condition.get("message") or "")
    states = [
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ]
    for container in states:
        state = container.get("state") or {}
        waiting, ended = state.get("waiting"), state.get("terminated")
        if waiting and waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            yield PodProblem(waiting["reason"], waiting.get("message") or "", container["name"])
        last = ended or (container.get("lastState") or {}).get("terminated")
        if last and last.get("exitCode"):
            text = last.get("message") or f"exit code {last['exitCode']}"
            name, code = container["name"], int(last["exitCode"])
            yield PodProblem(last.get("reason") or "Error", text, name, code)


def workload(item: Object) -> Workload:
    """Return the reduced form of a Kueue Workload."""
    conditions = {c["type"]: c for c in (item.get("status") or {}).get("conditions") or ()}
    admitted = conditions.get("Admitted", {}).get("status") == "True"
    evicted, reserved = conditions.get("Evicted", {}), conditions.get("QuotaReserved", {})
    if evicted.get("status") == "True":
        message = evicted.get("message")
    else:
        message = None if reserved.get("status") == "True" else reserved.get("message")
    return Workload(admitted=admitted, message=message or "")
