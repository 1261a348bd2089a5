"""The status of a job: written by the operator, read by people, `kubectl` and `tuneyard status`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from tuneyard.api.gates import GateResult
from tuneyard.api.meta import Condition, ConditionType, Report

Phase = Literal["Pending", "Preparing", "Queued", "Running", "Suspended", "Succeeded", "Failed"]
StageState = Literal["Pending", "Running", "Succeeded", "Failed", "Skipped"]
MOST_SECONDS = 1 << 40
"""The longest predicted time, 35,000 years. The API server computes with limits as floating-point
numbers: one near the largest int64 overflows there, and every status is refused."""


class StageStatus(Report):
    """The state of one stage of the plan."""

    name: str = Field(max_length=64)
    """Name of the stage in the plan."""
    kind: str = Field(max_length=64)
    """Kind of the stage: prepare, sft, evaluate, ..."""
    state: StageState = "Pending"
    """State of the stage. Skipped: an earlier attempt finished it, and its record still matches."""
    started_at: str | None = None
    """Time at which the stage started (RFC 3339). None: not yet."""
    finished_at: str | None = None
    """Time at which the stage ended (RFC 3339). None: not yet."""
    digest: str | None = None
    """Digest of the stage's output, from its record. None: no record yet."""
    metrics: dict[str, float] = Field(default={})
    """Key metrics of the stage, from its record."""
    reused: bool | None = None
    """Whether the output of the stage is a copy from the cache, where another job had left it.
    None: it is not."""
    gates: list[GateResult] = Field(default=[], max_length=64, exclude_if=lambda gates: not gates)
    """Verdicts on the gates, of an evaluation that measured them, also if it failed."""


class MemoryPart(Report):
    """A part of a worker's memory."""

    name: str = Field(max_length=64)
    """Content of the part: weights, gradients, optimizer, activations, logits, reference, ..."""
    bytes: int = Field(ge=0)
    """Size of the part, in bytes."""


class StageEstimate(Report):
    """The memory that a stage takes on one worker, at the moment when it takes most."""

    name: str = Field(max_length=64)
    """Name of the stage in the plan."""
    moment: str = Field(max_length=64)
    """Moment of the stage at which it takes most."""
    total_bytes: int = Field(ge=0)
    """Sum of the parts, in bytes."""
    parts: list[MemoryPart] = Field(default=[], max_length=32)
    """Parts of the memory at that moment."""
    assumptions: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=8)
    """What is assumed, since it was not known. Such parts of the memory refuse no job."""
    measured_bytes: int | None = Field(default=None, ge=0)
    """Measured peak of the first worker, in bytes: allocated on its GPU, or without one resident in
    its process. None: the stage is not done, or it does not train."""


class MemoryEstimate(Report):
    """The memory of one worker, calculated before the training stages begin."""

    device: str = Field(max_length=128)
    """Name of each worker's GPU, or CPU. unknown: the hardware is not described, and the job is
    not refused."""
    capacity_bytes: int | None = Field(default=None, ge=0)
    """Memory that the job can use on each worker, in bytes. None: unknown."""
    stages: list[StageEstimate] = Field(default=[], max_length=256)
    """Stages that load a model."""


class StageCost(Report):
    """The time and the price of a stage in one attempt, as its measured steps predict them."""

    total_seconds: int = Field(ge=0, le=MOST_SECONDS)
    """Time from the start of the stage to its end, in seconds."""
    gpu_hours: float | None = Field(default=None, ge=0)
    """That time in hours, times the GPUs of all workers. None: the job has no GPUs."""
    price: float | None = Field(default=None, ge=0)
    """That time in hours, times the workers, times pricePerHour. None: no price is set."""


class Progress(Report):
    """The progress of the running stage."""

    stage: str
    """Name of the running stage."""
    step: int = Field(ge=0)
    """Number of steps done."""
    total_steps: int = Field(ge=0)
    """Number of steps of the stage. 0: unknown."""
    percentage: int = Field(ge=0, le=100)
    """Share of the whole job that is done, in percent."""
    estimated_remaining_seconds: int | None = Field(default=None, ge=0)
    """Time to the end of the stage, in seconds. None: unknown."""
    cost: StageCost | None = None
    """Time and price of the whole stage. None: unknown before the first measured steps."""
    metrics: dict[str, float] = Field(default={})
    """Newest training metrics."""
    last_updated_time: str
    """Time at which this was reported (RFC 3339)."""


class AttemptStatus(Report):
    """One attempt to run the plan: a RayJob, and before it perhaps a Job that prepares the data."""

    number: int = Field(ge=1)
    """Number of the attempt, from 1."""
    ray_job: str
    """Name of the RayJob."""
    ray_job_uid: str | None = None
    """UID of the RayJob. None: not created yet."""
    workers: int | None = Field(default=None, ge=1)
    """Number of workers of an elastic attempt that had to do with fewer than compute.workers. If
    its reason is FewerWorkers: how many could start. None: all of compute.workers."""
    started_at: str
    """Time at which the operator began the attempt (RFC 3339)."""
    prepare_job: str | None = None
    """Name of the Job (batch) that prepares the data before the RayJob exists. None: the workers
    prepare them, or they were prepared before."""
    prepare_job_uid: str | None = None
    """UID of that Job. None: not created yet."""
    preparing_at: str | None = None
    """Time at which the pod of that Job was seen to run (RFC 3339). None: not yet."""
    prepared_at: str | None = None
    """Time at which that Job had succeeded (RFC 3339). None: not yet."""
    running_at: str | None = None
    """Time at which the driver of the RayJob started (RFC 3339). None: not yet."""
    stopping_at: str | None = None
    """Time at which the operator asked the driver to write a checkpoint and stop (RFC 3339). None:
    no stop was requested."""
    finished_at: str | None = None
    """Time at which the attempt ended (RFC 3339). None: it has not ended."""
    reason: str | None = None
    """Why the attempt ended, as one CamelCase word. None: it has not ended."""
    message: str | None = None
    """Why the attempt ended, as a sentence. None: it has not ended."""
    stage: str | None = None
    """Stage that was running when the attempt ended. None: no stage was running, or the attempt has
    not ended."""
    last_step: int | None = Field(default=None, ge=0)
    """Last reported step of that stage. None: no step was reported."""
    steps_lost: int | None = Field(default=None, ge=0)
    """Number of steps that the next attempt had to repeat. None: unknown, or no next attempt."""


class Result(Report):
    """The result of the job."""

    uri: str
    """Location of the result."""
    digest: str | None = None
    """Digest of the exported files. None: the trainer could not report it."""
    metrics: dict[str, float] = Field(default={})
    """Metrics of the evaluation."""
    promotable: bool | None = None
    """Whether the result met all its required gates. None: the job has no required gates."""


class Failure(Report):
    """Why the job failed, and how to fix it."""

    reason: str
    """Why the job failed, as one CamelCase word."""
    message: str
    """Why the job failed, as a sentence."""
    advice: str = ""
    """The field to change. "": no change of the manifest helps."""


class JobStatus(Report):
    """The state of a job, as the operator reports it."""

    phase: Phase | None = None
    """State of the job in one word. None: the operator has not reconciled the job yet."""
    conditions: list[Condition] = Field(
        default=[],
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    """Conditions of the types Planned, Admitted, Running, Suspended, Succeeded and Failed,
    DataLeaked once held-out rows or suites were searched in the training data, and GatesPassed once
    the gates were checked."""
    observed_generation: int | None = None
    """Generation of the spec that this status describes. None: not reconciled yet."""
    plan_digest: str | None = None
    """Digest of the plan. None: not planned yet. Once it is set, only spec.runPolicy may change."""
    stages: list[StageStatus] = Field(default=[], max_length=256)
    """Stages of the plan."""
    memory: MemoryEstimate | None = None
    """Estimated memory of a worker of the newest attempt that reported its model. None: unknown
    yet, or the model is not described."""
    progress: Progress | None = None
    """Progress of the running stage. None: no stage is running."""
    attempts: list[AttemptStatus] = Field(default=[], max_length=100)
    """The attempts. From the 101st on, the oldest that counts toward no limit is dropped."""
    dropped_seconds: float | None = Field(default=None, ge=0)
    """Run time of the attempts that are not listed any more, in seconds. None: all are listed."""
    result: Result | None = None
    """Result of the job. None: the job has not succeeded."""
    failure: Failure | None = None
    """Why the job failed. None: the job has not failed."""

    @field_validator("conditions", mode="before")
    @classmethod
    def _known_conditions(cls, conditions: Any) -> Any:
        """Leave out the conditions whose types only a newer version knows."""
        if not isinstance(conditions, list):
            return conditions
        return [item for item in conditions if not _is_of_unknown_type(item)]


def _is_of_unknown_type(condition: Any) -> bool:
    type_ = condition.get("type") if isinstance(condition, dict) else None
    return isinstance(type_, str) and type_ not in get_args(ConditionType)
