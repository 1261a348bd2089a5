"""The fields in which manifests differ. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from tuneyard.api.comparison import Setting

OWN = ("metadata", "spec.output.uri", "spec.runPolicy", "spec.tracking", "status")
"""Fields that name a job or its place and change no result."""
MOST = 200
"""Characters of a value."""


def different(manifests: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Return the fields that are not equal in all manifests, in the order of the first that has
    them. Empty manifests are unknown, and decide nothing."""
    flat = [dict(_fields(manifest, "")) for manifest in manifests]
    known = [fields for fields in flat if fields]
    paths = dict.fromkeys(path for fields in known for path in fields)
    found = []
    for path in paths:
        values = [fields.get(path) for fields in known]
        if path.startswith(OWN) or all(value == values[0] for value in values):
            continue
        found.append(Setting(field=path, values=[fields.get(path) for fields in flat]))
    return found


def _fields(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and the value of each field that holds no others. Fields that are not set
    (null) are left out: they are as absent ones."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _fields(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _fields(item, f"{path}[{number}]")
    elif value is not None:
        yield path, _shown(value)


def _shown(value: Any) -> str:
    """Return a value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20)
    text = text.removesuffix("\n").removesuffix("...").strip()
    return text if len(text) <= MOST else f"{text[:MOST]}…"
