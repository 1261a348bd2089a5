"""The patches of a status that another version of the operator wrote."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.status.simulation import SUCCESS, Simulation, post
from tuneyard.api.status import JobStatus
from tuneyard.status.patches import dump, status_patch

NEWER = {"ofANewerVersion": {"a": 1}}
"""A field that this version does not know."""
THROTTLED = {
    "type": "Throttled",
    "status": "True",
    "reason": "R",
    "lastTransitionTime": "2026-11-26T12:00:00Z",
}
"""A condition that this version does not know."""


def merged(target: Any, patch: Any) -> Any:
    """Return the target after a merge patch, as RFC 7386 defines it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def running() -> Simulation:
    job = Simulation()
    job.run()
    job.post = post(1, 40)
    job.reconcile()
    return job


def of_a_newer_version(status: JobStatus) -> dict[str, Any]:
    """Return a status as a newer operator wrote it."""
    stored = copy.deepcopy(dump(status)) | NEWER
    for name in ("stages", "attempts", "conditions"):
        stored[name] = [item | NEWER for item in stored[name]]
    stored["progress"] |= NEWER
    stored["conditions"].insert(0, THROTTLED)
    return stored


def test_a_patch_of_a_status_without_unknown_fields_changes_the_known_fields_alone() -> None:
    job = running()
    before = job.status
    job.end(SUCCESS, step=100)
    patch, written = status_patch(dump(before), before, job.status)
    assert merged(dump(before), patch) == written == dump(job.status)
    assert "planDigest" not in patch


def test_an_unchanged_status_needs_no_patch() -> None:
    status = running().status
    stored = of_a_newer_version(status)
    assert status_patch(stored, status, status) == ({}, stored)


def test_a_patch_erases_nothing_that_only_a_newer_version_knows() -> None:
    job = running()
    before = job.status
    stored = of_a_newer_version(before)
    assert JobStatus.model_validate(stored) == before
    job.end(SUCCESS, step=100)
    patch, written = status_patch(stored, before, job.status)
    after = merged(stored, patch)
    assert after == written
    assert JobStatus.model_validate(after) == job.status
    assert NEWER.items() <= after.items()
    assert THROTTLED in after["conditions"]
    for item in (*after["stages"], *after["attempts"], after["progress"]):
        assert NEWER.items() <= item.items()


def test_a_known_field_that_is_dropped_is_removed() -> None:
    before = running().status
    stored = of_a_newer_version(before)
    after = before.model_copy(update={"progress": None, "conditions": before.conditions[1:]})
    patch, written = status_patch(stored, before, after)
    assert patch["progress"] is None
    assert merged(stored, patch) == written
    types = [item["type"] for item in written["conditions"]]
    assert before.conditions[0].type not in types


@pytest.mark.parametrize("name", ["conditions", "stages", "attempts"])
def test_a_metric_may_have_the_name_of_a_list_of_the_status(name: str) -> None:
    job = running()
    assert job.status.progress
    progress = job.status.progress.model_copy(update={"metrics": {name: 3.0}})
    before = job.status.model_copy(update={"progress": progress})
    after = before.model_copy(update={"progress": progress.model_copy(update={"step": 41})})
    patch, written = status_patch(dump(before), before, after)
    assert patch == {"progress": {"step": 41}}
    assert written == dump(after)
