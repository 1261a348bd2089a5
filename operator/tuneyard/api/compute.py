"""What a job runs on, and how it is run."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.meta import Model, ObjectName, Rule
from tuneyard.api.quantity import Quantity


class Toleration(Model):
    """A Kubernetes toleration."""

    key: str | None = Field(default=None, max_length=317)
    """The taint's key; None with operator Exists tolerates every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How the value is compared."""
    value: str | None = Field(default=None, max_length=63)
    """The taint's value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; None: all."""
    toleration_seconds: int | None = Field(default=None, ge=0)
    """How long a NoExecute taint is tolerated, in seconds; None: for ever."""


class Compute(Model):
    """The workers of a job. On one machine only `workers` matters; the rest describes pods."""

    profile: ObjectName | None = None
    """A preset that the platform team defined; the fields below override it. None: no preset."""
    workers: int | None = Field(default=None, ge=1, le=1024)
    """Data-parallel workers. None: the profile's number, else 1."""
    min_workers: int | None = Field(default=None, ge=1, le=1024)
    """Go on with as few as this when workers are lost (elastic). None: no fewer than `workers`."""
    gpus_per_worker: int | None = Field(default=None, ge=0, le=16)
    """GPUs of each worker. None: the profile's number, else 0 on a cluster and what there is on one
    machine."""
    cpus_per_worker: Quantity | None = None
    """CPU of each worker. None: the profile's, else 4."""
    memory: Quantity | None = None
    """Memory of each worker. None: the profile's, else 16Gi."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, within `memory`. None: the profile's, else 2Gi."""
    gpu_resource: str = Field(default="nvidia.com/gpu", max_length=317)
    """The extended resource that stands for a GPU."""
    node_selector: dict[str, Annotated[str, Field(max_length=63)]] = Field(
        default={}, max_length=32
    )
    """Labels of the nodes that workers may run on."""
    tolerations: list[Toleration] = Field(default=[], max_length=32)
    """Taints that workers tolerate."""
    priority_class: ObjectName | None = None
    """The pods' PriorityClass. None: the cluster's default."""
    image: str | None = Field(default=None, max_length=512)
    """The trainer image. None: the operator's default."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.minWorkers) || !has(self.workers) || self.minWorkers <= self.workers",
            holds=lambda compute: (
                compute.min_workers is None
                or compute.workers is None
                or compute.min_workers <= compute.workers
            ),
            message="must not exceed workers: lower minWorkers or raise workers",
            path="minWorkers",
            reads=("minWorkers", "workers"),
            found=lambda compute: f"{compute.min_workers} above {compute.workers}",
        ),
    )


class RunPolicy(Model):
    """How a job is run: the one part of a spec that may change while it runs."""

    suspend: bool = False
    """True: stop at the next checkpoint and release the cluster; False again: go on from there."""
    cancel: bool = False
    """True: end the job for good, as Failed with reason Canceled; finished stages stay."""
    max_attempts: int = Field(default=3, ge=1, le=100)
    """Attempts in all, the first included, before a retryable failure becomes final. Attempts that
    ended because the job was suspended or its pods were preempted do not count."""
    backoff_seconds: int = Field(default=10, ge=0, le=3600)
    """Wait before the second attempt, in seconds; doubled for each further one, at most an hour."""
    deadline_seconds: int | None = Field(default=None, ge=1)
    """Limit of the time that the attempts take together, in seconds. None: no limit."""
    start_deadline_seconds: int = Field(default=1800, ge=10, le=604800)
    """How long an admitted attempt's pods may take to start, in seconds."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0)
    """Delete the job this long after it finished, in seconds. None: never."""
    queue: ObjectName | None = None
    """The Kueue LocalQueue that admits the job. None: no queue."""
    workload_priority: ObjectName | None = None
    """The Kueue WorkloadPriorityClass. None: the queue's default."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.workloadPriority) || has(self.queue)",
            holds=lambda policy: policy.workload_priority is None or policy.queue is not None,
            message="needs a queue: set queue to the Kueue LocalQueue, or remove workloadPriority",
            path="workloadPriority",
            reads=("workloadPriority", "queue"),
        ),
    )
