"""Events of a job: one for each transition of its status, none for progress alone. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from tuneyard.api.meta import Condition, ConditionType
from tuneyard.api.status import JobStatus, StageStatus

MAX_MESSAGE_BYTES = 1024
"""Limit of a message: Kubernetes refuses longer ones."""

KEY_METRICS = (
    "answerAccuracy",
    "validationLoss",
    "accuracy",
    "reward",
    "finalLoss",
    "pairs",
    "rows",
    "augmentedRows",
)
"""The event of a finished stage names the first of these metrics that the stage has."""

_WITHOUT_EVENT = (
    *("Starting", "Preparing", "Queued", "Retrying"),
    *("Suspended", "Preempted", "FewerWorkers"),
)
"""Reasons of Running=False without an event: they are no problem, or another event reports them."""


class Event(NamedTuple):
    """One event, without its object and its time."""

    type: Literal["Normal", "Warning"]
    reason: str
    """CamelCase."""
    message: str
    """At most 1024 bytes."""


def transition_events(before: JobStatus | None, after: JobStatus) -> list[Event]:
    """Return the events of the transition between two statuses, in order of occurrence."""
    before = before or JobStatus()
    events = (
        *_planning(before, after),
        *_finished_stages(before, after),
        *_leaks(before, after),
        *_advisory_gates(before, after),
        *_attempt_ends(before, after),
        *_suspension(before, after),
        *_attempt_starts(before, after),
        *_admission(before, after),
        *_start_problem(before, after),
        *_running_attempts(before, after),
        *_job_end(before, after),
    )
    return [Event(type_, reason, _clipped(message)) for type_, reason, message in events]


def _planning(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    old, new = _condition(before, "Planned"), _condition(after, "Planned")
    if new is None:
        return
    if new.status == "True":
        if (old is None or old.status != "True") and len(before.attempts) == len(after.attempts):
            yield Event("Normal", "Planned", new.message)
    elif new.reason == "PlanRejected":
        if old is None or (old.reason, old.message) != (new.reason, new.message):
            yield Event("Warning", "PlanRejected", new.message)
    elif old is None or old.reason != new.reason:
        yield Event("Normal", new.reason, new.message)


def _finished_stages(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    states = {stage.name: stage.state for stage in before.stages}
    for stage in after.stages:
        if stage.state == "Succeeded" and states.get(stage.name) != "Succeeded":
            yield Event("Normal", "StageSucceeded", f"{stage.name} is done{_key_metric(stage)}")


def _leaks(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    old, new = _condition(before, "DataLeaked"), _condition(after, "DataLeaked")
    if new and new.status == "True" and (old is None or old.status != "True"):
        yield Event("Warning", "DataLeaked", new.message)


def _advisory_gates(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    """Yield a warning of an evaluation whose advisory gates are not met."""
    known = {stage.name: stage.gates for stage in before.stages}
    for stage in after.stages:
        missed = [g.sentence for g in stage.gates if not g.is_required and not g.passed]
        if missed and not known.get(stage.name):
            yield Event("Warning", "AdvisoryGateMissed", "; ".join(missed))


def _key_metric(stage: StageStatus) -> str:
    name = next((name for name in KEY_METRICS if name in stage.metrics), None)
    return f": {name} {stage.metrics[name]:.6g}" if name else ""


def _attempt_ends(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    ended = {attempt.number for attempt in before.attempts if attempt.finished_at}
    for attempt in after.attempts:
        if attempt.finished_at and attempt.number not in ended and attempt.reason != "Succeeded":
            is_requested = attempt.reason in ("Suspended", "Canceled")
            text = f"attempt {attempt.number}: {attempt.reason}: {attempt.message}"
            yield Event("Normal" if is_requested else "Warning", "AttemptEnded", text)


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
            objects = f"RayJob {attempt.ray_job}"
            if attempt.prepare_job:
                objects = f"Job {attempt.prepare_job}, then {objects}"
            text = f"attempt {attempt.number}: {objects}"
            plan = _condition(after, "Planned")
            if attempt.number == 1 and plan is not None:
                # One event, not two: events are a quarter of the writes of a new job.
                text = f"{text}, {plan.message}"
            yield Event("Normal", "AttemptStarted", text)


def _admission(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    old, new = _condition(before, "Admitted"), _condition(after, "Admitted")
    if new is None or new.reason in ("NoQueue", "Preparing"):
        return
    if old and old.status == new.status and old.reason != "Preparing":
        return
    yield Event("Normal", "Admitted" if new.status == "True" else "Queued", new.message)


def _start_problem(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    """Yield why an attempt does not start, each time the reason changes."""
    old, new = _condition(before, "Running"), _condition(after, "Running")
    has_ended = after.phase in ("Succeeded", "Failed")
    if has_ended or new is None or new.status != "False" or new.reason in _WITHOUT_EVENT:
        return
    if old is None or old.reason != new.reason:
        yield Event("Warning", new.reason, new.message)


def _running_attempts(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    running = {attempt.number for attempt in before.attempts if attempt.running_at}
    for attempt in after.attempts:
        if attempt.running_at and attempt.number not in running:
            yield Event("Normal", "Running", f"attempt {attempt.number} runs")


def _job_end(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    old, new = _condition(before, "Succeeded"), _condition(after, "Succeeded")
    if new and old is None:
        yield Event("Normal", "Succeeded", new.message)
    old, new = _condition(before, "Failed"), _condition(after, "Failed")
    if new and old is None and new.reason != "PlanRejected":
        yield Event("Warning", "Failed", f"{new.reason}: {new.message}")


def _condition(status: JobStatus, type_: ConditionType) -> Condition | None:
    return next((c for c in status.conditions if c.type == type_), None)


def _clipped(text: str) -> str:
    return text.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
