"""A plan that is read back from its ConfigMap."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.planning.jobs import job
from tuneyard.api.plan import digest
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.names import plan_digest
from tuneyard.rendering.rayjob import render
from tuneyard.rendering.stored_plan import PlanLostError, PlanUnreadableError, stored_plan

PLAN = plan_job(job())
CONFIG_MAP = render(PLAN, job(), attempt=1).config_map


def holding(value: Any) -> dict[str, Any]:
    return {"data": {"plan.json": json.dumps(value)}}


def newer(**changes: Any) -> dict[str, Any]:
    """Return a plan of a newer version, with a stage of a kind that this version does not know."""
    value = json.loads(CONFIG_MAP["data"]["plan.json"])
    settings = {"kind": "distill", "temperature": 2.0}
    value["stages"].insert(1, value["stages"][1] | {"name": "distill", "settings": settings})
    return {**value, **changes}


def test_a_stored_plan_is_the_plan_that_was_rendered() -> None:
    assert stored_plan(CONFIG_MAP, "minimal-plan", plan_digest(PLAN)) == PLAN


@pytest.mark.parametrize(
    "found",
    [
        None,
        {},
        {"data": {}},
        {"data": {"plan.json": "{"}},
        holding([]),
        holding(json.loads(CONFIG_MAP["data"]["plan.json"]) | {"notes": ["changed"]}),
    ],
    ids=["absent", "empty", "no plan", "no JSON", "a list", "another plan"],
)
def test_a_plan_without_the_digest_of_the_status_is_lost(found: dict[str, Any] | None) -> None:
    with pytest.raises(PlanLostError, match="ConfigMap minimal-plan"):
        stored_plan(found, "minimal-plan", plan_digest(PLAN))


def test_a_plan_of_another_version_is_not_lost_and_not_read_in_part() -> None:
    """Without a setting that it does not know, this version would train something else."""
    with pytest.raises(PlanUnreadableError, match=r"minimal-plan: stages\.1\.settings"):
        stored_plan(holding(newer()), "minimal-plan", digest(newer()))
    one_field_more = json.loads(CONFIG_MAP["data"]["plan.json"]) | {"ofANewerVersion": 1}
    with pytest.raises(PlanUnreadableError, match="ofANewerVersion"):
        stored_plan(holding(one_field_more), "minimal-plan", digest(one_field_more))
