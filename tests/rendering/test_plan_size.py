"""Plans that do not fit into a ConfigMap."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planning.test_alignment import job
from tuneyard.errors import Fault, PlanError
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.placement import placed
from tuneyard.rendering.plan_file import MOST_BYTES, plan_text
from tuneyard.rendering.rayjob import render

ON_CLUSTER = {
    "model__uri": "hf://org/model",
    "constitution__prompts": {"uri": "pvc://data/prompts.jsonl"},
    "preferences": None,
    "output": {"uri": "pvc://models/out"},
}


def constitutional(**changes: Any) -> Any:
    return job("constitutional", **{**ON_CLUSTER, **changes})


def faults(**changes: Any) -> list[Fault]:
    with pytest.raises(PlanError) as refused:
        placed(plan_job(constitutional(**changes)), profiles={})
    return list(refused.value.faults)


def test_a_plan_above_a_config_maps_limit_is_refused_with_its_largest_field() -> None:
    """The API server would refuse the ConfigMap, without a word about the manifest."""
    (fault,) = faults(constitution__principles=["p" * 4096] * 200)
    assert fault.path == "spec.constitution.principles"
    assert fault.message.startswith("its 820000 bytes are the largest part of the job's plan")
    assert f"does not fit into a ConfigMap ({MOST_BYTES} bytes): shorten it" in fault.message


def test_the_size_counts_bytes_and_not_characters() -> None:
    (fault,) = faults(constitution__principles=["\u6559" * 4096] * 64)
    assert fault.path == "spec.constitution.principles"


def test_of_many_large_fields_the_one_that_contains_most_is_named() -> None:
    texts = ["p" * 4096] * 90
    feedback = {"judge": {"model": {"uri": "hf://org/judge"}}, "principles": texts}
    feedback["prompts"] = {"uri": "pvc://data/prompts.jsonl"}
    changes: dict[str, Any] = {
        "constitution__principles": texts,
        "preferences": {"aiFeedback": feedback},
    }
    changes["optimize"] = {"dpo": {}}
    (fault,) = faults(**changes)
    assert fault.path in ("spec", "spec.constitution.principles", "spec.preferences.aiFeedback")


def test_a_plan_that_fits_is_rendered_with_the_bytes_that_were_counted() -> None:
    aligned = constitutional(constitution__principles=["p" * 4096] * 100)
    plan = placed(plan_job(aligned), profiles={})
    rendered = render(plan, aligned, attempt=1)
    assert rendered.config_map["data"] == {"plan.json": plan_text(plan)}
    assert MOST_BYTES / 2 < len(plan_text(plan).encode()) <= MOST_BYTES
