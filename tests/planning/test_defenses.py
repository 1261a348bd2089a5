"""Defenses against forgetting, and the choice of a checkpoint, in plans."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planning.jobs import changed, job
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.plan import Plan, PlannedStage, SourceInput
from tuneyard.api.stage_settings import PrepareSettings, TrainSettings
from tuneyard.cli.plan_view import _settings as shown_settings
from tuneyard.errors import Fault, PlanError
from tuneyard.planning.plan import plan_job

GENERAL = [{"uri": "pvc://data/general.jsonl"}, {"uri": "pvc://data/more.jsonl"}]
WATCHED = [{"uri": "pvc://data/watched.jsonl"}]
KL = {"training__preserve": {"kl": {}, "data": GENERAL}}
GUARD = {"training__guard": {"data": WATCHED}}
FULL = {"adapter": None}
PAIRS = {"data": [{"uri": "file://pairs.jsonl"}]}
REWARD = {"rule": {"jsonSchema": "{}"}}
PROMPTS = {"prompts": {"uri": "file://prompts.jsonl"}}


def faults(wrong: FineTuneJob | AlignmentJob) -> list[Fault]:
    with pytest.raises(PlanError) as caught:
        plan_job(wrong)
    return list(caught.value.faults)


def stages(planned: Plan) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in planned.stages}


def aligned(**spec: Any) -> AlignmentJob:
    value = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "AlignmentJob",
        "metadata": {"name": "aligned"},
        "spec": {"model": {"uri": "file://model"}, "output": {"uri": "file://out"}, **spec},
    }
    return AlignmentJob.model_validate(value)


def test_the_general_data_is_read_by_prepare_as_sets_of_their_own() -> None:
    """None of it is among the training data sets."""
    found = stages(plan_job(job(**FULL, **KL, **GUARD)))
    before = stages(plan_job(job(**FULL)))
    prepare, plain = found["prepare"], before["prepare"]
    added = {role: prepare.inputs[role] for role in prepare.inputs.keys() - plain.inputs.keys()}
    located = {
        role: (source.uri, source.path)
        for role, source in added.items()
        if isinstance(source, SourceInput)
    }
    assert located == {
        "general.0": ("pvc://data/general.jsonl", "spec.training.preserve.data[0].uri"),
        "general.1": ("pvc://data/more.jsonl", "spec.training.preserve.data[1].uri"),
        "guard.0": ("pvc://data/watched.jsonl", "spec.training.guard.data[0].uri"),
    }
    assert isinstance(prepare.settings, PrepareSettings)
    assert isinstance(plain.settings, PrepareSettings)
    assert len(prepare.settings.general or []) == 2
    assert len(prepare.settings.guard or []) == 1
    assert prepare.settings.train == plain.settings.train
    settings = found["sft"].settings
    assert isinstance(settings, TrainSettings)
    assert settings.preserve is not None
    assert settings.preserve.kl is not None
    assert settings.preserve.l2_sp is None
    assert settings.guard is not None


def test_a_job_without_defenses_has_the_bytes_that_it_had() -> None:
    text = plan_job(job()).to_json()
    assert not any(name in text for name in ("preserve", "guard", "general", "bestBy"))


def test_a_plan_shows_each_chosen_value() -> None:
    terms = {"l2Sp": {}, "ewc": {}, "kl": {}, "data": GENERAL}
    guard = {"data": WATCHED, "patience": 2}
    changes = {"training__preserve": terms, "training__guard": guard}
    shown = dict(shown_settings(plan_job(job(**FULL, **changes, training__bestBy="generalLoss"))))
    assert shown["against forgetting"] == (
        "l2Sp, strength 0.01; ewc, strength 100, Fisher information of 64 sequences; kl, strength "
        "1, temperature 1, 4 sequences a step"
    )
    assert shown["guard"] == (
        "stop when the general loss is 0.1 nats above the base's at 2 evaluations in a row"
    )
    assert shown["best by"] == "generalLoss"


def test_terms_are_refused_under_trl_by_their_field_and_a_guard_is_not() -> None:
    (fault,) = faults(job(**FULL, **KL, **GUARD, training__engine="trl"))
    assert fault.path == "spec.training.preserve"
    assert "set engine to native, or remove preserve" in fault.message
    plan_job(job(**FULL, **GUARD, training__engine="trl"))


def test_terms_on_weights_are_refused_with_an_adapter_and_kl_is_not() -> None:
    terms = {"l2Sp": {}, "ewc": {}, "kl": {}, "data": GENERAL}
    lora = {"adapter": {"lora": {}}}
    found = faults(job(**lora, training__preserve=terms))
    paths = ["spec.training.preserve.l2Sp", "spec.training.preserve.ewc"]
    assert [fault.path for fault in found] == paths
    assert all("adapter.lora leaves them as they are: use kl" in fault.message for fault in found)
    plan_job(job(**lora, **KL))


def test_general_data_is_refused_where_rows_would_get_a_context() -> None:
    retrieval = {"data__retrieval": {"documents": {"uri": "file://documents"}}}
    found = faults(job(**FULL, **KL, **GUARD, **retrieval))
    assert [fault.path for fault in found] == [
        "spec.training.preserve.data",
        "spec.training.guard.data",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("validationLos", "did you mean validationLoss"),
        ("reward", "use one of validationLoss, generalLoss"),
        ("generalLoss", "set spec.training.guard"),
    ],
)
def test_a_metric_that_no_evaluation_measures_is_refused_with_the_nearest_names(
    name: str, hint: str
) -> None:
    (fault,) = faults(job(training__bestBy=name))
    assert fault.path == "spec.training.bestBy"
    assert hint in fault.message


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (
            {"preferences": PAIRS, "optimize": {"dpo": {"training": {"bestBy": "rewardMargin"}}}},
            "spec.optimize.dpo.training.bestBy",
        ),
        (
            {
                "preferences": PAIRS,
                "optimize": {"dpo": {"loss": "kto", "training": {"bestBy": "preferenceMargin"}}},
            },
            "spec.optimize.dpo.training.bestBy",
        ),
        (
            {
                "preferences": PAIRS,
                "rewardModel": {"train": {"training": {"bestBy": "generalLoss"}}},
            },
            "spec.rewardModel.train.training.bestBy",
        ),
        (
            {
                "rewardModel": REWARD,
                "optimize": {"grpo": {**PROMPTS, "training": {"bestBy": "validationLoss"}}},
            },
            "spec.optimize.grpo.training.bestBy",
        ),
    ],
    ids=["dpo", "kto", "reward", "grpo"],
)
def test_each_step_of_an_alignment_knows_its_own_metrics(spec: Any, path: str) -> None:
    (fault,) = faults(aligned(**spec))
    assert fault.path == path


def test_steps_of_an_alignment_take_the_metrics_that_they_measure() -> None:
    margin = {"dpo": {"training": {"bestBy": "preferenceMargin"}}}
    accuracy = {"train": {"training": {"bestBy": "rewardAccuracy"}}}
    plan_job(aligned(preferences=PAIRS, optimize=margin, rewardModel=accuracy))


def test_the_sft_step_of_an_alignment_has_the_same_defenses() -> None:
    training = {"preserve": {"kl": {}, "data": GENERAL}, "guard": {"data": WATCHED}}
    step = {"data": {"train": [{"uri": "file://train.jsonl"}]}, "training": training}
    found = stages(plan_job(aligned(sft=step)))
    general = found["prepare"].inputs["general.1"]
    assert isinstance(general, SourceInput)
    assert general.path == "spec.sft.training.preserve.data[1].uri"
    (fault,) = faults(aligned(sft=changed({"spec": step}, {"training__engine": "trl"})["spec"]))
    assert fault.path == "spec.sft.training.preserve"
