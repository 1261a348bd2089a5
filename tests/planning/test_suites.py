"""Suites become a part of the stage evaluate, also in jobs without held-out rows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planning import test_alignment
from tests.planning.jobs import job
from tests.planning.test_plan import VALIDATION, stage
from tuneyard.api.meta import yaml_fields
from tuneyard.api.plan import SourceInput, leading
from tuneyard.api.stage_settings import (
    AnswersSettings,
    EvaluateSettings,
    LeaksSettings,
    SuiteSettings,
)
from tuneyard.api.suites import SuiteAnswers
from tuneyard.errors import Fault, PlanError
from tuneyard.planning.plan import plan_job

SENSE = {"name": "sense", "choices": {"uri": "file://sense.jsonl"}, "limit": 20}
MANNERS = {"name": "manners", "refusals": {"uri": "s3://suites/xstest.csv"}}
TRAIN = {"train": [{"uri": "https://data.example/train.jsonl"}]}
ARC = {"name": "arc", "task": {"name": "arc_easy", "fewShot": 5, "chatTemplate": True}}
MINE: dict[str, Any] = {
    "name": "mine",
    "task": {
        "file": {"uri": "file://mine.yaml"},
        "data": {"uri": "s3://suites/rows.jsonl"},
        "fewShot": 2,
    },
}
CAPITALS: dict[str, Any] = {
    "name": "capitals",
    "answers": {
        "uri": "file://capitals.jsonl",
        "metrics": ["exactMatch", "bleu"],
        "answerPattern": "[A-Z]",
    },
}


def faults(evaluate: dict[str, Any]) -> list[Fault]:
    return plan_faults(job(evaluate=evaluate))


def plan_faults(of: Any) -> list[Fault]:
    try:
        plan_job(of)
    except PlanError as error:
        return list(error.faults)
    return []


def suites(planned: Any) -> list[SuiteSettings] | None:
    settings = stage(planned, "evaluate").settings
    assert isinstance(settings, EvaluateSettings)
    return settings.suites


def test_each_kind_of_suite_is_measured_from_its_own_input() -> None:
    given = [SENSE, MANNERS, ARC, CAPITALS, MINE]
    planned = plan_job(job(data__validation=VALIDATION, evaluate={"suites": given}))
    assert suites(planned) == [
        SuiteSettings(name="sense", kind="choices", limit=20),
        SuiteSettings(name="manners", kind="refusals", limit=None),
        SuiteSettings(
            name="arc", kind="task", limit=None, task="arc_easy", few_shot=5, chat_template=True
        ),
        SuiteSettings(
            name="capitals",
            kind="answers",
            limit=None,
            answers=AnswersSettings(
                metrics=["exactMatch", "bleu"],
                answer_schema=None,
                answer_pattern="[A-Z]",
                max_new_tokens=64,
            ),
        ),
        SuiteSettings(name="mine", kind="task", limit=None, few_shot=2),
    ]
    inputs = stage(planned, "evaluate").inputs
    found = {role: each for role, each in inputs.items() if isinstance(each, SourceInput)}
    found.pop("model")
    assert {role: (each.uri, each.path) for role, each in found.items()} == {
        "suite.0": ("file://sense.jsonl", "spec.evaluate.suites[0].choices.uri"),
        "suite.1": ("s3://suites/xstest.csv", "spec.evaluate.suites[1].refusals.uri"),
        "suite.3": ("file://capitals.jsonl", "spec.evaluate.suites[3].answers.uri"),
        "suite.4": ("s3://suites/rows.jsonl", "spec.evaluate.suites[4].task.data.uri"),
        "task.4": ("file://mine.yaml", "spec.evaluate.suites[4].task.file.uri"),
    }


def test_a_suite_is_measured_where_no_rows_are_held_out() -> None:
    planned = plan_job(job(data__chatTemplate="{{ messages }}", evaluate={"suites": [SENSE]}))
    evaluate = stage(planned, "evaluate")
    assert "data" not in evaluate.inputs
    assert isinstance(evaluate.settings, EvaluateSettings)
    assert evaluate.settings.chat is not None
    assert evaluate.settings.chat.chat_template == "{{ messages }}"
    assert not any("no evaluate stage" in note for note in planned.notes)


def test_the_items_of_suites_are_searched_in_the_training_rows_before_workers_have_gpus() -> None:
    plain = plan_job(job(data__validation=VALIDATION))
    planned = plan_job(job(data__validation=VALIDATION, evaluate={"suites": [SENSE, MANNERS, ARC]}))
    assert [each.name for each in planned.stages] == [
        "prepare",
        "leaks",
        "sft",
        "evaluate",
        "export",
    ]
    assert [each.name for each in leading(planned.stages)] == ["prepare", "leaks"]
    found = stage(planned, "leaks")
    assert isinstance(found.settings, LeaksSettings)
    assert found.settings.leaks is None
    assert set(found.inputs) == {"train.0", "suite.0", "suite.1"}
    for name in ("prepare", "sft"):  # a suite that is added prepares and trains nothing again
        assert stage(planned, name) == stage(plain, name)
    strict = job(data={"leaks": "error", **TRAIN}, evaluate={"suites": [SENSE]})
    settings = stage(plan_job(strict), "leaks").settings
    assert isinstance(settings, LeaksSettings)
    assert settings.leaks == "error"


@pytest.mark.parametrize(
    ("data", "suites"), [({}, []), ({}, [ARC]), ({"leaks": "off"}, [SENSE, MANNERS])]
)
def test_nothing_is_searched_without_items_at_hand_or_with_leaks_off(
    data: dict[str, Any], suites: list[Any]
) -> None:
    planned = plan_job(job(data={**TRAIN, **data}, evaluate={"suites": suites}))
    assert "leaks" not in [each.name for each in planned.stages]


def test_a_plan_without_suites_does_not_mention_them() -> None:
    plan = plan_job(job(data__validation=VALIDATION))
    assert "suites" not in stage(plan, "evaluate").model_dump_json()


def test_an_alignment_measures_suites_too() -> None:
    planned = plan_job(test_alignment.job(evaluate__suites=[SENSE]))
    assert suites(planned) == [SuiteSettings(name="sense", kind="choices", limit=20)]
    assert "suite.0" in stage(planned, "evaluate").inputs


@pytest.mark.parametrize(
    ("metric", "known"),
    [
        ("sense/accuracy", True),
        ("sense/baseAccuracy", True),
        ("sense/accuracyChange", True),
        ("manners/overRefusal", True),
        ("arc/acc_norm", True),  # the harness knows its metrics
        ("mine/acc", True),
        ("capitals/exactMatch", True),
        ("capitals/patternMatch", True),
        ("capitals/baseBleu", True),
        ("capitals/sentenceBleuChange", True),
        ("capitals/rougeL", False),
        ("capitals/schemaValid", False),
        ("manners/accuracy", False),
        ("other/accuracy", False),
    ],
)
def test_a_gate_names_a_metric_of_a_suite_of_the_job(metric: str, known: bool) -> None:
    gates = [{"metric": metric, "atLeast": 0.0}]
    found = faults({"suites": [SENSE, MANNERS, ARC, CAPITALS, MINE], "gates": gates})
    assert [fault.path for fault in found] == ([] if known else ["spec.evaluate.gates[0].metric"])


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("arc/bleu", "bound arc/bleuChange with atLeast or atMost, or use a metric of single"),
        ("arc/f1", "bound arc/f1Change"),
        ("arc/wmt/chrf", "bound arc/wmt/chrfChange"),
        ("arc/word_perplexity", "bound arc/word_perplexityChange"),
        ("arc/mcc.strict", "bound arc/mcc.strictChange"),
        ("sense/accuracyChange", "bound sense/accuracyChange with atLeast or atMost"),
    ],
)
def test_a_metric_of_all_items_together_has_no_bound_of_the_difference(
    metric: str, remedy: str
) -> None:
    gate = {"metric": metric, "notWorseThanBaseBy": 0.02}
    (fault,) = faults({"suites": [SENSE, ARC], "gates": [gate]})
    assert fault.path == "spec.evaluate.gates[0].notWorseThanBaseBy"
    assert f"{metric} is not a mean of values that both models have on each item" in fault.message
    assert remedy in fault.message
    value = {"metric": metric, "atLeast": 0.02}
    assert faults({"suites": [SENSE, ARC], "gates": [value]}) == []


@pytest.mark.parametrize("metric", ["arc/acc", "arc/exact_match.strict", "sense/accuracy"])
def test_a_metric_that_may_be_a_mean_of_items_has_one(metric: str) -> None:
    gate = {"metric": metric, "notWorseThanBaseBy": 0.02}
    assert faults({"suites": [SENSE, ARC], "gates": [gate]}) == []


def test_a_gate_on_the_change_of_a_suite_needs_the_model_before() -> None:
    gates = [{"metric": "sense/accuracyChange", "atLeast": 0.0}]
    evaluate = {"suites": [SENSE], "compareWithBase": False, "gates": gates}
    assert [fault.path for fault in faults(evaluate)] == ["spec.evaluate.gates[0].metric"]


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("rougeL", "add rouge to the metrics of spec.evaluate.suites[0].answers, or use one of"),
        ("schemaValid", "set answerSchema in spec.evaluate.suites[0].answers, or use one of"),
        ("taste", "measure taste: use one of exactMatch, bleu, sentenceBleu, patternMatch"),
    ],
)
def test_a_gate_on_answers_that_are_not_measured_so_names_the_field_to_set(
    metric: str, remedy: str
) -> None:
    gates = [{"metric": f"capitals/{metric}", "atLeast": 0.0}]
    (fault,) = faults({"suites": [CAPITALS], "gates": gates})
    assert remedy in fault.message


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        ({"metric": "capitals/sentenceBleu", "notWorseThanBaseBy": 0.1, "minItems": 9}, None),
        ({"metric": "capitals/bleu", "notWorseThanBaseBy": 0.1}, "notWorseThanBaseBy"),
        ({"metric": "capitals/bleu", "atLeast": 0.1, "minItems": 3}, "minItems"),
        ({"metric": "bleu", "atLeast": 0.1, "minItems": 3}, "minItems"),
    ],
)
def test_a_metric_of_all_answers_together_has_no_items_to_compare(
    gate: dict[str, Any], field: str | None
) -> None:
    evaluate = {"suites": [CAPITALS], "gates": [gate], "metrics": ["bleu"]}
    wanted = [f"spec.evaluate.gates[0].{field}"] if field else []
    found = plan_faults(job(data__validation=VALIDATION, evaluate=evaluate))
    assert [fault.path for fault in found] == wanted


def test_a_pattern_of_a_suite_that_is_no_regular_expression_is_refused() -> None:
    broken = {**CAPITALS, "answers": {**CAPITALS["answers"], "answerPattern": "("}}
    (fault,) = faults({"suites": [SENSE, broken]})
    assert fault.path == "spec.evaluate.suites[1].answers.answerPattern"


def test_the_identity_of_a_task_follows_the_content_of_its_file_and_rows() -> None:
    evaluate = stage(plan_job(job(evaluate={"suites": [MINE]})), "evaluate")
    roles = dict.fromkeys(evaluate.inputs, "sha256:a")
    every = [evaluate.identity(roles | {role: "sha256:b"}) for role in ("suite.0", "task.0")]
    assert len({evaluate.identity(roles), *every}) == 3


def test_every_field_of_a_suite_of_answers_changes_the_evaluation_alone() -> None:
    def found(**changes: Any) -> dict[str, str]:
        suite = {**CAPITALS, "answers": CAPITALS["answers"] | changes}
        planned = plan_job(job(evaluate={"suites": [suite]}))
        return {stage.name: stage.fingerprint for stage in planned.stages}

    fields: dict[str, Any] = {
        "metrics": ["exactMatch"],
        "answerSchema": "{}",
        "answerPattern": "[a-z]",
        "maxNewTokens": 8,
    }
    of_data = {"uri", "tokenSecret", "credentials"}
    assert set(fields) == set(yaml_fields(SuiteAnswers)) - of_data
    every = [found(), *(found(**{name: value}) for name, value in fields.items())]
    assert len({each["evaluate"] for each in every}) == len(every)
    assert len({(each["prepare"], each["sft"]) for each in every}) == 1
    assert found(tokenSecret={"name": "hf", "key": "token"}) == found()
