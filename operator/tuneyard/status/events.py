"""What a job's events tell: one for each transition of its status, none for mere progress. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from tuneyard.api.meta import Condition, ConditionType
from tuneyard.api.status import JobStatus, StageStatus

MOST_BYTES = 1024
"""Of a message: Kubernetes refuses longer ones."""

KEY_METRICS = (
    "answerAccuracy",
    "validationLoss",
    "accuracy",
    "reward",
    "finalLoss",
    "pairs",
    "rows",
)
"""The metric that an event of a stage's success names: the first of these that it has."""

_QUIET = ("Starting", "Queued", "Retrying", "Suspended", "Preempted")
"""Reasons of Running=False that are not trouble, or that another event tells."""


class Event(NamedTuple):
    """One event, but for whom it is about and when."""

    type: Literal["Normal", "Warning"]
    reason: str
    """CamelCase."""
    message: str
    """At most 1024 bytes."""


def told(before: JobStatus | None, after: JobStatus) -> list[Event]:
    """What happened between two statuses, in the order in which it happened."""
    before = before or JobStatus()
    happened = (
        *_planning(before, after),
        *_stages(before, after),
        *_attempt_ends(before, after),
        *_suspension(before, after),
        *_attempt_starts(before, after),
        *_admission(before, after),
        *_trouble(before, after),
        *_runs(before, after),
        *_end(before, after),
    )
    return [Event(type_, reason, _clipped(message)) for type_, reason, message in happened]


def _planning(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    old, new = _condition(before, "Planned"), _condition(after, "Planned")
    if new is None:
        return
    if new.status == "True":
        if old is None or old.status != "True":
            yield Event("Normal", "Planned", new.message)
    elif new.reason == "PlanRejected":
        if old is None or (old.reason, old.message) != (new.reason, new.message):
            yield Event("Warning", "PlanRejected", new.message)
    elif old is None or old.reason != new.reason:
        yield Event("Normal", new.reason, new.message)


def _stages(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    states = {stage.name: stage.state for stage in before.stages}
    for stage in after.stages:
        if stage.state == "Succeeded" and states.get(stage.name) != "Succeeded":
            yield Event("Normal", "StageSucceeded", f"{stage.name} is done{_figure(stage)}")


def _figure(stage: StageStatus) -> str:
    name = next((name for name in KEY_METRICS if name in stage.metrics), None)
    return f": {name} {stage.metrics[name]:.6g}" if name else ""


def _attempt_ends(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    ended = {attempt.number for attempt in before.attempts if attempt.finished_at}
    for attempt in after.attempts:
        if attempt.finished_at and attempt.number not in ended and attempt.reason != "Succeeded":
            is_wished = attempt.reason in ("Suspended", "Cancelled")
            text = f"attempt {attempt.number}: {attempt.reason}: {attempt.message}"
            yield Event("Normal" if is_wished else "Warning", "AttemptEnded", text)


def _suspension(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    old, new = _condition(before, "Suspended"), _condition(after, "Suspended")
    if new is None or (old and old.status == new.status):
        return
    if new.status == "Unknown":
        yield Event("Normal", "Suspending", new.message)
    elif new.status == "True":
        yield Event("Normal", "Suspended", new.message)
    elif old:
        yield Event("Normal", "Resumed", new.message)


def _attempt_starts(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    known = {attempt.number for attempt in before.attempts}
    for attempt in after.attempts:
        if attempt.number not in known:
            text = f"attempt {attempt.number}: RayJob {attempt.ray_job}"
            yield Event("Normal", "AttemptStarted", text)


def _admission(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    old, new = _condition(before, "Admitted"), _condition(after, "Admitted")
    if new is None or new.reason == "NoQueue" or (old and old.status == new.status):
        return
    yield Event("Normal", "Admitted" if new.status == "True" else "Queued", new.message)


def _trouble(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    """Why an attempt does not start, each time that the reason is another one."""
    old, new = _condition(before, "Running"), _condition(after, "Running")
    has_ended = after.phase in ("Succeeded", "Failed")
    if has_ended or new is None or new.status != "False" or new.reason in _QUIET:
        return
    if old is None or old.reason != new.reason:
        yield Event("Warning", new.reason, new.message)


def _runs(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    running = {attempt.number for attempt in before.attempts if attempt.running_at}
    for attempt in after.attempts:
        if attempt.running_at and attempt.number not in running:
            yield Event("Normal", "Running", f"attempt {attempt.number} runs")


def _end(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    old, new = _condition(before, "Succeeded"), _condition(after, "Succeeded")
    if new and old is None:
        yield Event("Normal", "Succeeded", new.message)
    old, new = _condition(before, "Failed"), _condition(after, "Failed")
    if new and old is None and new.reason != "PlanRejected":
        yield Event("Warning", "Failed", f"{new.reason}: {new.message}")


def _condition(status: JobStatus, type_: ConditionType) -> Condition | None:
    return next((c for c in status.conditions if c.type == type_), None)


def _clipped(text: str) -> str:
    return text.encode()[:MOST_BYTES].decode(errors="ignore")
