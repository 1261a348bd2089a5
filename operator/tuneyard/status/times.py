"""Times as Kubernetes writes them: RFC 3339, UTC, to the second."""

from __future__ import annotations

from datetime import datetime


def rfc3339(moment: datetime) -> str:
    """Return the text of a moment in UTC."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def moment_of(text: str) -> datetime:
    """Return the moment that a text stands for. Raises ValueError."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
