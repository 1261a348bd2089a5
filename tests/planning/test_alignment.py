"""The plan of an AlignmentJob: its stages, their inputs and the rounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.golden.compare import assert_golden
from tests.planning.jobs import changed
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.plan import Plan, PlannedStage, SourceInput, StageInput
from tuneyard.api.stage_settings import (
    DistillSettings,
    DpoSettings,
    EvaluateSettings,
    FeedbackSettings,
    GrpoSettings,
    PairsSettings,
    PpoSettings,
    RewardTerm,
)
from tuneyard.errors import Fault, PlanError
from tuneyard.manifests.manifest import read
from tuneyard.planning.limits import PREFERENCE_FORMATS
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.storage import storage, storage_faults

EXAMPLES = Path(__file__).parents[2] / "examples" / "alignment"
NAMES = ("ai-feedback", "constitutional", "distill", "dpo", "feedback", "grpo", "ppo", "rloo")


def job(name: str = "dpo", **changes: Any) -> AlignmentJob:
    """Return the job of an example with changed fields; see `tests.planning.jobs.changed`."""
    value = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    return AlignmentJob.model_validate(changed(value, changes))


def stage(planned: Plan, name: str) -> PlannedStage:
    return next(stage for stage in planned.stages if stage.name == name)


def names(planned: Plan) -> list[str]:
    return [stage.name for stage in planned.stages]


def faults(wrong: AlignmentJob) -> list[Fault]:
    with pytest.raises(PlanError) as caught:
        plan_job(wrong)
    return list(caught.value.faults)


def test_the_readmes_manifests_can_be_planned() -> None:
    text = (EXAMPLES.parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    jobs = [job for block in blocks for job in read(block)]
    assert [job.kind for job in jobs] == ["FineTuneJob", "AlignmentJob"]
    assert all(plan_job(job).stages for job in jobs)


def test_the_manifests_of_the_docs_can_be_planned() -> None:
    found = []
    for path in sorted((EXAMPLES.parents[1] / "docs").glob("*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
            value = yaml.safe_load(block)
            if str(value.get("kind")).endswith("Job") and "spec" in value:
                api = {"apiVersion": "tuneyard.io/v1alpha1"}
                found.append(f"{path.name} {value['kind']}")
                assert [plan_job(job).stages for job in read(yaml.safe_dump(api | value))]
    assert "data.md AlignmentJob" in found


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_of_an_example_is_frozen(name: str) -> None:
    assert_golden(f"alignment/{name}.json", plan_job(job(name)).to_json())


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_the_same_after_a_round_trip_by_json(name: str) -> None:
    planned = plan_job(job(name))
    assert Plan.model_validate_json(planned.to_json()) == planned


def test_the_four_steps_come_in_order_and_each_starts_from_the_model_before() -> None:
    planned = plan_job(job("ppo"))
    kinds = ["prepare", "sft", "pairs", "reward", "ppo", "evaluate", "export"]
    assert [stage.kind for stage in planned.stages] == kinds
    ppo = stage(planned, "ppo").inputs
    assert ppo["tuned"] == StageInput(stage="sft")
    assert ppo["reward"] == StageInput(stage="reward")
    measured = stage(planned, "evaluate").inputs
    assert measured["tuned"] == StageInput(stage="ppo")
    assert measured["start"] == StageInput(stage="sft")


def test_a_distillation_follows_fine_tuning_and_is_measured_on_its_prompts() -> None:
    planned = plan_job(job("distill"))
    assert names(planned) == ["prepare", "sft", "distill", "evaluate", "export"]
    distill = stage(planned, "distill")
    assert distill.inputs["tuned"] == StageInput(stage="sft")
    teacher = distill.inputs["teacher"]
    assert isinstance(teacher, SourceInput)
    assert (teacher.uri, teacher.path) == ("job://quickstart", "spec.optimize.distill.teacher.uri")
    assert isinstance(distill.settings, DistillSettings)
    assert distill.settings.chat.system_prompt == "Hedgo help."
    assert distill.settings.training.engine == "trl"
    measured = stage(planned, "evaluate")
    assert measured.inputs["tuned"] == StageInput(stage="distill")
    assert measured.inputs["start"] == StageInput(stage="sft")
    assert measured.inputs["prompts"] == distill.inputs["prompts"]
    assert "teacher" not in measured.inputs


def test_the_rounds_of_a_distillation_continue_each_other() -> None:
    planned = plan_job(job("distill", rounds=2))
    assert names(planned)[2:4] == ["distill", "distill-2"]
    assert stage(planned, "distill-2").inputs["tuned"] == StageInput(stage="distill")


def test_another_teacher_elsewhere_is_no_other_plan_and_another_beta_is() -> None:
    path = "optimize__distill__"
    moved = plan_job(job("distill", **{f"{path}teacher__uri": "file://model"}))
    other = plan_job(job("distill", **{f"{path}beta": 0.5}))
    known = stage(plan_job(job("distill")), "distill").fingerprint
    assert stage(moved, "distill").fingerprint == known, "its digest is part of the identity"
    assert stage(other, "distill").fingerprint != known


def test_later_steps_use_the_system_prompt_of_fine_tuning() -> None:
    pairs = stage(plan_job(job("ppo")), "pairs").settings
    assert isinstance(pairs, PairsSettings)
    assert pairs.chat.system_prompt == "Hedgo help."


@pytest.mark.parametrize(
    ("field", "name"),
    [("preferences__reasoning", "pairs"), ("optimize__ppo__prompts__reasoning", "ppo")],
)
def test_reasoning_is_dropped_by_the_stage_that_reads_it(field: str, name: str) -> None:
    known = stage(plan_job(job("ppo")), name)
    dropped = stage(plan_job(job("ppo", **{field: "drop"})), name)
    assert '"drop"' in dropped.settings.model_dump_json()
    assert dropped.fingerprint != known.fingerprint
    kept = stage(plan_job(job("ppo", **{field: "keep"})), name)
    assert kept == known, "the default is not part of a plan"


def test_rounds_sample_label_and_optimize_again_from_the_last_rounds_model() -> None:
    planned = plan_job(job("ai-feedback", rounds=3))
    assert names(planned)[3:] == [
        *("feedback-2", "pairs-2", "dpo-2"),
        *("feedback-3", "pairs-3", "dpo-3"),
        *("evaluate", "export"),
    ]
    assert stage(planned, "feedback-3").inputs["tuned"] == StageInput(stage="dpo-2")
    assert stage(planned, "dpo-3").inputs["tuned"] == StageInput(stage="dpo-2")
    assert stage(planned, "dpo-3").inputs["data"] == StageInput(stage="pairs-3")
    assert stage(planned, "export").inputs["tuned"] == StageInput(stage="dpo-3")


def test_preferences_of_people_are_prepared_once_for_all_rounds() -> None:
    planned = plan_job(job(rounds=2))
    assert names(planned) == ["pairs", "dpo", "dpo-2", "evaluate", "export"]
    assert stage(planned, "dpo-2").inputs["data"] == StageInput(stage="pairs")


def test_revisions_are_prepared_and_trained_on_from_the_model_before() -> None:
    planned = plan_job(job("constitutional"))
    assert names(planned) == ["critique", "revisions", "revise", "evaluate", "export"]
    revisions = stage(planned, "revisions").inputs["train.0"]
    assert revisions == StageInput(stage="critique", file="revisions.jsonl")
    assert "tuned" not in stage(planned, "revise").inputs


def test_the_constitution_starts_from_the_fine_tuned_model() -> None:
    sft = {"data": {"train": [{"uri": "file://train.jsonl"}]}}
    planned = plan_job(job("constitutional", sft=sft))
    assert stage(planned, "critique").inputs["tuned"] == StageInput(stage="sft")
    assert stage(planned, "revise").inputs["tuned"] == StageInput(stage="sft")


def test_a_judges_key_reaches_the_workers_and_its_url_is_not_in_the_fingerprint() -> None:
    planned = plan_job(job("ai-feedback"))
    assert list(storage(planned).tokens) == ["TUNEYARD_SECRET_JUDGE_TOKEN"]
    path = "preferences__aiFeedback__judge__endpoint__url"
    moved = plan_job(job("ai-feedback", **{path: "https://other.example/v1"}))
    first, second = stage(planned, "feedback"), stage(moved, "feedback")
    assert first.fingerprint == second.fingerprint
    assert first.runtime != second.runtime


def test_another_judge_changes_the_fingerprint() -> None:
    path = "preferences__aiFeedback__judge__endpoint__model"
    other = plan_job(job("ai-feedback", **{path: "judge-small"}))
    assert stage(other, "feedback").fingerprint != (
        stage(plan_job(job("ai-feedback")), "feedback").fingerprint
    )


def test_a_judges_key_may_not_share_a_variable_with_a_token() -> None:
    model = {"uri": "hf://org/model", "tokenSecret": {"name": "judge.token", "key": "x"}}
    path = "preferences__aiFeedback__judge__endpoint__key"
    clash = job("ai-feedback", **{"model": model, path: {"name": "judge", "key": "token.x"}})
    messages = [fault.message for fault in storage_faults(plan_job(clash))]
    assert any("TUNEYARD_SECRET_JUDGE_TOKEN_X" in message for message in messages)


def test_a_judge_that_is_a_model_is_an_input() -> None:
    judge = {"model": {"uri": "hf://org/judge"}}
    planned = stage(plan_job(job("ai-feedback", preferences__aiFeedback__judge=judge)), "feedback")
    source = planned.inputs["judge"]
    assert isinstance(source, SourceInput)
    assert source.path == "spec.preferences.aiFeedback.judge.model.uri"
    assert isinstance(planned.settings, FeedbackSettings)
    assert planned.settings.judge is None


def test_default_principles_are_written_into_the_plan() -> None:
    settings = stage(
        plan_job(job("ai-feedback", preferences__aiFeedback__principles=None)), "feedback"
    ).settings
    assert isinstance(settings, FeedbackSettings)
    assert len(settings.principles) > 3


def test_kto_takes_unpaired_completions() -> None:
    settings = stage(plan_job(job(optimize__dpo__loss="kto")), "pairs").settings
    assert isinstance(settings, PairsSettings)
    assert settings.labeled


def test_kto_and_a_trained_reward_model_exclude_each_other() -> None:
    wrong = job(optimize__dpo__loss="kto", rewardModel={"train": {}})
    assert [fault.path for fault in faults(wrong)] == ["spec.rewardModel.train"]


def test_kto_and_ties_exclude_each_other() -> None:
    tied = {"optimize__dpo__loss": "kto", "preferences__aiFeedback__disagreement": "tie"}
    (fault,) = faults(job("ai-feedback", **tied))
    assert fault.path == "spec.preferences.aiFeedback.disagreement"
    assert "set drop or average" in fault.message
    assert plan_job(job("ai-feedback", optimize__dpo__loss="kto"))
    assert plan_job(job("ai-feedback", preferences__aiFeedback__disagreement="tie"))


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_rule_is_a_reward_without_any_model(method: str) -> None:
    planned = plan_job(
        job(
            preferences=None,
            rewardModel={"rule": {"exactMatch": "answer"}},
            optimize={method: {"prompts": {"uri": "file://prompts.jsonl"}}},
        )
    )
    assert names(planned) == [method, "evaluate", "export"]
    settings = stage(planned, method).settings
    assert isinstance(settings, GrpoSettings)
    assert settings.estimator == method
    (term,) = settings.reward
    assert isinstance(term, RewardTerm)
    assert term.role is None
    assert "reward" not in stage(planned, method).inputs
    assert "data" not in stage(planned, "export").inputs


def test_a_reward_model_alone_is_trained_measured_and_exported() -> None:
    planned = plan_job(job(optimize=None, rewardModel={"train": {}}))
    assert names(planned) == ["pairs", "reward", "evaluate", "export"]
    assert stage(planned, "export").inputs["tuned"] == StageInput(stage="reward")
    assert "tuned" not in stage(planned, "evaluate").inputs


def test_a_reward_model_starts_from_the_fine_tuned_model() -> None:
    assert stage(plan_job(job("ppo")), "reward").inputs["tuned"] == StageInput(stage="sft")
    unmergeable = job("ppo", adapter={"prefix": {}}, output__merge=None)
    assert "tuned" not in stage(plan_job(unmergeable), "reward").inputs


def test_dpo_is_measured_with_its_own_beta() -> None:
    settings = stage(plan_job(job(optimize__dpo__beta=0.3)), "evaluate").settings
    assert isinstance(settings, EvaluateSettings)
    assert settings.preferences
    assert settings.preferences.beta == 0.3


WIN_RATE = {
    "judge": {
        "endpoint": {
            "url": "https://second.example/v1",
            "model": "judge-2",
            "key": {"name": "second", "key": "token"},
        }
    }
}


def test_a_second_judge_compares_at_the_end_and_its_url_is_not_in_the_fingerprint() -> None:
    planned = plan_job(job("ppo", evaluate={"winRate": WIN_RATE}))
    evaluate = stage(planned, "evaluate")
    assert isinstance(evaluate.settings, EvaluateSettings)
    win_rate = evaluate.settings.win_rate
    assert win_rate
    assert win_rate.judge
    assert win_rate.judge.model == "judge-2"
    assert len(win_rate.principles) > 3
    assert "{first}" in win_rate.question
    assert evaluate.runtime.endpoint
    assert list(storage(planned).tokens) == ["TUNEYARD_SECRET_SECOND_TOKEN"]
    url = "evaluate__winRate__judge__endpoint__url"
    moved = plan_job(
        job("ppo", evaluate={"winRate": WIN_RATE}, **{url: "https://other.example/v1"})
    )
    assert stage(moved, "evaluate").fingerprint == evaluate.fingerprint
    assert evaluate.fingerprint != stage(plan_job(job("ppo")), "evaluate").fingerprint


def test_a_second_judge_that_is_a_model_is_an_input_of_the_evaluation_alone() -> None:
    win_rate = {"judge": {"model": {"uri": "hf://org/judge"}}}
    planned = plan_job(job("ppo", evaluate={"winRate": win_rate}))
    source = stage(planned, "evaluate").inputs["judge"]
    assert isinstance(source, SourceInput)
    assert source.path == "spec.evaluate.winRate.judge.model.uri"
    assert [s.name for s in planned.stages if "judge" in s.inputs] == ["evaluate"]


def test_a_gate_on_the_win_rate_needs_a_second_judge() -> None:
    gates = [{"metric": "winRate", "atLeast": 0.5}]
    (fault,) = faults(job("ppo", evaluate={"gates": gates}))
    assert "set evaluate.winRate" in fault.message
    assert plan_job(job("ppo", evaluate={"gates": gates, "winRate": WIN_RATE}))


def test_a_gate_of_supervised_steps_alone_needs_what_they_measure() -> None:
    def found(metric: str, *, held_out: bool = True, **evaluate: Any) -> list[str]:
        data: dict[str, Any] = {"train": [{"uri": "file://t.jsonl"}]}
        if held_out:
            data["validation"] = {"fraction": 0.1}
        steps = {"optimize": None, "preferences": None, "sft": {"data": data}}
        gates = [{"metric": metric, "atLeast": 0.1}]
        try:
            plan_job(job(**steps, evaluate={"gates": gates, **evaluate}))
        except PlanError as error:
            return [fault.message for fault in error.faults]
        return []

    assert found("lossReduction") == []
    assert "set sft.data.validation" in found("lossReduction", held_out=False)[0]
    assert "compareWithBase: true" in found("lossReduction", compareWithBase=False)[0]
    assert "remove it" in found("validationLossOfGaps")[0]
    suites = {"suites": [{"name": "sense", "choices": {"uri": "file://blimp.jsonl"}}]}
    assert found("sense/accuracyChange", **suites) == []
    (message,) = found("sense/accuracyChange", compareWithBase=False, **suites)
    assert "the suite sense does not measure accuracyChange" in message


def test_auto_is_resolved_by_method_and_tuning() -> None:
    settings = stage(
        plan_job(job(optimize__dpo={}, adapter=None, output__merge=None)), "dpo"
    ).settings
    assert isinstance(settings, DpoSettings)
    assert settings.training.learning_rate == 5e-7
    assert settings.training.epochs == 1


def test_every_default_is_noted_once_for_all_rounds() -> None:
    notes = plan_job(job("ai-feedback", optimize__dpo={})).notes
    assert len(notes) == len(set(notes)) == 3


@pytest.mark.parametrize("name", PREFERENCE_FORMATS)
def test_each_format_of_preferences_can_be_named(name: str) -> None:
    planned = plan_job(job(preferences__data=[{"uri": "file://p.jsonl", "format": name}]))
    settings = stage(planned, "pairs").settings
    assert isinstance(settings, PairsSettings)
    assert [each.format for each in settings.preferences] == [name]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"optimize": None, "rewardModel": {"train": {}},
          "evaluate": {"suites": [{"name": "mmlu", "task": {"name": "mmlu"}}]}},
         "spec.evaluate.suites"),
        ({"evaluate__metrics": ["rouge"]}, "spec.evaluate.metrics"),
        ({"evaluate__fewShot": 2}, "spec.evaluate.fewShot"),
        ({"optimize": None, "preferences": None, "sft": {"data": {
            "train": [{"uri": "file://a"}], "validation": {"fraction": 0.1}}},
          "evaluate__gates": [{"metric": "rougeL", "atLeast": 0.5}]},
         "spec.evaluate.gates[0].metric"),
        ({"preferences__data": [{"uri": "file://p.jsonl", "format": "alpaca"}]},
         "spec.preferences.data[0].format"),
        ({"evaluate__gates": [{"metric": "validationLoss", "atMost": 1.0}]},
         "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "rewardGain", "atLeast": 0.0}]},
         "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "preferenceAccuracy", "atLeast": 0.5}],
          "preferences__heldOut": 0.0}, "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "kl", "atMost": 9.0}], "preferences__heldOut": 0.0},
         "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "reward", "atLeast": 0.0}], "preferences__heldOut": 0.0,
          "rewardModel": {"rule": {"exactMatch": "a"}}}, "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "rewardAccuracy", "atLeast": 0.5}],
          "rewardModel": {"model": {"uri": "hf://org/reward"}}, "optimize__dpo__loss": "kto"},
         "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "kl", "notWorseThanBaseBy": 1.0}]},
         "spec.evaluate.gates[0].notWorseThanBaseBy"),
        ({"evaluate__gates": [{"metric": "distinctRatio", "atLeast": 0.5, "minItems": 9}]},
         "spec.evaluate.gates[0].minItems"),
        ({"evaluate__gates": [{"metric": "kl", "atMost": 9.0, "minItems": 9}]},
         "spec.evaluate.gates[0].minItems"),
        ({"evaluate__gates": [{"metric": "preferenceMargin", "atLeast": 0.0, "minItems": 9}]},
         "spec.evaluate.gates[0].minItems"),
        ({"evaluate__gates": [{"metric": "sycophancyShift", "atMost": 0.1, "minItems": 9}]},
         "spec.evaluate.gates[0].minItems"),
        ({"optimize": None, "sft": {"data": {"train": [{"uri": "file://t.jsonl"}]}}},
         "spec.preferences"),
        ({"optimize": None, "preferences": None, "rewardModel": {"rule": {"exactMatch": "a"}}},
         "spec.rewardModel"),
        ({"preferences__heldOut": 0.0, "optimize__dpo__training": {"earlyStopping": {}}},
         "spec.optimize.dpo.training.earlyStopping"),
        ({"optimize": None, "rewardModel": {"train": {}}, "evaluate": {"winRate": WIN_RATE}},
         "spec.evaluate.winRate"),
        ({"preferences__heldOut": 0.0, "evaluate": {"winRate": WIN_RATE}},
         "spec.evaluate.winRate"),
        ({"preferences__heldOut": 0.0, "independentReward": {"rule": {"jsonSchema": "{}"}}},
         "spec.independentReward"),
        ({"evaluate__gates": [{"metric": "independentReward", "atLeast": 0.5}]},
         "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "independentRewardGain", "atLeast": 0.0}]},
         "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "rewardLengthCorrelation", "atMost": 0.5}]},
         "spec.evaluate.gates[0].metric"),
        ({"evaluate__gates": [{"metric": "lengthControlledWinRate", "atLeast": 0.5}]},
         "spec.evaluate.gates[0].metric"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_named(changes: dict[str, Any], path: str) -> None:
    assert [fault.path for fault in faults(job(**changes))] == [path]


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("training", {"dropout": 0.1}, "training.dropout"),
        ("training", {"earlyStopping": {"patience": 2}}, "training.earlyStopping"),
        ("training", {"batchSize": 12}, "training.batchSize"),
    ],
)
def test_training_settings_unfit_for_reinforcement_are_named(
    field: str, value: Any, path: str
) -> None:
    prompts = {"uri": "file://prompts.jsonl"}
    wrong = job(
        preferences=None,
        rewardModel={"rule": {"exactMatch": "answer"}},
        optimize={"grpo": {"prompts": prompts, "groupSize": 8, field: value}},
    )
    assert [fault.path for fault in faults(wrong)] == [f"spec.optimize.grpo.{path}"]


@pytest.mark.parametrize("kind", ["qlora", "prefix", "prompt", "bottleneck"])
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_vllm_is_refused_for_a_policy_that_is_not_plain_weights(method: str, kind: str) -> None:
    path = f"optimize__{method}__sampling__engine"
    wrong = job(method, adapter={kind: {}}, output__merge=None, **{path: "vllm"})
    assert [fault.path for fault in faults(wrong)] == [f"spec.optimize.{method}.sampling.engine"]


@pytest.mark.parametrize("adapter", [None, {"lora": {}}, {"ia3": {}}])
def test_vllm_samples_from_plain_weights_and_adapters_that_merge(adapter: Any) -> None:
    engine = {"optimize__ppo__sampling__engine": "vllm"}
    planned = plan_job(job("ppo", adapter=adapter, output__merge=None, **engine))
    settings = stage(planned, "ppo").settings
    assert isinstance(settings, PpoSettings)
    assert settings.sampling.engine == "vllm"


def test_terms_are_added_to_the_reward_with_their_weights() -> None:
    terms = [
        {"weight": 0.5, "rule": {"exactMatch": "answer"}},
        {"weight": -0.1, "model": {"uri": "file://models/toxicity"}},
    ]
    planned = plan_job(job("ppo", rewardTerms=terms))
    settings, inputs = stage(planned, "ppo").settings, stage(planned, "ppo").inputs
    assert isinstance(settings, PpoSettings)
    assert [(t.weight, t.role, t.rule and t.rule.kind) for t in settings.reward] == [
        (1.0, "reward", None),
        (0.5, None, "exactMatch"),
        (-0.1, "reward.1", None),
    ]
    assert inputs["reward"] == StageInput(stage="reward")
    added = inputs["reward.1"]
    assert isinstance(added, SourceInput)
    assert (added.uri, added.path) == ("file://models/toxicity", "spec.rewardTerms[1].model.uri")
    assert "reward.1" in stage(planned, "evaluate").inputs


def test_terms_without_a_reward_to_add_to_are_refused() -> None:
    with pytest.raises(ValueError, match="rewardModel, which is not set: set rewardModel"):
        job("dpo", rewardTerms=[{"rule": {"exactMatch": "answer"}}])
    with pytest.raises(ValueError, match="set exactly one of model, rule"):
        job("ppo", rewardTerms=[{"weight": 2.0}])


# ---- the independent reward ---------------------------------------------------------------------


GOLD = {"model": {"uri": "file://models/gold"}}


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_an_independent_reward_is_an_input_of_the_optimization_and_the_evaluation(
    method: str,
) -> None:
    planned = plan_job(job(method, independentReward=GOLD))
    for name in (method, "evaluate"):
        found = stage(planned, name)
        assert isinstance(found.settings, PpoSettings | GrpoSettings | EvaluateSettings)
        term = found.settings.independent_reward
        assert term is not None
        assert (term.role, term.rule, term.weight) == ("reward.independent", None, 1.0)
        source = found.inputs["reward.independent"]
        assert isinstance(source, SourceInput)
        assert source.path == "spec.independentReward.model.uri"
        assert all(each.role != term.role for each in found.settings.reward or ())


def test_the_independent_reward_changes_the_stages_that_measure_it_and_no_other() -> None:
    prints = [
        {each.name: each.fingerprint for each in plan_job(planned).stages}
        for planned in (job("ppo"), job("ppo", independentReward=GOLD))
    ]
    changed = {name for name in prints[0] if prints[0][name] != prints[1][name]}
    assert changed == {"ppo", "evaluate"}


def test_dpo_measures_an_independent_reward_once_it_is_over() -> None:
    planned = plan_job(job("dpo", independentReward=GOLD))
    assert "reward.independent" not in stage(planned, "dpo").inputs
    assert "reward.independent" in stage(planned, "evaluate").inputs


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"rewardModel": GOLD, "preferences": None}, "model"),
        ({"rewardTerms": [{"weight": 0.1, **GOLD}]}, "model"),
        ({"rewardTerms": [{"rule": {"exactMatch": "answer"}}],
          "independentReward": {"rule": {"exactMatch": "answer"}}}, "rule"),
    ],
)  # fmt: skip
def test_a_reward_that_is_optimized_is_not_independent(changes: dict[str, Any], path: str) -> None:
    wrong = job("ppo", **{"independentReward": GOLD, **changes})
    (fault,) = faults(wrong)
    assert fault.path == f"spec.independentReward.{path}"
    assert "is optimized as reward" in fault.message
    right = {**changes, "independentReward": {"rule": {"exactMatch": "another"}}}
    assert plan_job(job("ppo", **right)).stages


def test_an_independent_reward_needs_an_aligned_model() -> None:
    with pytest.raises(ValueError, match="optimize is not set: set optimize"):
        job("ppo", optimize=None, independentReward=GOLD)
