"""The engine of a job's training and the sharding of its models, in plans."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.golden.compare import GOLDEN
from tests.planning.jobs import changed, job
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.plan import Plan
from tuneyard.errors import Fault, PlanError
from tuneyard.planning.plan import plan_job

VALIDATION = {"fraction": 0.1}
TRL = {"training__engine": "trl"}
FSDP = {**TRL, "compute__sharding": "fsdp", "compute__workers": 2}


def faults(wrong: FineTuneJob | AlignmentJob) -> list[Fault]:
    with pytest.raises(PlanError) as caught:
        plan_job(wrong)
    return list(caught.value.faults)


def shardings(planned: Plan) -> dict[str, str]:
    return {stage.name: stage.runtime.sharding for stage in planned.stages}


def test_the_native_engine_written_out_leaves_the_bytes_of_a_plan_as_they_are() -> None:
    written = job(training__engine="native", compute__sharding="auto")
    expected = (GOLDEN / "plans" / "minimal.json").read_text()
    assert plan_job(written).to_json() == expected


def test_the_engine_is_a_part_of_the_identity_and_sharding_is_not() -> None:
    native, trl, sharded = (plan_job(job(**changes)) for changes in ({}, TRL, FSDP))
    prints = [[stage.fingerprint for stage in plan.stages] for plan in (native, trl, sharded)]
    assert prints[0] != prints[1]
    assert prints[1] == prints[2]


def test_all_stages_that_run_the_model_of_a_sharded_job_are_sharded() -> None:
    assert shardings(plan_job(job(**FSDP, data__validation=VALIDATION))) == {
        "prepare": "none",
        "sft": "fsdp",
        "evaluate": "fsdp",
        "export": "none",
    }


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (None, "auto"),
        ({"lora": {}}, "auto"),
        ({"lora": {"decomposed": True}}, "none"),
        ({"qlora": {}}, "none"),
    ],
)
def test_auto_is_left_to_the_attempt_where_the_model_can_be_sharded(
    adapter: Any, expected: str
) -> None:
    assert shardings(plan_job(job(**TRL, adapter=adapter)))["sft"] == expected


def test_auto_shards_nothing_under_the_native_engine() -> None:
    planned = plan_job(job(compute__workers=2))
    assert set(shardings(planned).values()) == {"none"}
    assert "sharding" not in json.loads(planned.to_json())["compute"]


@pytest.mark.parametrize(
    ("changes", "path", "remedy"),
    [
        ({"compute__sharding": "fsdp", "compute__workers": 2}, "compute.sharding", "engine to trl"),
        ({**FSDP, "compute__workers": 1}, "compute.sharding", "set compute.workers"),
        ({**FSDP, "compute__minWorkers": 1}, "compute.minWorkers", "raise minWorkers"),
        ({**FSDP, "adapter": {"qlora": {}}}, "compute.sharding", "remove sharding"),
        ({**FSDP, "adapter": {"lora": {"decomposed": True}}}, "compute.sharding", "not decomposed"),
        ({**TRL, "data__packing": "always"}, "data.packing", "auto or never"),
    ],
)
def test_an_engine_is_not_asked_for_what_it_does_not_do(
    changes: dict[str, Any], path: str, remedy: str
) -> None:
    (fault,) = faults(job(**changes))
    assert fault.path == f"spec.{path}"
    assert remedy in fault.message


def alignment(**changes: Any) -> AlignmentJob:
    value = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "AlignmentJob",
        "metadata": {"name": "aligned"},
        "spec": {
            "model": {"uri": "file://model"},
            "preferences": {"data": [{"uri": "file://pairs.jsonl"}]},
            "optimize": {"dpo": {}},
            "output": {"uri": "file://out"},
        },
    }
    return AlignmentJob.model_validate(changed(value, changes))


def test_an_alignment_refuses_the_engine_and_the_sharding_of_fine_tuning() -> None:
    wrong = alignment(
        optimize__dpo={"training": {"engine": "trl"}},
        rewardModel={"train": {"training": {"engine": "trl"}}},
        compute={"sharding": "fsdp", "workers": 2},
    )
    assert [fault.path for fault in faults(wrong)] == [
        "spec.compute.sharding",
        "spec.rewardModel.train.training.engine",
        "spec.optimize.dpo.training.engine",
    ]
