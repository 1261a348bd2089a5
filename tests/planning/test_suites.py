"""Suites become a part of the stage evaluate, also in jobs without held-out rows."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.planning import test_alignment
from tests.planning.jobs import job
from tests.planning.test_plan import VALIDATION, stage
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import yaml_fields
from tuneyard.api.plan import SourceInput, StageInput, leading
from tuneyard.api.stage_settings import (
    AnswersSettings,
    DpoSettings,
    EvaluateSettings,
    LeaksSettings,
    SuiteSettings,
    TrainingSuiteSettings,
    TrainSettings,
)
from tuneyard.api.suites import SuiteAnswers
from tuneyard.cli.plan_view import _settings as shown_settings
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
    suites = [SENSE, MINE, MANNERS, ARC]
    planned = plan_job(job(data__validation=VALIDATION, evaluate={"suites": suites}))
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
    assert set(found.inputs) == {"train.0", "suite.0", "suite.2"}, "not those of a task"
    assert stage(planned, "export").inputs["leaks"] == StageInput(stage="leaks")
    assert "leaks" not in stage(plain, "export").inputs
    for name in ("prepare", "sft"):  # a suite that is added prepares and trains nothing again
        assert stage(planned, name) == stage(plain, name)
    strict = job(data={"leaks": "error", **TRAIN}, evaluate={"suites": [SENSE]})
    settings = stage(plan_job(strict), "leaks").settings
    assert isinstance(settings, LeaksSettings)
    assert settings.leaks == "error"


@pytest.mark.parametrize(
    ("data", "suites"), [({}, []), ({}, [ARC, MINE]), ({"leaks": "off"}, [SENSE, MANNERS])]
)
def test_nothing_is_searched_without_items_at_hand_or_with_leaks_off(
    data: dict[str, Any], suites: list[Any]
) -> None:
    planned = plan_job(job(data={**TRAIN, **data}, evaluate={"suites": suites}))
    assert "leaks" not in [each.name for each in planned.stages]


PROMPTED = {"uri": "file://prompts.jsonl"}
ROWS = {"data": {"train": [{"uri": "file://a.jsonl"}], "leaks": "off"}}


@pytest.mark.parametrize(
    ("spec", "leading_stages", "inputs"),
    [
        ({}, ["pairs", "leaks"], {"preferences.0"}),
        (
            {"sft": {"data": {"train": [{"uri": "file://a.jsonl"}]}}},
            ["prepare", "leaks"],
            {"train.0", "preferences.0"},
        ),
        (
            {
                "preferences": None,
                "rewardModel": {"rule": {"jsonSchema": "{}"}},
                "optimize": {"grpo": {"prompts": PROMPTED}},
                "constitution": {"prompts": PROMPTED},
            },
            ["leaks"],
            {"prompts.0"},  # the same prompts are searched once
        ),
        (
            {
                "preferences": {
                    "aiFeedback": {"judge": {"model": {"uri": "file://m"}}, "prompts": PROMPTED}
                },
                "constitution": {"prompts": {"uri": "file://other.jsonl"}},
            },
            ["leaks"],
            {"prompts.0", "prompts.1"},
        ),
    ],
)
def test_an_alignment_searches_the_items_in_all_that_it_trains_on(
    spec: dict[str, Any], leading_stages: list[str], inputs: set[str]
) -> None:
    """Before its workers have GPUs."""
    plain = plan_job(test_alignment.job(**spec))
    planned = plan_job(test_alignment.job(**spec, evaluate__suites=[SENSE, ARC]))
    assert [each.name for each in leading(planned.stages)] == leading_stages
    found = stage(planned, "leaks")
    assert set(found.inputs) == {*inputs, "suite.0"}
    assert isinstance(found.settings, LeaksSettings)
    assert found.settings.leaks is None
    assert len(found.settings.prompts or []) == sum(role.startswith("prompts") for role in inputs)
    assert stage(planned, "export").inputs["leaks"] == StageInput(stage="leaks")
    own = {"leaks", "evaluate", "export"}
    assert [each for each in planned.stages if each.name not in own] == [
        each for each in plain.stages if each.name not in own
    ]
    assert "leaks" not in [each.name for each in plain.stages]
    assert "leaks" not in stage(plain, "export").inputs


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ({}, "warn"),
        ({"leaks": "error"}, "error"),
        ({"leaks": "off"}, None),
        ({"sft": ROWS}, None),
        ({"sft": ROWS, "leaks": "warn"}, "warn"),
    ],
)
def test_the_leaks_of_an_alignment_follow_its_own_field_and_then_that_of_its_fine_tuning(
    spec: dict[str, Any], policy: str | None
) -> None:
    planned = plan_job(test_alignment.job(**spec, evaluate__suites=[SENSE]))
    found = next((each.settings for each in planned.stages if each.name == "leaks"), None)
    assert (found is None) == (policy is None)
    if isinstance(found, LeaksSettings):
        assert (found.leaks or "warn") == policy


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
        ({"metric": "capitals/bleuChange", "atLeast": 0.1, "minItems": 3}, "minItems"),
        ({"metric": "capitals/baseBleu", "atLeast": 0.1, "minItems": 3}, "minItems"),
        ({"metric": "capitals/exactMatchChange", "atLeast": 0.1, "minItems": 3}, None),
        ({"metric": "capitals/baseExactMatch", "atLeast": 0.1, "minItems": 3}, None),
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


# ---- during training ----------------------------------------------------------------------------

DURING = {"evaluate": {"suites": [SENSE, MANNERS, ARC, CAPITALS]}, "data__validation": VALIDATION}
REWARD = {"rule": {"jsonSchema": "{}"}}


def during(*names: str, **changes: Any) -> FineTuneJob:
    chosen = [{"name": name, "limit": 9} for name in names]
    return job(**{**DURING, "training__suites": chosen, **changes})


def faults_of(wrong: FineTuneJob | AlignmentJob) -> list[Fault]:
    try:
        plan_job(wrong)
    except PlanError as error:
        return list(error.faults)
    return []


def test_a_stage_that_trains_reads_the_rows_of_its_suites() -> None:
    """In the order of its own list, with the fields of the evaluation's."""
    planned = plan_job(during("manners", "sense"))
    training = stage(planned, "sft")
    assert isinstance(training.settings, TrainSettings)
    assert training.settings.suites == [
        TrainingSuiteSettings(name="manners", kind="refusals", limit=None, items=9, chat=None),
        TrainingSuiteSettings(name="sense", kind="choices", limit=20, items=9, chat=None),
    ]
    found = {role: each for role, each in training.inputs.items() if role.startswith("suite")}
    assert {
        role: (each.uri, each.path) for role, each in found.items() if isinstance(each, SourceInput)
    } == {
        "suite.0": ("s3://suites/xstest.csv", "spec.evaluate.suites[1].refusals.uri"),
        "suite.1": ("file://sense.jsonl", "spec.evaluate.suites[0].choices.uri"),
    }
    shown = dict(shown_settings(planned))
    assert shown["measured during training"] == "manners (9 items), sense (9 items)"


def test_suites_during_training_change_the_training_and_nothing_before_it() -> None:
    plain, measured = plan_job(during()), plan_job(during("sense"))
    assert "suites" not in stage(plain, "sft").model_dump_json()
    differing = {
        each.name
        for each, other in zip(plain.stages, measured.stages, strict=True)
        if each.fingerprint != other.fingerprint
    }
    assert differing == {"sft"}
    more = plan_job(during("sense", training__suites=[{"name": "sense", "limit": 10}]))
    assert stage(more, "sft").fingerprint != stage(measured, "sft").fingerprint


def test_training_without_held_out_rows_is_stopped_and_judged_by_a_suite() -> None:
    best = {"bestBy": "sense/accuracy", "suites": [{"name": "sense"}], "earlyStopping": {}}
    planned = plan_job(job(training=best, evaluate={"suites": [SENSE]}))
    training = stage(planned, "sft").settings
    assert isinstance(training, TrainSettings)
    assert training.best_by == "sense/accuracy"
    (note,) = (each for each in planned.notes if "No held-out rows" in each)
    assert "the weights with the best sense/accuracy are kept" in note
    with pytest.raises(ValidationError, match="needs held-out rows"):
        job(training={"earlyStopping": {}})


@pytest.mark.parametrize(
    ("suites", "best_by", "path", "said"),
    [
        (["sence"], None, "suites[0].name", "did you mean sense?"),
        (["lamp"], None, "suites[0].name", "add it to spec.evaluate.suites"),
        (["arc"], None, "suites[0].name", "arc is a task of lm-evaluation-harness"),
        (["capitals"], None, "suites[0].name", "which is done once training has ended"),
        (["sense", "sense"], None, "suites[1].name", "in the list twice"),
        (["sense"], "sense/acuracy", "bestBy", "did you mean sense/accuracy"),
        (["sense"], "sense/overRefusal", "bestBy", "'sense/overRefusal' is not measured"),
        (["sense"], "manners/overRefusal", "bestBy", "add it to spec.training.suites"),
        ([], "sense/accuracy", "bestBy", "add it to spec.training.suites"),
        (["sense"], "validationLos", "bestBy", "did you mean validationLoss"),
        (["sense"], "sense/accuracyChange", "bestBy", "did you mean sense/accuracy"),
    ],
)
def test_a_name_that_is_not_measured_during_training_is_refused_by_its_field(
    suites: list[str], best_by: str | None, path: str, said: str
) -> None:
    changes = {"training__bestBy": best_by} if best_by else {}
    (fault,) = faults_of(during(*suites, **changes))
    assert fault.path == f"spec.training.{path}"
    assert said in fault.message


def test_every_metric_of_a_measured_suite_can_choose_the_checkpoint() -> None:
    for metric in (*("sense/accuracy", "sense/probability", "sense/accuracyPerCharacter"),):
        assert not faults_of(during("sense", training__bestBy=metric))
    for metric in ("manners/overRefusal", "manners/unsafeCompliance"):
        assert not faults_of(during("manners", training__bestBy=metric))


def test_the_steps_of_an_alignment_that_train_a_policy_measure_suites_as_its_evaluation() -> None:
    training = {"suites": [{"name": "manners"}], "bestBy": "manners/overRefusal"}
    step = {"data": {"train": [{"uri": "file://a.jsonl"}], "systemPrompt": "Be kind."}}
    planned = plan_job(
        test_alignment.job(
            evaluate__suites=[SENSE, MANNERS],
            optimize={"dpo": {"training": training}},
            sft={**step, "training": training},
        )
    )
    for settings in (stage(planned, "sft").settings, stage(planned, "dpo").settings):
        loop = settings if isinstance(settings, TrainSettings) else None
        loop = loop or (settings.training if isinstance(settings, DpoSettings) else None)
        assert loop is not None
        assert loop.suites is not None
        assert loop.suites[0].chat is not None
        assert loop.suites[0].chat.system_prompt == "Be kind."
    assert "suite.0" in stage(planned, "dpo").inputs


@pytest.mark.parametrize(
    ("spec", "path", "said"),
    [
        (
            {"optimize": {"dpo": {}}, "rewardModel": {"train": {"training": {}}}},
            "spec.rewardModel.train.training.suites",
            "a reward model does not",
        ),
        (
            {
                "rewardModel": REWARD,
                "preferences": None,
                "optimize": {
                    "grpo": {"prompts": {"uri": "file://prompts.jsonl"}, "training": {}},
                },
            },
            "spec.optimize.grpo.training.suites",
            "grpo measures held-out rewards alone: remove suites",
        ),
    ],
)
def test_steps_without_an_evaluation_of_a_policy_refuse_suites(
    spec: dict[str, Any], path: str, said: str
) -> None:
    *names, last = path.split(".")[1:]
    inner = spec
    for name in names:
        inner = inner[name]
    inner[last] = [{"name": "sense"}]
    (fault,) = faults_of(test_alignment.job(evaluate__suites=[SENSE], **spec))
    assert fault.path == path
    assert said in fault.message


def test_a_suite_under_trl_and_on_a_shared_model_is_planned() -> None:
    sharded = {"compute__workers": 2, "compute__sharding": "fsdp", "training__engine": "trl"}
    assert not faults_of(during("sense", "manners", **sharded, adapter=None))
