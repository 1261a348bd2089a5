"""The workers of a job and how the job is run: `spec.compute` and `spec.runPolicy`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.meta import Model, ObjectName, Rule
from tuneyard.api.quantity import Quantity

MIN_SHARDS = 2
"""Fewest processes that can share a model: one for each GPU, or for each worker without GPUs."""


class Toleration(Model):
    """A Kubernetes toleration."""

    key: str | None = Field(default=None, max_length=317)
    """Key of the taint. None: every taint, which requires the operator Exists."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Equal: key and value must match. Exists: the key must match."""
    value: str | None = Field(default=None, max_length=63)
    """Value of the taint. None: the empty value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. None: every effect."""
    toleration_seconds: int | None = Field(default=None, ge=0)
    """How long a NoExecute taint is tolerated, in seconds. None: forever."""


class Compute(Model):
    """The workers of a job. `tuneyard run` uses `workers` and `gpusPerWorker`; the other fields
    describe pods."""

    profile: ObjectName | None = None
    """Name of a compute profile that the platform team defined; the fields below override it.
    None: no profile."""
    workers: int | None = Field(default=None, ge=1, le=1024)
    """Number of data-parallel workers. None: the profile's, else 1."""
    min_workers: int | None = Field(default=None, ge=1, le=1024)
    """Fewest workers to continue with when workers are lost or cannot start (elastic training).
    None: all `workers` are needed."""
    gpus_per_worker: int | None = Field(default=None, ge=0, le=16)
    """GPUs per worker. None: the profile's number, else 0 on a cluster, and an equal share of the
    machine's GPUs in `tuneyard run`."""
    cpus_per_worker: Quantity | None = None
    """CPU cores per worker. None: the profile's, else 4."""
    memory: Quantity | None = None
    """Memory per worker. None: the profile's, else 16Gi."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, a part of `memory`. None: the profile's, else 2Gi."""
    temporary_storage: Quantity | None = Field(default=None, exclude_if=lambda size: size is None)
    """Limit on the size of /tmp, which holds downloads, and checkpoints on their way to an object
    store. A worker that exceeds it is evicted. None: the profile's, else 200Gi."""
    # Left out of a plan where it is None: plans of 0.2.0 keep their bytes, and so their digests.
    cache_claim: ObjectName | None = Field(default=None, exclude_if=lambda claim: claim is None)
    """Name of a PersistentVolumeClaim of the job's namespace in which the pods of all jobs that
    name it share their downloads. It needs the access mode ReadWriteMany if the pods can run on
    several nodes. None: the profile's, else each pod downloads into its own /tmp."""
    # Left out of a plan where it is None, for the same reason.
    sharding: Literal["auto", "none", "fsdp"] = Field(
        default="auto", exclude_if=lambda sharding: sharding == "auto"
    )
    """How a model is laid out over the workers under `training.engine: trl` (docs/engines.md).
    none: each worker holds all of it. fsdp: each worker holds a part of it (FSDP2). auto: fsdp if
    an attempt has several GPUs and the model would take more than half of one; else none."""
    # Left out of a plan where it is auto, for the same reason.
    gpu_resource: str = Field(default="nvidia.com/gpu", max_length=317)
    """Name of the extended resource that represents a GPU."""
    gpu: str | None = Field(default=None, max_length=64, exclude_if=lambda name: name is None)
    """Name of each GPU, such as H100 or A100-80GB, or its memory, such as 48Gi, to calculate the
    job's memory. It chooses no node, and what the workers report takes precedence. None: the
    profile's, else that of the node label nvidia.com/gpu.product in nodeSelector if gpuResource is
    nvidia.com/gpu."""
    price_per_hour: float | None = Field(
        default=None, ge=0, le=1e9, exclude_if=lambda price: price is None
    )
    """Price of one worker for an hour, GPUs included, in any currency. None: the profile's, else no
    price is shown."""
    node_selector: dict[str, Annotated[str, Field(max_length=63)]] = Field(
        default={}, max_length=32
    )
    """Labels that a node must have to run workers."""
    tolerations: list[Toleration] = Field(default=[], max_length=32)
    """Tolerations of the workers' pods."""
    priority_class: ObjectName | None = None
    """PriorityClass of the pods. None: the cluster's default."""
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

    @property
    def processes_per_worker(self) -> int:
        """Processes of each worker: one for each of its GPUs, or one."""
        return max(1, self.gpus_per_worker or 0)

    def uneven_workers(self, rows: int) -> int | None:
        """Return the fewest workers, of those that an attempt may have, whose processes cannot
        share the rows equally. None: all can. A profile is not looked at."""
        most = self.workers or 1
        least = min(self.min_workers or most, most)
        attempts = range(least, most + 1)
        return next((n for n in attempts if rows % (n * self.processes_per_worker)), None)


class RunPolicy(Model):
    """How a job is run: the only part of a spec that may change after planning."""

    suspend: bool = False
    """True: stop at the next checkpoint and release the pods. False: run, or resume from that
    checkpoint."""
    cancel: bool = False
    """True: end the job for good, with phase Failed and reason Canceled. The output of finished
    stages is kept."""
    max_attempts: int = Field(default=3, ge=1, le=100)
    """Most attempts, the first one included, before a retryable failure becomes final. Attempts
    that ended because the job was suspended, its pods were preempted or an elastic job continued
    with fewer workers do not count."""
    backoff_seconds: int = Field(default=10, ge=0, le=3600)
    """Delay before the second attempt, in seconds. It doubles with each further attempt, up to an
    hour."""
    deadline_seconds: int | None = Field(default=None, ge=1)
    """Limit on the total run time of all attempts, in seconds. None: no limit."""
    start_deadline_seconds: int = Field(default=1800, ge=10, le=604800)
    """How long the pods of an admitted attempt may take to start, in seconds. An elastic job with a
    node for at least minWorkers continues with these once no other worker got a node for a sixth
    of this time."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0)
    """Delete the job this many seconds after it finished. None: never."""
    queue: ObjectName | None = None
    """Name of the Kueue LocalQueue that admits the job. None: the job's label
    kueue.x-k8s.io/queue-name, else the namespace's default queue if Kueue has one."""
    prepare_queue: ObjectName | None = None
    """Name of the Kueue LocalQueue that admits the Job which prepares the data of a job with GPUs,
    before these are asked for. None: that Job is in no queue."""
    workload_priority: ObjectName | None = None
    """Name of the Kueue WorkloadPriorityClass. None: the job's label
    kueue.x-k8s.io/priority-class, else the queue's default."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.workloadPriority) || has(self.queue)",
            holds=lambda policy: policy.workload_priority is None or policy.queue is not None,
            message="needs a queue: set queue to the Kueue LocalQueue, or remove workloadPriority",
            path="workloadPriority",
            reads=("workloadPriority", "queue"),
        ),
    )
