"""The progress reports that a training pod posts to the operator, and the operator's response.

The body follows Kubeflow Trainer (KEP-2779), so its clients work here too; the field `tuneyard`
holds what Kubeflow's schema lacks. Every post holds the whole state, so the newest post is
enough and a lost post does no harm.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard.api.meta import VERSION, Report
from tuneyard.api.status import Failure, Result, StageCost, StageStatus

PROGRESS_ROUTE = f"/{VERSION}/namespaces/{{namespace}}/{{plural}}/{{name}}/progress"
"""Path of a job on the status server; `plural` is `finetunejobs` or `alignmentjobs`."""
MAX_POST_BYTES = 64 << 10
"""Longest body that is accepted, the same as in Kubeflow."""
POST_SECONDS = 5.0
"""Shortest interval between two posts of one pod; the end of a stage is posted at once."""


Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
"""A count that a status can hold: an int64 of the CRD."""


LONGEST_NAME = 128
"""Characters of a metric's name in a post."""


class MetricValue(Report):
    """One metric."""

    name: str = Field(min_length=1, max_length=LONGEST_NAME)
    """Name of the metric."""
    value: float | str
    """Value of the metric; Kubeflow's clients send it as text."""


class TrainerStatus(Report):
    """The part of a post that follows Kubeflow's schema."""

    progress_percentage: int | None = Field(default=None, ge=0, le=100)
    """Share of the whole job that is done, in percent. None: unknown."""
    estimated_remaining_seconds: Count | None = None
    """Time to the end of the running stage, in seconds. None: unknown."""
    metrics: list[MetricValue] = Field(default=[], max_length=256)
    """Newest training metrics."""
    last_updated_time: str | None = None
    """Time of the measurement (RFC 3339). None: now."""


class Outcome(Report):
    """How an attempt's driver ended."""

    state: Literal["Succeeded", "Failed", "Interrupted"]
    """Interrupted: the driver wrote a checkpoint and stopped, on request or because its pods were
    evicted."""
    result: Result | None = None
    """Result of the job. None: the attempt did not succeed."""
    failure: Failure | None = None
    """Why the attempt failed. None: it did not fail."""
    retryable: bool = False
    """Whether another attempt can succeed."""


class ProgressReport(Report):
    """The progress of an attempt."""

    attempt: int = Field(ge=1)
    """Number of the attempt that posts; posts of earlier attempts are refused."""
    preparing: bool = Field(default=False, exclude_if=lambda preparing: not preparing)
    """True: the post is of the Job that prepares the attempt's data, before its RayJob exists."""
    stage: str = ""
    """Name of the running stage. "": no stage is running."""
    step: Count = 0
    """Number of steps of the stage that are done."""
    total_steps: Count = 0
    """Number of steps of the stage. 0: unknown."""
    resumed_step: Count | None = None
    """Step at which this attempt resumed the stage. None: unknown yet."""
    cost: StageCost | None = None
    """Time and price of the running stage. None: unknown."""
    stages: list[StageStatus] = Field(default=[], max_length=256)
    """State of every stage of the plan."""
    facts: JobFacts | None = None
    """Facts about the model, the rows and the device: the question whether the job fits. None: the
    post asks nothing."""
    outcome: Outcome | None = None
    """How the attempt's driver ended. None: it is running."""


class Post(Report):
    """The body of a post."""

    trainer_status: TrainerStatus
    """The part that follows Kubeflow's schema."""
    tuneyard: ProgressReport | None = None
    """Tuneyard's additions. None: the client follows Kubeflow's schema only."""


class PostResponse(Report):
    """The response to a post."""

    stop: bool
    """True: write a checkpoint and stop, because the job was suspended, canceled or deleted."""
    fit: FitAnswer | None = Field(default=None, exclude_if=lambda fit: fit is None)
    """Whether the job may train, and how; the first answer to an attempt is repeated. None: the
    post has no facts, or they do not suffice."""


class Refusal(Report):
    """The response to a refused post."""

    message: str
    """Why the post was refused."""
    superseded: bool = False
    """True: the attempt must end, because a newer attempt exists or the job does not exist any
    more. Any other refusal does not concern the attempt, which continues."""
