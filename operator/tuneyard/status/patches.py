"""Patches of a stored status that keep what only another version of the operator knows. Pure.

A merge patch (RFC 7386) leaves out the fields that it does not change, but it replaces a list as a
whole. The items of the status's lists therefore carry their unknown fields into the patch.
"""

from __future__ import annotations

from typing import Any

from tuneyard.api.status import JobStatus

Object = dict[str, Any]

_ITEM_KEYS = {"conditions": "type", "stages": "name", "attempts": "number"}
"""The lists of a status, and the field that identifies an item of each."""


def dump(status: JobStatus | None) -> Object:
    """Return a status as JSON."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True) if status else {}


def status_patch(
    stored: Object, before: JobStatus | None, after: JobStatus
) -> tuple[Object, Object]:
    """Return the merge patch from one status to the next, and the stored status after the patch.

    `stored`: the status that `before` was read from. Its fields and list items that this version
    does not know are neither changed nor removed.
    """
    known, written = dump(before), dump(after)
    if known == written:
        return {}, stored
    old = _with_unknown(known, stored, known)
    new = _with_unknown(written, stored, known)
    return difference(old, new), new


def difference(before: Object, after: Object) -> Object:
    """Return the merge patch (RFC 7386) from one to the other."""
    patch: Object = {name: None for name in before if name not in after}
    for name, value in after.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            if inner := difference(old, value):
                patch[name] = inner
        elif name not in before or old != value:
            patch[name] = value
    return patch


def _with_unknown(written: Object, stored: Object, known: Object) -> Object:
    """Return `written` with the parts of `stored` that are not in `known`, its known part."""
    result = dict(written)
    for name, value in stored.items():
        if name not in known:
            if value is not None:
                result.setdefault(name, value)
        elif name not in written:
            continue
        elif isinstance(value, dict):
            result[name] = _with_unknown(written[name], value, known[name])
        elif isinstance(value, list) and name in _ITEM_KEYS:  # a metric may have such a name
            result[name] = _with_unknown_items(written[name], value, known[name], _ITEM_KEYS[name])
    return result


def _with_unknown_items(
    written: list[Object], stored: list[Object], known: list[Object], key: str
) -> list[Object]:
    stored_by_key = {item[key]: item for item in stored}
    known_by_key = {item[key]: item for item in known}
    items = [
        _with_unknown(item, stored_by_key.get(item[key], {}), known_by_key.get(item[key], {}))
        for item in written
    ]
    return [*items, *(item for item in stored if item[key] not in known_by_key)]
