"""A stage's identity covers what it does, but no location and not how it is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.planning.jobs import changed, job, manifest
from tuneyard.api.evaluation import Evaluate, Gate
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import yaml_fields
from tuneyard.api.plan import (
    Plan,
    PlannedStage,
    SourceInput,
    StageInput,
    TrainRuntime,
    digest,
)
from tuneyard.api.sources import FineTuneData
from tuneyard.api.stage_settings import DpoSettings, PrepareSettings, Settings, StageKind
from tuneyard.api.training import EarlyStopping, Training
from tuneyard.planning import fingerprint as module
from tuneyard.planning.fingerprint import fingerprint
from tuneyard.planning.plan import plan_job

GOLDEN = Path(__file__).parent.parent / "golden"


def fingerprints(planned: Plan) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in planned.stages}


def planned(**changes: Any) -> Plan:
    return plan_job(FineTuneJob.model_validate(changed(manifest("support-bot"), changes)))


STAGES = planned().stages
GENERAL = [{"uri": "pvc://data/general.jsonl"}]
DEFENDED = planned(
    training__preserve={"l2Sp": {}, "ewc": {}, "kl": {}, "data": GENERAL},
    training__guard={"data": GENERAL},
    training__bestBy="generalLoss",
    training__suites=[{"name": "manners", "limit": 9}],
    evaluate__suites=[{"name": "manners", "refusals": {"uri": "file://manners.csv"}}],
    adapter=None,
).stages
KINDS: dict[str, StageKind] = {stage.name: stage.kind for stage in STAGES}

# ---- what is identity -----------------------------------------------------------------------


def mutations(model: BaseModel, path: str = "") -> Iterator[tuple[str, BaseModel]]:
    """Yield the model with one changed field, for every field at every depth."""
    for name in type(model).model_fields:
        value, here = getattr(model, name), f"{path}.{name}".lstrip(".")
        if here == "kind":
            continue  # the model's type; tested with the version and the inputs
        if isinstance(value, BaseModel):
            for where, inner in mutations(value, here):
                yield where, model.model_copy(update={name: inner})
        yield here, model.model_copy(update={name: "something else"})


def all_mutations() -> Iterator[tuple[PlannedStage, str, BaseModel]]:
    for stage in (*STAGES, *DEFENDED[:3]):
        for path, settings in mutations(stage.settings):
            yield stage, path, settings


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        pytest.param(stage, settings, id=f"{stage.name}.{path}")
        for stage, path, settings in all_mutations()
    ],
)
def test_every_setting_changes_the_fingerprint(stage: PlannedStage, settings: Settings) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the value has a wrong type on purpose
        assert fingerprint(settings, stage.inputs, KINDS) != stage.fingerprint


def test_the_mutations_reach_nested_settings() -> None:
    """They reach nested settings only if these are set."""
    paths = {f"{stage.name}.{path}" for stage, path, _ in all_mutations()}
    assert {"sft.adapter.lora.rank", "sft.early_stopping.patience", "prepare.train"} <= paths
    assert {"sft.preserve.kl.temperature", "sft.guard.patience", "prepare.general"} <= paths


def test_disabled_gradient_clipping_differs_from_the_default() -> None:
    optimizer = {"maxGradientNorm": 1.0}
    assert fingerprints(planned(training__optimizer=optimizer))["sft"] != STAGES[1].fingerprint


def test_a_new_version_of_a_stage_changes_its_fingerprint_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = fingerprints(planned())
    monkeypatch.setattr(module, "STAGE_VERSIONS", {**module.STAGE_VERSIONS, "sft": 2})
    after = fingerprints(planned())
    assert {name for name in before if before[name] != after[name]} == {"sft"}


def test_a_new_version_of_kto_keeps_the_records_of_the_other_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Version 0.2 estimated KTO's reference point from a prompt's own completions."""
    plan = Plan.model_validate_json((GOLDEN / "alignment" / "dpo.json").read_text())
    (stage,) = (stage for stage in plan.stages if isinstance(stage.settings, DpoSettings))
    kinds = {stage.name: stage.kind for stage in plan.stages}

    def found(loss: str) -> str:
        settings = stage.settings.model_copy(update={"loss": loss})
        return fingerprint(settings, stage.inputs, kinds)

    now = found("kto"), found("sigmoid")
    monkeypatch.setattr(module, "KTO_VERSION", module.STAGE_VERSIONS["dpo"])
    assert found("kto") != now[0], "a record of 0.2 does not match"
    assert found("sigmoid") == now[1]


def test_only_documents_have_the_version_of_prepare_of_0_2() -> None:
    """Other rows are read with tools, reasoning and weights, and split by prompt, since 0.3."""
    stage = STAGES[0]
    assert isinstance(stage.settings, PrepareSettings)
    kinds = {each.name: each.kind for each in STAGES}

    def changes(train: str, validation: str) -> bool:
        assert isinstance(stage.settings, PrepareSettings)
        dataset = stage.settings.train[0]
        update = {
            "train": [dataset.model_copy(update={"format": train})],
            "validation": [dataset.model_copy(update={"format": validation})],
            "validation_fraction": None,
        }
        settings = stage.settings.model_copy(update=update)
        value = {
            "settings": settings.model_dump(mode="json", by_alias=True, exclude_none=True),
            "version": 1,
            "inputs": dict.fromkeys(stage.inputs, "source"),
        }
        return fingerprint(settings, stage.inputs, kinds) != digest(value)

    assert changes("auto", "text")
    assert changes("text", "messages")
    assert not changes("text", "text")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_stage_with_min_delta_has_another_version_than_in_0_2(kind: StageKind) -> None:
    """Version 0.2 could keep another checkpoint than the one of the lowest held-out loss."""
    if kind == "sft":
        plan = planned()
    else:
        plan = Plan.model_validate_json((GOLDEN / "alignment" / "dpo.json").read_text())
    stage = next(stage for stage in plan.stages if stage.kind == kind)
    kinds = {each.name: each.kind for each in plan.stages}

    def found(min_delta: float) -> tuple[str, str]:
        """Return the fingerprint of this version and that of 0.2."""
        stopping = EarlyStopping(min_delta=min_delta)
        changes: dict[str, Any] = {"early_stopping": stopping}
        if kind != "sft":
            changes = {"training": stage.settings.training.model_copy(update=changes)}  # type: ignore[union-attr]
        settings = stage.settings.model_copy(update=changes)
        value = {
            "settings": settings.model_dump(mode="json", by_alias=True, exclude_none=True),
            "version": module.STAGE_VERSIONS[kind],
            "inputs": {
                role: kinds[source.stage] if isinstance(source, StageInput) else "source"
                for role, source in stage.inputs.items()
            },
        }
        return fingerprint(settings, stage.inputs, kinds), digest(value)

    now, before = found(0.0)
    assert now == before
    now, before = found(0.1)
    assert now != before


def test_the_kinds_of_inputs_are_identity_and_a_stages_name_is_not() -> None:
    stage = STAGES[1]
    renamed = {**stage.inputs, "data": StageInput(stage="first")}
    rewired = {**stage.inputs, "data": SourceInput(uri="pvc://data/prepared")}
    kinds: dict[str, StageKind] = {**KINDS, "first": "prepare"}
    assert fingerprint(stage.settings, renamed, kinds) == stage.fingerprint
    assert fingerprint(stage.settings, rewired, kinds) != stage.fingerprint


# ---- what is not ----------------------------------------------------------------------------

MOVES: dict[str, Any] = {
    "model__uri": "pvc://elsewhere/model",
    "output__uri": "s3://elsewhere/support-bot",
    "output__credentials": {"name": "other"},
    "output__deletionPolicy": "Delete",
    "compute": {
        "workers": 16,
        "profile": "big",
        "image": "other:1",
        "gpuResource": "amd.com/gpu",
        "cacheClaim": "cache",
    },
    "runPolicy": {"suspend": True, "maxAttempts": 9, "deadlineSeconds": 5},
    "tracking": {"mlflow": {"uri": "http://mlflow:5000"}, "tensorboard": {}},
    "training__microBatchTokens": 512,
    "training__gradientCheckpointing": True,
    "training__checkpointSteps": 5,
}


@pytest.mark.parametrize("field", MOVES)
def test_moving_a_job_changes_no_fingerprint(field: str) -> None:
    moves = {field: MOVES[field]}
    if field == "model__uri":
        moves["model__revision"] = None
    assert fingerprints(planned(**moves)) == fingerprints(planned())


def test_moving_data_and_rotating_secrets_changes_no_fingerprint() -> None:
    value = manifest("support-bot")
    data = value["spec"]["data"]
    for dataset in [*data["train"], *data["validation"]["data"]]:
        dataset |= {"uri": "gs://elsewhere/file.jsonl", "credentials": {"name": "rotated"}}
        dataset["tokenSecret"] = {"name": "rotated", "key": "token"}
    value["spec"]["model"] |= {"revision": "v2", "tokenSecret": {"name": "rotated", "key": "token"}}
    value["metadata"] = {"name": "other-name", "namespace": "team-b"}
    moved = plan_job(FineTuneJob.model_validate(value))
    assert fingerprints(moved) == fingerprints(planned())


def test_every_training_field_is_identity_or_declared_runtime() -> None:
    """A field that the planner does not pass on would have no effect."""
    values: dict[str, Any] = {
        "engine": "trl",
        "epochs": 5,
        "batchSize": 8,
        "learningRate": 1e-3,
        "schedule": {"type": "linear"},
        "optimizer": {"weightDecay": 0.1},
        "dropout": 0.5,
        "precision": "float32",
        "evaluationSteps": 9,
        "earlyStopping": {"patience": 9},
        "keepBest": False,
        "seed": 9,
    }
    # They exclude epochs and the adapter, or need an engine or suites: tested in test_plan,
    # test_engines and test_suites.
    elsewhere = {"maxSteps", "freeze", "trl", "bestBy", "suites"}
    runtime = set(yaml_fields(TrainRuntime)) - {"endpoint", "sharding"}  # of spec.compute
    assert set(values) | elsewhere | runtime == set(yaml_fields(Training))
    for field, value in values.items():
        after = fingerprints(planned(**{f"training__{field}": value}))
        assert after["sft"] != STAGES[1].fingerprint, field


@pytest.mark.parametrize(
    ("field", "value", "stage"),
    [
        ("data__train", [{"uri": "pvc://data/support.jsonl"}], "prepare"),
        ("data__validation", {"fraction": 0.1}, "prepare"),
        ("data__maxLength", 64, "prepare"),
        ("data__onOverlength", "drop", "prepare"),
        ("data__onInvalidRow", "skip", "prepare"),
        ("data__packing", "never", "sft"),
        ("data__trainOn", "all", "prepare"),
        ("data__reasoning", "drop", "prepare"),
        ("data__systemPrompt", "Be brief.", "prepare"),
        ("data__chatTemplate", "{{ messages }}", "prepare"),
        ("data__clean", {"minWords": 2}, "prepare"),
        ("data__leaks", "error", "prepare"),
        ("data__temperature", 2.0, "prepare"),
        ("data__replay", {"data": [{"uri": "pvc://data/general.jsonl"}]}, "prepare"),
        ("data__retrieval", {"documents": {"uri": "file://documents"}}, "prepare"),
        ("adapter", {"ia3": {}}, "sft"),
        ("evaluate__compareWithBase", False, "evaluate"),
        ("evaluate__samples", 1, "evaluate"),
        ("evaluate__maxNewTokens", 1, "evaluate"),
        ("evaluate__gates", [{"metric": "validationLoss", "atMost": 9.0}], "evaluate"),
        ("evaluate__engine", "vllm", "evaluate"),
        ("evaluate__metrics", ["exactMatch"], "evaluate"),
        ("evaluate__answerSchema", "{}", "evaluate"),
        ("evaluate__fewShot", 4, "evaluate"),
        ("evaluate__answerPattern", "[0-9]", "evaluate"),
        ("evaluate__winRate", {"judge": {"model": {"uri": "hf://org/judge"}}}, "evaluate"),
        ("output__merge", False, "export"),
    ],
)
def test_a_field_changes_the_stage_that_it_belongs_to(field: str, value: Any, stage: str) -> None:
    gates = [{"metric": "validationLoss", "atMost": 1.0}]  # does not need the base model
    before = fingerprints(planned(evaluate__gates=gates))
    after = fingerprints(planned(**{"evaluate__gates": gates, field: value}))
    assert {name for name in before if before[name] != after[name]} == {stage}


def test_without_trackers_a_plan_does_not_mention_them() -> None:
    assert "track" not in plan_job(job()).to_json()


def test_without_rules_the_plan_is_that_of_a_manifest_of_0_2() -> None:
    """The API server writes the default of `leaks` into every manifest."""
    assert plan_job(job(data__leaks="warn")).to_json() == plan_job(job()).to_json()
    assert '"clean"' not in plan_job(job()).to_json()


def test_every_setting_of_retrieval_changes_the_prepare_stage_and_its_location_does_not() -> None:
    def found(**changes: Any) -> str:
        retrieval = {"documents": {"uri": "file://documents"}} | changes
        return fingerprints(planned(data__retrieval=retrieval))["prepare"]

    fields = {"passages": 5, "goldShare": 0.5, "passageWords": 80, "cite": False}
    columns = {"uri": "file://documents", "fields": {"id": "name"}}
    every = [found(), *(found(**{name: value}) for name, value in fields.items())]
    assert len({*every, found(documents=columns)}) == len(every) + 1
    assert found(documents={"uri": "pvc://claim/elsewhere"}) == found()


def test_every_setting_of_toxicity_changes_the_prepare_stage_and_its_location_does_not() -> None:
    """The digest of the classifier is a part of the identity, as of every input."""

    def found(**changes: Any) -> str:
        toxicity = {"classifier": {"uri": "hf://org/classifier"}, "labels": ["toxic"]} | changes
        return fingerprints(planned(data__clean={"toxicity": toxicity}))["prepare"]

    fields = {"labels": ["threat"], "threshold": 0.7, "treatment": "drop"}
    every = [found(), *(found(**{name: value}) for name, value in fields.items())]
    assert len({*every, fingerprints(planned(data__clean={}))["prepare"]}) == len(every) + 1
    assert found(classifier={"uri": "pvc://claim/elsewhere"}) == found()


def test_without_toxicity_the_rules_of_cleaning_are_planned_as_before() -> None:
    text = plan_job(job(data__clean={"minWords": 2})).to_json()
    assert "toxicity" not in text
    prepare = planned(data__clean={"minWords": 2}).stages[0]
    assert prepare.settings.model_dump(mode="json", by_alias=True)["clean"]["minWords"] == 2


def test_without_retrieval_a_plan_does_not_mention_it() -> None:
    text = plan_job(job()).to_json()
    assert "retrieval" not in text
    assert "document" not in text


def test_the_fields_above_are_all_fields_of_data_and_evaluate() -> None:
    assert set(yaml_fields(FineTuneData)) == {
        *("train", "validation", "maxLength", "onOverlength", "onInvalidRow", "packing"),
        *("trainOn", "reasoning", "systemPrompt", "chatTemplate", "clean", "leaks"),
        *("temperature", "replay"),
        "fillInTheMiddle",  # of the method pretrain: tested in test_plan
        "retrieval",
        "augment",  # tested in test_augmentation
    }
    refused = {"suites"}
    assert set(yaml_fields(Evaluate)) - refused == {
        "compareWithBase",
        "samples",
        "maxNewTokens",
        "engine",
        "gates",  # each field of a gate: tested below
        "winRate",
        "metrics",
        "answerSchema",
        "answerPattern",
        "fewShot",
    }


def test_identity_follows_the_content_of_the_inputs() -> None:
    stage = plan_job(job()).stages[0]
    same = stage.identity({"model": "sha256:a", "train.0": "sha256:b"})
    assert stage.identity({"train.0": "sha256:b", "model": "sha256:a"}) == same
    assert stage.identity({"model": "sha256:a", "train.0": "sha256:c"}) != same


def test_every_field_of_a_gate_changes_the_evaluation_only() -> None:
    def found(**changes: Any) -> dict[str, str]:
        gate = {"metric": "validationLoss", "atMost": 2.0} | changes
        given = {name: value for name, value in gate.items() if value is not None}
        return fingerprints(planned(evaluate__gates=[given]))

    fields: dict[str, Any] = {
        "metric": "validationPerplexity",
        "atLeast": 0.1,
        "atMost": 3.0,
        "tier": "advisory",
        "minItems": 5,
        "notWorseThanBaseBy": 0.1,
    }
    assert set(fields) == set(yaml_fields(Gate))
    every = [found()]
    for name, value in fields.items():
        other = {"atMost": None} if name == "notWorseThanBaseBy" else {}
        every.append(found(**{name: value}, **other))
    assert len({each["evaluate"] for each in every}) == len(every)
    assert len({(each["prepare"], each["sft"]) for each in every}) == 1
    assert found(tier="required") == found()
