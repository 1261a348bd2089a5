"""The plan as the file that pods read, and the limit that Kubernetes sets to its size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tuneyard.api.plan import Plan
from tuneyard.errors import Fault

MOST_BYTES = 1 << 20
"""Kubernetes' limit on the content of a ConfigMap."""


def plan_text(plan: Plan) -> str:
    """Return the plan as JSON."""
    return _text(plan.model_dump(mode="json", by_alias=True))


def size_faults(plan: Plan) -> Iterator[Fault]:
    """Yield a fault for the largest field of the manifest if the plan does not fit into a
    ConfigMap."""
    size = _size(plan.model_dump(mode="json", by_alias=True))
    if size <= MOST_BYTES:
        return
    path, value = _largest("spec", plan.manifest["spec"])
    yield Fault(
        path,
        f"its {_size(value)} bytes are the largest part of the job's plan, which has {size} bytes "
        f"and does not fit into a ConfigMap ({MOST_BYTES} bytes): shorten it, split the job, or "
        "move texts to a data set",
    )


def _largest(path: str, value: Any) -> tuple[str, Any]:
    """Return the smallest part of a value that is more than half of each part that contains it."""
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        parts = [(f"{path}.{name}", part) for name, part in value.items()]
    elif isinstance(value, list):
        parts = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
    name, part = max(parts, key=lambda item: _size(item[1]), default=(path, value))
    is_most = bool(parts) and _size(part) * 2 > _size(value)
    return _largest(name, part) if is_most else (path, value)


def _size(value: Any) -> int:
    return len(_text(value).encode())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
