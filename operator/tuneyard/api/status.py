"""What a job reports: written by the operator, read by people, `kubectl` and `tuneyard status`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tuneyard.api.meta import Condition, Report

Phase = Literal["Pending", "Queued", "Running", "Suspended", "Succeeded", "Failed"]
StageState = Literal["Pending", "Running", "Succeeded", "Failed", "Skipped"]


class StageStatus(Report):
    """One stage of the plan."""

    name: str = Field(max_length=64)
    """The stage's name in the plan."""
    kind: str = Field(max_length=64)
    """What it does: prepare, sft, evaluate, ..."""
    state: StageState = "Pending"
    """How far it is; Skipped means that a record of an earlier attempt matched."""
    started_at: str | None = None
    """When it began (RFC 3339); None: not yet."""
    finished_at: str | None = None
    """When it ended (RFC 3339); None: not yet."""
    digest: str | None = None
    """The digest of its output, from its record; None: no record yet."""
    metrics: dict[str, float] = Field(default={})
    """Its key metrics, from its record."""


class Progress(Report):
    """How far the running stage is."""

    stage: str
    """The running stage."""
    step: int = Field(ge=0)
    """Steps done."""
    total_steps: int = Field(ge=0)
    """Steps in all; 0: unknown."""
    percentage: int = Field(ge=0, le=100)
    """Share of the whole job that is done."""
    estimated_remaining_seconds: int | None = Field(default=None, ge=0)
    """Time to the end of the stage; None: unknown."""
    metrics: dict[str, float] = Field(default={})
    """The newest training metrics."""
    last_updated_time: str
    """When this was reported (RFC 3339)."""


class AttemptStatus(Report):
    """One attempt: one RayJob."""

    number: int = Field(ge=1)
    """From 1."""
    ray_job: str
    """The RayJob's name."""
    ray_job_uid: str | None = None
    """The RayJob's identity; None: not created yet."""
    started_at: str
    """When it was decided on (RFC 3339)."""
    running_at: str | None = None
    """When its driver started (RFC 3339); None: not yet."""
    stopping_at: str | None = None
    """When it was asked to checkpoint and end (RFC 3339); None: it was not."""
    finished_at: str | None = None
    """When it ended (RFC 3339); None: it runs."""
    reason: str | None = None
    """Why it ended; None: it runs."""
    message: str | None = None
    """The same, for people."""
    stage: str | None = None
    """The stage that ran when it ended; None: none, or it runs."""
    last_step: int | None = Field(default=None, ge=0)
    """The last step of that stage it told of; None: none."""
    steps_lost: int | None = Field(default=None, ge=0)
    """Steps that the next attempt had to repeat; None: unknown or none yet."""


class Result(Report):
    """What the job produced."""

    uri: str
    """Where it lies."""
    digest: str | None = None
    """The digest of the exported files; None: the trainer could not report it."""
    metrics: dict[str, float] = Field(default={})
    """The evaluation's metrics."""


class Failure(Report):
    """Why the job failed, and what to do."""

    reason: str
    """One CamelCase word."""
    message: str
    """A sentence."""
    advice: str = ""
    """Which field to change; "" where nothing in the manifest helps."""


class JobStatus(Report):
    """What the operator saw of a job."""

    phase: Phase | None = None
    """The job in one word; None before the operator looked."""
    conditions: list[Condition] = Field(
        default=[],
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    """Planned, Admitted, Running, Suspended, Succeeded, Failed."""
    observed_generation: int | None = None
    """The spec's generation that this status speaks of."""
    plan_digest: str | None = None
    """The digest of the plan; None before planning. Once set, the spec is immutable."""
    stages: list[StageStatus] = Field(default=[], max_length=256)
    """The plan's stages."""
    progress: Progress | None = None
    """How far the running stage is; None: nothing runs."""
    attempts: list[AttemptStatus] = Field(default=[], max_length=100)
    """Every attempt so far."""
    result: Result | None = None
    """What came out; None before success."""
    failure: Failure | None = None
    """Why it failed; None unless it did."""
