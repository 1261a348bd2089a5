"""Jobs for the planner's tests."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from tests.golden.compare import GOLDEN
from tuneyard.api.finetunejob import FineTuneJob


def manifest(name: str) -> dict[str, Any]:
    """Return a manifest of tests/golden/manifests."""
    text = (GOLDEN / "manifests" / f"{name}.yaml").read_text(encoding="utf-8")
    value: dict[str, Any] = yaml.safe_load(text)
    return value


def job(name: str = "minimal", **changes: Any) -> FineTuneJob:
    """Return a golden job with changed fields; see `changed`."""
    return FineTuneJob.model_validate(changed(manifest(name), changes))


def changed(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a manifest with changed fields.

    A change's key is the field's path in `spec`, joined by `__`. None removes the field.
    """
    value = copy.deepcopy(value)
    for path, leaf in changes.items():
        *folders, last = path.split("__")
        place = value["spec"]
        for folder in folders:
            place = place.setdefault(folder, {})
        if leaf is None:
            place.pop(last, None)
        else:
            place[last] = leaf
    return value
