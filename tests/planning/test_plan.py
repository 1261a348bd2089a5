"""The plan of a FineTuneJob: its stages, their inputs and the notes for the user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.golden.compare import GOLDEN, assert_golden
from tests.planning.jobs import job, manifest
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.plan import Plan, PlannedStage, SourceInput, StageInput
from tuneyard.api.stage_settings import EvaluateSettings, PrepareSettings, TrainSettings
from tuneyard.errors import Fault, PlanError
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.storage import storage

VALIDATION = {"fraction": 0.1}


def stage(planned: Plan, name: str) -> PlannedStage:
    return next(stage for stage in planned.stages if stage.name == name)


def training(planned: Plan) -> TrainSettings:
    settings = planned.stages[1].settings
    assert isinstance(settings, TrainSettings)
    return settings


def faults(wrong: FineTuneJob) -> list[Fault]:
    with pytest.raises(PlanError) as caught:
        plan_job(wrong)
    return list(caught.value.faults)


# ---- stages and inputs ----------------------------------------------------------------------


def test_a_job_with_held_out_rows_is_prepared_trained_evaluated_and_exported() -> None:
    planned = plan_job(job(data__validation=VALIDATION))
    assert [stage.name for stage in planned.stages] == ["prepare", "sft", "evaluate", "export"]
    assert [stage.kind for stage in planned.stages] == ["prepare", "sft", "evaluate", "export"]


def test_pretraining_has_its_own_stage() -> None:
    planned = plan_job(job(method="pretrain"))
    assert [stage.kind for stage in planned.stages] == ["prepare", "pretrain", "export"]
    assert stage(planned, "export").inputs["tuned"] == StageInput(stage="pretrain")


def test_each_stage_reads_the_roles_that_the_trainer_expects() -> None:
    planned = plan_job(job("support-bot"))
    roles = {stage.name: set(stage.inputs) for stage in planned.stages}
    assert roles == {
        "prepare": {"model", "train.0", "train.1", "validation.0"},
        "sft": {"model", "data"},
        "evaluate": {"model", "data", "tuned"},
        "export": {"model", "data", "tuned", "evaluation"},
    }
    wired = stage(planned, "export").inputs
    assert wired["data"] == StageInput(stage="prepare")
    assert wired["tuned"] == StageInput(stage="sft")
    assert wired["evaluation"] == StageInput(stage="evaluate")


def test_a_source_carries_its_secrets_and_its_field_in_the_manifest() -> None:
    inputs = stage(plan_job(job("support-bot")), "prepare").inputs
    model, second, held_out = inputs["model"], inputs["train.1"], inputs["validation.0"]
    assert isinstance(model, SourceInput)
    assert isinstance(second, SourceInput)
    assert isinstance(held_out, SourceInput)
    assert model.path == "spec.model.uri"
    assert model.revision == "main"
    assert model.token_secret is not None
    assert second.path == "spec.data.train[1].uri"
    assert second.credentials is not None
    assert held_out.path == "spec.data.validation.data[0].uri"


def test_a_model_of_another_job_stays_a_reference() -> None:
    model = stage(plan_job(job(model__uri="job://earlier")), "prepare").inputs["model"]
    assert isinstance(model, SourceInput)
    assert model.uri == "job://earlier"


def test_without_held_out_rows_nothing_is_evaluated_and_a_note_says_so() -> None:
    planned = plan_job(job(training__evaluationSteps=10))
    assert [stage.name for stage in planned.stages] == ["prepare", "sft", "export"]
    assert "evaluation" not in stage(planned, "export").inputs
    note = planned.notes[-1]
    assert "data.validation is not set" in note
    assert "without effect: training.evaluationSteps (10), evaluate.samples (3)." in note


def test_with_held_out_rows_no_note_mentions_them() -> None:
    assert not any("held-out" in note for note in plan_job(job(data__validation=VALIDATION)).notes)


# ---- settings -------------------------------------------------------------------------------


def test_auto_is_resolved_and_each_default_has_a_note() -> None:
    planned = plan_job(job(adapter={"lora": {}}))
    settings = training(planned)
    assert (settings.learning_rate, settings.batch_size, settings.epochs) == (2e-4, 16, 3.0)
    assert planned.notes[:3] == [
        "training.learningRate 0.0002: LoRA default (docs/defaults.md).",
        "training.batchSize 16: LoRA default (docs/defaults.md).",
        "training.epochs 3: the default, as neither epochs nor maxSteps is set.",
    ]


def test_values_of_the_manifest_are_kept_and_have_no_note() -> None:
    planned = plan_job(job("support-bot"))
    settings = training(planned)
    assert (settings.learning_rate, settings.batch_size, settings.epochs) == (1e-4, 64, 2.0)
    assert planned.notes == []


def test_max_steps_replace_the_default_epochs() -> None:
    settings = training(plan_job(job(training__maxSteps=10)))
    assert (settings.epochs, settings.max_steps) == (None, 10)


def test_frozen_parts_reach_the_training_stage() -> None:
    settings = training(plan_job(job(training__freeze={"layers": "0-3", "embeddings": True})))
    assert settings.freeze is not None
    assert (settings.freeze.layers, settings.freeze.embeddings) == ("0-3", True)


def test_the_split_does_not_follow_the_training_seed() -> None:
    one, other = plan_job(job(training__seed=1)), plan_job(job(training__seed=2))
    assert stage(one, "prepare") == stage(other, "prepare")
    assert stage(one, "sft").fingerprint != stage(other, "sft").fingerprint


# ---- faults ---------------------------------------------------------------------------------


def test_every_unsupported_part_is_named_at_once_with_its_remedy() -> None:
    wrong = job(
        data__validation=VALIDATION,
        evaluate={
            "suites": [
                {"name": "sense", "choices": {"uri": "file://sense.jsonl"}},
                {"name": "sense", "task": {"name": "arc_easy"}},
            ],
            "gates": [
                {"metric": "validationLos", "atMost": 1.0},
                {"metric": "arc_easy/acc", "atLeast": 0.5},
                {"metric": "sense/wisdom", "atLeast": 0.5},
                {"metric": "validationLoss", "atMost": 1.0},
                {"metric": "wisdom", "atLeast": 1.0},
            ],
        },
    )
    found = faults(wrong)
    assert [fault.path for fault in found] == [
        "spec.evaluate.suites[1].name",
        "spec.evaluate.gates[0].metric",
        "spec.evaluate.gates[1].metric",
        "spec.evaluate.gates[2].metric",
        "spec.evaluate.gates[4].metric",
    ]
    assert "sense is the name of spec.evaluate.suites[0] too" in found[0].message
    assert found[1].message.endswith("did you mean 'validationLoss'?")
    assert "the suite arc_easy, which the job does not have: use one of sense" in found[2].message
    assert "the suite sense does not measure wisdom: use one of accuracy, " in found[3].message
    assert "use one of validationLoss" in found[4].message


@pytest.mark.parametrize("metric", ["lossReduction", "answerAccuracyGain"])
def test_a_gate_against_the_base_model_needs_its_measurement(metric: str) -> None:
    gates = [{"metric": metric, "atLeast": 0.1}]
    evaluate = {"compareWithBase": False, "gates": gates}
    (fault,) = faults(job(data__validation=VALIDATION, evaluate=evaluate))
    assert "set evaluate.compareWithBase: true" in fault.message


def test_a_bound_of_the_difference_needs_the_base_and_values_of_each_item() -> None:
    def found(gate: dict[str, object], **evaluate: object) -> list[tuple[str, str]]:
        wanted = {"gates": [{"atLeast": 0.1, "metric": "lossReduction"}, gate], **evaluate}
        if not evaluate.get("compareWithBase", True):
            wanted["gates"] = [gate]
        job_ = job(data__validation=VALIDATION, evaluate=wanted)
        try:
            plan_job(job_)
        except PlanError as error:
            return [(fault.path, fault.message) for fault in error.faults]
        return []

    good = {"metric": "validationLoss", "notWorseThanBaseBy": 0.02, "minItems": 50}
    assert found(good) == []
    ((path, message),) = found(good, compareWithBase=False)
    assert path == "spec.evaluate.gates[0].notWorseThanBaseBy"
    assert "set evaluate.compareWithBase: true" in message
    ((path, message),) = found({"metric": "lossReduction", "notWorseThanBaseBy": 0.1})
    assert path == "spec.evaluate.gates[1].notWorseThanBaseBy"
    assert (
        "use one of validationLoss, validationLossOfGaps, answerAccuracy, exactMatch, " in message
    )


def test_bounds_that_no_value_meets_are_refused_before_the_job_starts() -> None:
    def found(low: float, high: float) -> list[str]:
        gate = {"metric": "validationLoss", "atLeast": low, "atMost": high}
        try:
            plan_job(job(data__validation=VALIDATION, evaluate__gates=[gate]))
        except PlanError as error:
            return [f"{fault.path} {fault.message}" for fault in error.faults]
        return []

    assert found(0.1, 0.9) == found(0.5, 0.5) == []
    (message,) = found(0.9, 0.1)
    assert message.startswith("spec.evaluate.gates[0].atLeast no value is at least 0.9 and at most")
    assert "lower atLeast, or raise atMost" in message


def test_the_new_fields_of_gates_leave_a_plan_without_them_as_it_was() -> None:
    gates = [{"metric": "validationLoss", "atMost": 2.0}]
    text = plan_job(job(data__validation=VALIDATION, evaluate__gates=gates)).to_json()
    for name in ("tier", "minItems", "notWorseThanBaseBy"):
        assert f'"{name}"' not in text
    changed = [{**gates[0], "tier": "advisory", "minItems": 5}]
    text = plan_job(job(data__validation=VALIDATION, evaluate__gates=changed)).to_json()
    assert '"tier": "advisory"' in text


def test_a_gate_on_expected_answers_is_refused_for_pretraining() -> None:
    gates = [{"metric": "answerAccuracy", "atLeast": 0.1}]
    (fault,) = faults(job(method="pretrain", data__validation=VALIDATION, evaluate__gates=gates))
    assert "method is pretrain" in fault.message


JUDGED = {"judge": {"endpoint": {"url": "https://judge.example/v1", "model": "judge"}}}


def test_a_judge_compares_the_answers_of_a_fine_tuning_if_the_manifest_names_one() -> None:
    gates = [{"metric": "winRate", "atLeast": 0.5}]
    evaluate = {"winRate": JUDGED, "gates": gates}
    measured = stage(plan_job(job(data__validation=VALIDATION, evaluate=evaluate)), "evaluate")
    assert isinstance(measured.settings, EvaluateSettings)
    assert measured.settings.win_rate
    assert measured.settings.seed is not None
    assert measured.runtime.endpoint
    model = {"winRate": {"judge": {"model": {"uri": "hf://org/judge"}}}}
    measured = stage(plan_job(job(data__validation=VALIDATION, evaluate=model)), "evaluate")
    assert "judge" in measured.inputs
    (fault,) = faults(job(data__validation=VALIDATION, evaluate={"gates": gates}))
    assert "set evaluate.winRate" in fault.message


def test_a_win_rate_that_a_fine_tuning_cannot_measure_is_refused_with_the_remedy() -> None:
    wrong = job(method="pretrain", evaluate={"winRate": JUDGED, "compareWithBase": False})
    found = faults(wrong)
    assert {fault.path for fault in found} == {"spec.evaluate.winRate"}
    remedies = ["set data.validation", "remove winRate", "set evaluate.compareWithBase: true"]
    for fault, remedy in zip(found, remedies, strict=True):
        assert remedy in fault.message
    judge = {"winRate": {"judge": {"model": {"uri": "hf://org/judge"}}}}
    sharded = {"compute": {"sharding": "fsdp", "workers": 2}, "training__engine": "trl"}
    (fault,) = faults(job(data__validation=VALIDATION, evaluate=judge, **sharded))
    assert fault.path == "spec.evaluate.winRate.judge.model"


def test_a_gate_on_a_metric_of_answers_needs_the_field_that_asks_for_it() -> None:
    asked = {
        "rougeL": ({"metrics": ["rouge"]}, "add rouge to evaluate.metrics"),
        "macroF1": ({"metrics": ["classification"]}, "add classification to evaluate.metrics"),
        "numericMatch": ({"metrics": ["numeric"]}, "add numeric to evaluate.metrics"),
        "schemaValid": ({"answerSchema": "{}"}, "set evaluate.answerSchema"),
        "patternMatch": ({"answerPattern": "x"}, "set evaluate.answerPattern"),
    }
    for metric, (fields, remedy) in asked.items():
        gates = {"gates": [{"metric": metric, "atLeast": 0.1}]}
        (fault,) = faults(job(data__validation=VALIDATION, evaluate=gates))
        assert fault.message.endswith(remedy)
        assert plan_job(job(data__validation=VALIDATION, evaluate=gates | fields))


def test_metrics_of_answers_need_held_out_questions_and_a_pattern_that_can_be_read() -> None:
    evaluate = {"metrics": ["rouge"], "answerPattern": "(", "answerSchema": "{}"}
    found = faults(job(data__validation=VALIDATION, evaluate=evaluate))
    assert [fault.path for fault in found] == ["spec.evaluate.answerPattern"]
    assert "is no regular expression" in found[0].message
    found = faults(job(evaluate=evaluate | {"answerPattern": "x"}))
    assert len(found) == 3
    assert all("set data.validation" in fault.message for fault in found)
    few = {"fewShot": 2, "compareWithBase": False}
    (fault,) = faults(job(data__validation=VALIDATION, evaluate=few))
    assert (fault.path, "compareWithBase: true" in fault.message) == ("spec.evaluate.fewShot", True)
    wrong = job(data__validation=VALIDATION, method="pretrain", evaluate={"metrics": ["bleu"]})
    (fault,) = faults(wrong)
    assert "method pretrain does not have" in fault.message


def test_gaps_are_for_documents_and_are_refused_where_answers_are_trained_on() -> None:
    (fault,) = faults(job(data__fillInTheMiddle={}))
    assert fault.path == "spec.data.fillInTheMiddle"
    assert "set method: pretrain" in fault.message


def test_a_gate_on_gaps_needs_documents_with_gaps() -> None:
    gates = {"gates": [{"metric": "validationLossOfGaps", "atMost": 3.0}]}
    changes = {"method": "pretrain", "data__validation": VALIDATION, "evaluate": gates}
    (fault,) = faults(job(**changes))
    assert "set data.fillInTheMiddle" in fault.message
    plan_job(job(**changes, data__fillInTheMiddle={}))  # raises PlanError if there is a fault


def test_general_data_is_the_last_of_the_training_data_sets() -> None:
    replay = {"data": [{"uri": "pvc://data/general.jsonl", "weight": 2.0}], "share": 0.2}
    prepare = plan_job(job(data__replay=replay)).stages[0]
    assert isinstance(prepare.settings, PrepareSettings)
    assert [dataset.weight for dataset in prepare.settings.train] == [1.0, 2.0]
    source = prepare.inputs["train.1"]
    assert isinstance(source, SourceInput)
    assert source.path == "spec.data.replay.data[0].uri"


# ---- the manifest in the plan ---------------------------------------------------------------


def test_the_documents_of_retrieval_are_an_input_of_the_prepare_stage() -> None:
    documents = {"uri": "pvc://data/documents", "credentials": {"name": "store"}}
    prepare = plan_job(job(data__retrieval={"documents": documents})).stages[0]
    source = prepare.inputs["documents"]
    assert isinstance(source, SourceInput)
    assert (source.uri, source.path) == (
        "pvc://data/documents",
        "spec.data.retrieval.documents.uri",
    )
    assert source.credentials
    assert "documents" not in plan_job(job()).stages[0].inputs


def test_the_classifier_of_toxicity_is_an_input_of_the_prepare_stage_and_no_setting() -> None:
    classifier = {
        "uri": "hf://org/classifier",
        "revision": "v1",
        "tokenSecret": {"name": "hub", "key": "token"},
    }
    toxicity = {"classifier": classifier, "labels": ["toxic"]}
    plan = plan_job(job(data__clean={"toxicity": toxicity, "minWords": 2}))
    prepare = plan.stages[0]
    source = prepare.inputs["toxicity"]
    assert isinstance(source, SourceInput)
    assert (source.uri, source.revision, source.path) == (
        "hf://org/classifier",
        "v1",
        "spec.data.clean.toxicity.classifier.uri",
    )
    assert "org/classifier" not in prepare.settings.model_dump_json()
    assert isinstance(prepare.settings, PrepareSettings)
    assert prepare.settings.clean
    assert prepare.settings.clean.min_words == 2
    assert "TUNEYARD_SECRET_HUB_TOKEN" in storage(plan).tokens, "the preparing pod has the token"
    assert "toxicity" not in plan_job(job()).stages[0].inputs


def test_a_column_of_documents_is_refused_without_retrieval() -> None:
    train = [{"uri": "pvc://data/a.jsonl"}, {"uri": "pvc://d/b", "fields": {"document": "page"}}]
    held_out = {"data": [{"uri": "pvc://data/c.jsonl", "fields": {"document": "page"}}]}
    found = faults(job(data__train=train, data__validation=held_out))
    paths = ["spec.data.train[1]", "spec.data.validation.data[0]"]
    assert [fault.path for fault in found] == [f"{path}.fields.document" for path in paths]
    assert "set spec.data.retrieval, or remove document" in found[0].message
    retrieval = {"documents": {"uri": "pvc://data/documents"}}
    assert plan_job(job(data__train=train, data__retrieval=retrieval))


def test_the_manifest_in_the_plan_gives_the_same_plan_again() -> None:
    value = manifest("support-bot")
    value["metadata"] |= {"uid": "u-1", "generation": 3, "annotations": {"a": "b"}}
    value["status"] = {"phase": "Pending"}
    planned = plan_job(FineTuneJob.model_validate(value))
    assert planned.manifest["metadata"] == manifest("support-bot")["metadata"]
    assert "status" not in planned.manifest
    assert plan_job(FineTuneJob.model_validate(planned.manifest)) == planned


def test_the_manifest_in_the_plan_has_defaults_and_no_unset_fields() -> None:
    spec = plan_job(job("support-bot")).manifest["spec"]
    assert spec["data"]["packing"] == "auto"
    assert "dropout" not in spec["training"]
    assert spec["training"]["optimizer"]["maxGradientNorm"] is None, (
        "None overrides the default 1.0"
    )


# ---- determinism ----------------------------------------------------------------------------


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [reversed_keys(item) for item in value]
    return value


@pytest.mark.parametrize("name", ["minimal", "support-bot"])
def test_the_order_of_keys_does_not_change_the_plan(name: str) -> None:
    other = FineTuneJob.model_validate(reversed_keys(manifest(name)))
    assert plan_job(other).to_json() == plan_job(job(name)).to_json()


def test_the_hash_seed_does_not_change_the_plan() -> None:
    code = (
        "import sys, json\n"
        "from tuneyard.api.finetunejob import FineTuneJob\n"
        "from tuneyard.planning.plan import plan_job\n"
        "sys.stdout.write(plan_job(FineTuneJob.model_validate(json.load(sys.stdin))).to_json())\n"
    )
    plans = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(manifest("support-bot")),
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert plans == {plan_job(job("support-bot")).to_json()}


@pytest.mark.parametrize("name", ["minimal", "support-bot", "augmented", "tracked"])
def test_the_plan_is_frozen(name: str) -> None:
    assert_golden(f"plans/{name}.json", plan_job(job(name)).to_json())


@pytest.mark.parametrize("name", ["minimal", "support-bot", "augmented", "tracked"])
def test_a_plan_is_the_same_after_a_round_trip_by_json(name: str) -> None:
    planned = plan_job(job(name))
    assert Plan.model_validate_json(planned.to_json()) == planned


def test_golden_manifests_are_all_planned() -> None:
    manifests = {path.stem for path in (GOLDEN / "manifests").glob("*.yaml")}
    assert manifests == {path.stem for path in (GOLDEN / "plans").glob("*.json")}
