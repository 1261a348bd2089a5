"""What a training pod posts to the operator, and what it gets back.

The outer shape is Kubeflow Trainer's (KEP-2779), so that its clients work here too; `tuneyard`
carries what Kubeflow has no words for. Every post is a whole picture, so the newest one is enough
and a lost one does no harm.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tuneyard.api.meta import VERSION, Report
from tuneyard.api.status import Failure, Result, StageStatus

PROGRESS_ROUTE = f"/{VERSION}/namespaces/{{namespace}}/{{plural}}/{{name}}/progress"
"""Path of a job on the status server; `plural` is `finetunejobs` or `alignmentjobs`."""
MAX_POST_BYTES = 64 << 10
"""A longer body is refused, as Kubeflow does."""
POST_SECONDS = 5.0
"""Least time between two posts of one pod, stage ends aside."""


class MetricValue(Report):
    """One number."""

    name: str = Field(min_length=1, max_length=128)
    """Its name."""
    value: float | str
    """Its value; Kubeflow's clients send it as text."""


class TrainerStatus(Report):
    """Kubeflow's part."""

    progress_percentage: int | None = Field(default=None, ge=0, le=100)
    """Share of the whole job that is done; None: unknown."""
    estimated_remaining_seconds: int | None = Field(default=None, ge=0)
    """Time to the end of the running stage; None: unknown."""
    metrics: list[MetricValue] = Field(default=[], max_length=256)
    """The newest training metrics."""
    last_updated_time: str | None = None
    """When this was measured (RFC 3339); None: now."""


class Outcome(Report):
    """How an attempt's driver ended."""

    state: Literal["Succeeded", "Failed", "Interrupted"]
    """Interrupted: it stopped in good order, because it was asked to or its pods were evicted."""
    result: Result | None = None
    """What came out; None unless it succeeded."""
    failure: Failure | None = None
    """Why it failed; None unless it did."""
    retryable: bool = False
    """Whether another attempt could succeed."""


class ProgressReport(Report):
    """Where an attempt stands."""

    attempt: int = Field(ge=1)
    """The attempt that speaks; a post of any but the newest is refused."""
    stage: str = ""
    """The running stage; "" between stages."""
    step: int = Field(default=0, ge=0)
    """Steps done in it."""
    total_steps: int = Field(default=0, ge=0)
    """Steps in all; 0: unknown."""
    resumed_step: int | None = Field(default=None, ge=0)
    """The step at which this attempt took the stage up; None: not yet known."""
    stages: list[StageStatus] = Field(default=[], max_length=256)
    """Every stage of the plan."""
    outcome: Outcome | None = None
    """How it ended; None: it runs."""


class Post(Report):
    """The body of a post."""

    trainer_status: TrainerStatus
    """Kubeflow's part."""
    tuneyard: ProgressReport | None = None
    """Ours; None from a client that knows Kubeflow's protocol alone."""


class Answer(Report):
    """What a post is answered with."""

    stop: bool = False
    """True: checkpoint and end; the job was suspended, canceled or deleted."""
