"""What is told of a job, one event for each transition."""

from __future__ import annotations

from typing import Literal, NamedTuple

from tuneyard.api.status import JobStatus


class Event(NamedTuple):
    """A Kubernetes event."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def told(before: JobStatus | None, after: JobStatus) -> list[Event]:
    """The events between two statuses."""
    if before is not None and before.phase == after.phase:
        return []
    return [Event("Normal", after.phase or "Pending", f"the job is {after.phase}")]
