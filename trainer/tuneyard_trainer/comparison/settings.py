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
    known = [number for number, manifest in enumerate(manifests) if manifest]
    found = []
    for path, values in _different([manifests[number] for number in known], ""):
        shown = dict(zip(known, map(_shown, values), strict=True))
        found.append(Setting(field=path, values=[shown.get(n) for n in range(len(manifests))]))
    return found


def _different(values: Sequence[Any], path: str) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield the path and the values of each field that differs. A group of fields that only some
    manifests have is one field, such as an adapter."""
    if path in OWN or all(value == values[0] for value in values):
        return
    if all(isinstance(value, Mapping) for value in values):
        for key in dict.fromkeys(key for value in values for key in value):
            below = f"{path}.{key}" if path else str(key)
            yield from _different([value.get(key) for value in values], below)
    elif all(_is_list_of_groups(value) and len(value) == len(values[0]) for value in values):
        for number, items in enumerate(zip(*values, strict=True)):
            yield from _different(items, f"{path}[{number}]")
    else:
        yield path, values


def _is_list_of_groups(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _shown(value: Any) -> str | None:
    """Return a value as YAML in one line. None: the field is not set (null)."""
    if value is None:
        return None
    text = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=True, width=1 << 20, sort_keys=False
    )
    text = text.removesuffix("\n").removesuffix("...").strip()
    return text if len(text) <= MOST else f"{text[:MOST]}…"
