"""Augmentation: its stage, what it reads, where it runs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planning import test_alignment
from tests.planning.jobs import job, manifest
from tests.planning.models import facts
from tuneyard.api.plan import Plan, SourceInput, StageInput, leading, prepares_first
from tuneyard.api.stage_settings import AugmentSettings, PrepareSettings, TrainSettings
from tuneyard.errors import Fault, PlanError
from tuneyard.planning.augmentation import INVERSION, PARAPHRASES
from tuneyard.planning.memory.lengths import Lengths
from tuneyard.planning.memory.stages import Machine, job_memory
from tuneyard.planning.plan import plan_job

TEMPLATES = {"templates": ["Question: {prompt}"]}
ENDPOINT = {
    "url": "https://writer.example/v1",
    "model": "writer",
    "key": {"name": "writer", "key": "token"},
    "maxRequests": 100,
}
GPUS = {"compute": {"gpusPerWorker": 1}}


def planned(augment: dict[str, Any], **changes: Any) -> Plan:
    return plan_job(job(data__augment=augment, **changes))


def faults(augment: dict[str, Any], **changes: Any) -> list[Fault]:
    with pytest.raises(PlanError) as caught:
        planned(augment, **changes)
    return list(caught.value.faults)


def settings_of(plan: Plan) -> AugmentSettings:
    settings = plan.stages[0].settings
    assert isinstance(settings, AugmentSettings)
    return settings


# ---- the stage ----------------------------------------------------------------------------------


def test_rows_are_made_before_they_are_prepared_with_all_others() -> None:
    plan = planned(TEMPLATES | {"weight": 0.5}, data__validation={"fraction": 0.1})
    names = [stage.name for stage in plan.stages]
    assert names == ["augment", "prepare", "sft", "evaluate", "export"]
    augment, prepare = plan.stages[:2]
    assert set(augment.inputs) == {"model", "train.0"}
    rows = StageInput(stage="augment", file="augmented.jsonl", path="spec.data.augment")
    assert prepare.inputs["train.1"] == rows
    assert isinstance(prepare.settings, PrepareSettings)
    assert prepare.settings.augmented
    assert [dataset.weight for dataset in prepare.settings.train] == [1.0, 0.5]


def test_neither_held_out_nor_replayed_data_is_augmented() -> None:
    replay = {"data": [{"uri": "pvc://data/general.jsonl"}]}
    held_out = {"data": [{"uri": "pvc://data/held-out.jsonl"}]}
    documents = {"documents": {"uri": "pvc://data/documents"}}
    plan = planned(
        TEMPLATES, data__replay=replay, data__validation=held_out, data__retrieval=documents
    )
    augment, prepare = plan.stages[:2]
    assert set(augment.inputs) == {"model", "train.0"}
    assert settings_of(plan).documents
    assert isinstance(prepare.inputs["train.1"], SourceInput)
    assert isinstance(prepare.inputs["train.2"], StageInput)
    assert prepare.settings.replay.datasets == 1  # type: ignore[union-attr]


def test_the_model_that_writes_is_an_endpoint_a_model_of_the_job_or_the_model_itself() -> None:
    asks: dict[str, Any] = {"paraphrase": {"perRow": 2}, "inversion": {"share": 0.2}}
    itself = planned(asks)
    assert set(itself.stages[0].inputs) == {"model", "train.0"}
    assert itself.stages[0].kind == "rewrite"
    own = planned(asks | {"by": {"model": {"uri": "hf://org/writer"}}}).stages[0]
    assert own.inputs["judge"] == SourceInput(
        uri="hf://org/writer", path="spec.data.augment.by.model.uri"
    )
    assert own.kind == "rewrite"
    endpoint = planned(asks | {"by": {"endpoint": ENDPOINT}}).stages[0]
    assert (endpoint.kind, endpoint.runtime.endpoint.model) == ("augment", "writer")  # type: ignore[union-attr]
    assert "judge" not in endpoint.inputs
    settings = settings_of(itself)
    assert settings.paraphrase
    assert settings.paraphrase.requests == list(PARAPHRASES[:2])
    assert settings.inversion
    assert settings.inversion.request == INVERSION


def test_without_a_model_of_the_job_the_rows_are_made_before_there_are_gpus() -> None:
    endpoint = {"by": {"endpoint": ENDPOINT}, "paraphrase": {}}
    for augment in (TEMPLATES, endpoint):
        plan = planned(augment, **GPUS)
        assert [stage.name for stage in leading(plan.stages)] == ["augment", "prepare"]
        assert prepares_first(plan)
    plan = planned({"paraphrase": {}}, **GPUS)
    assert not leading(plan.stages)
    assert not prepares_first(plan)


def test_a_fine_tuning_before_an_alignment_augments_its_data() -> None:
    plan = plan_job(test_alignment.job("ppo", sft__data__augment=TEMPLATES))
    assert [stage.name for stage in plan.stages[:3]] == ["augment", "prepare", "sft"]
    source = plan.stages[1].inputs["train.1"]
    assert source.path == "spec.sft.data.augment"


@pytest.mark.parametrize(
    "change",
    [
        {"paraphrase": {"perRow": 2, "share": 0.5}},
        {"paraphrase": {"share": 0.25}},
        {"paraphrase": {"share": 0.5, "requests": ["Rewrite {prompt}"]}},
        {"inversion": {"share": 0.5}},
        {"inversion": {"request": "Who asks {answer}?"}},
        {"templates": ["Q: {prompt}"]},
        {"maxNewTokens": 9},
        {"by": {"endpoint": ENDPOINT | {"model": "other"}}},
    ],
)
def test_every_field_changes_the_stage_and_its_location_does_not(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {
        "by": {"endpoint": ENDPOINT},
        "paraphrase": {"share": 0.5},
        "inversion": {},
        **TEMPLATES,
    }

    def found(**changes: Any) -> str:
        return planned(base | changes).stages[0].fingerprint

    assert found(**change) != found()
    moved = ENDPOINT | {"url": "https://elsewhere/v1", "concurrency": 3}
    assert found(by={"endpoint": moved}) == found()


def test_the_weight_is_of_the_stage_that_prepares() -> None:
    light, heavy = planned(TEMPLATES), planned(TEMPLATES | {"weight": 2.0})
    assert light.stages[0].fingerprint == heavy.stages[0].fingerprint
    assert light.stages[1].fingerprint != heavy.stages[1].fingerprint


def test_what_the_stage_that_prepares_alone_uses_repeats_no_request() -> None:
    """Toxic and repeated rows are left out later, and what was made of them with them."""
    base = planned(TEMPLATES).stages[0]
    toxicity = {"classifier": {"uri": "hf://org/classifier"}, "labels": ["toxic"]}
    rows = {"uri": "https://data.example/train.jsonl"}
    changes: list[dict[str, Any]] = [
        {"data__clean": {"toxicity": toxicity}},
        {"data__clean": {"duplicates": "near", "similarity": 0.7}},
        {"data__train": [rows | {"weight": 3.0}]},
    ]
    for change in changes:
        changed = planned(TEMPLATES, **change).stages[0]
        assert changed.inputs.keys() == base.inputs.keys()
        assert changed.fingerprint == base.fingerprint
    rule = {"data__clean": {"toxicity": toxicity, "minWords": 3}}
    assert planned(TEMPLATES, **rule).stages[0].fingerprint != base.fingerprint


def test_a_job_without_augmentation_keeps_its_plan() -> None:
    text = plan_job(job()).to_json()
    assert "augment" not in text
    assert '"path": ""' not in text


# ---- memory -------------------------------------------------------------------------------------


def test_a_model_that_writes_is_in_the_memory_plan() -> None:
    machine, model = Machine(80 << 30, devices=1), facts("8B")

    def moments(augment: dict[str, Any]) -> dict[str, dict[str, int]]:
        plan = planned(augment)
        lengths = Lengths.of(plan, model)
        return {
            memory.stage: {part.name: part.size for part in memory.device[0].parts}
            for memory in job_memory(plan, model, machine, lengths)
            if memory.device
        }

    weights = 2 * model.parameters
    itself = moments({"paraphrase": {}})["augment"]
    assert itself["weights"] == weights
    assert itself["key-value cache"] > 0
    judge = moments({"paraphrase": {}, "by": {"model": {"uri": "hf://org/writer"}}})["augment"]
    assert judge["judge"] == weights
    assert "augment" not in moments(TEMPLATES)
    assert "augment" not in moments({"paraphrase": {}, "by": {"endpoint": ENDPOINT}})


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augment", "path", "message"),
    [
        ({"templates": ["Q: {prompt}", "Q:"]}, "templates[1]", "contains it 0 times"),
        ({"templates": ["{prompt}? {prompt}"]}, "templates[0]", "contains it 2 times"),
        ({"templates": [" {prompt}\n"]}, "templates[0]", "changes nothing"),
        ({"templates": ["Q: {prompt}"] * 2}, "templates[1]", "the same as templates[0]"),
        ({"paraphrase": {"requests": ["Rewrite."]}}, "paraphrase.requests[0]", "{prompt}"),
        ({"paraphrase": {"perRow": 5}}, "paraphrase.perRow", "there are 4: set requests"),
        (
            {"paraphrase": {"perRow": 2, "requests": ["Ask {prompt}"]}},
            "paraphrase.perRow",
            "there are 1: add requests",
        ),
        ({"inversion": {"request": "Ask {prompt}"}}, "inversion.request", "{answer}"),
    ],
)
def test_what_cannot_work_is_refused_with_its_field(
    augment: dict[str, Any], path: str, message: str
) -> None:
    (fault,) = faults(augment)
    assert fault.path == f"spec.data.augment.{path}"
    assert message in fault.message


def test_documents_have_no_question_to_rewrite() -> None:
    text = {"uri": "pvc://data/a.txt", "format": "text"}
    (fault,) = faults(TEMPLATES, data__train=[text])
    assert fault.path == "spec.data.augment"
    assert "all data sets of train have the format text" in fault.message
    planned(TEMPLATES, data__train=[text, {"uri": "pvc://data/b.jsonl"}])


def test_a_model_that_the_workers_share_cannot_write() -> None:
    sharded = {
        "training": {"engine": "trl"},
        "compute": {"sharding": "fsdp", "workers": 2},
    }
    (fault,) = faults({"paraphrase": {}}, **sharded)
    assert fault.path == "spec.data.augment.by"
    assert "set by.endpoint" in fault.message
    planned({"paraphrase": {}, "by": {"endpoint": ENDPOINT}}, **sharded)
    planned(TEMPLATES, **sharded)


def test_the_engine_trl_trains_on_augmented_rows() -> None:
    plan = planned(TEMPLATES, training__engine="trl")
    training = plan.stages[2].settings
    assert isinstance(training, TrainSettings)
    assert training.engine == "trl"


def test_the_manifest_of_a_plan_gives_the_same_plan() -> None:
    plan = planned({"paraphrase": {"perRow": 2}, **TEMPLATES})
    again = job()  # the golden job, replaced by the plan's manifest
    assert plan_job(type(again).model_validate(plan.manifest)) == plan
    assert "augment" not in manifest("minimal")["spec"]["data"]
