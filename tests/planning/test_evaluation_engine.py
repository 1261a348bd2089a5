"""`evaluate.engine`: what vLLM answers in an evaluation, and what it takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden.compare import GOLDEN
from tests.planning.jobs import job, manifest
from tests.planning.models import HELD_OUT, aligned, planned
from tests.planning.test_alignment import faults
from tests.planning.test_alignment import job as alignment
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.plan import Plan
from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard.errors import PlanError
from tuneyard.planning.fit import Job, fit
from tuneyard.planning.plan import plan_job

PATH = "spec.evaluate.engine"
VLLM = {"evaluate__engine": "vllm"}
ASKED = {**VLLM, **HELD_OUT}
REFUSALS = [{"name": "manners", "refusals": {"uri": "file://b.csv"}}]
CHOICES = [{"name": "sense", "choices": {"uri": "file://a.jsonl"}}]


def evaluation(plan: Plan) -> EvaluateSettings:
    settings = next(stage.settings for stage in plan.stages if stage.kind == "evaluate")
    assert isinstance(settings, EvaluateSettings)
    return settings


def refused(wrong: FineTuneJob | AlignmentJob) -> dict[str, str]:
    with pytest.raises(PlanError) as caught:
        plan_job(wrong)
    return {fault.path: fault.message for fault in caught.value.faults}


def test_both_kinds_of_jobs_pass_the_engine_on() -> None:
    assert evaluation(plan_job(job(**ASKED))).engine == "vllm"
    assert evaluation(plan_job(alignment("dpo", **VLLM))).engine == "vllm"
    assert evaluation(plan_job(job(**HELD_OUT))).engine is None


def test_transformers_written_out_leaves_the_bytes_of_a_plan_as_they_are() -> None:
    value = manifest("support-bot")
    value["spec"].setdefault("evaluate", {})["engine"] = "transformers"
    expected = (GOLDEN / "plans" / "support-bot.json").read_text()
    assert plan_job(FineTuneJob.model_validate(value)).to_json() == expected


def test_an_evaluation_does_not_take_the_engine_of_the_training() -> None:
    settings = evaluation(plan_job(alignment("ppo", optimize__ppo__sampling__engine="vllm")))
    assert settings.engine is None
    assert settings.completions is not None
    assert settings.completions.sampling.engine == "transformers"


@pytest.mark.parametrize("kind", ["prefix", "prompt", "bottleneck"])
def test_vllm_is_refused_for_an_adapter_that_is_not_plain_weights(kind: str) -> None:
    found = refused(job(adapter={kind: {}}, output__merge=None, **ASKED))
    assert [*found] == [PATH]
    assert f"adapter.{kind}" in found[PATH]
    wrong = alignment("dpo", adapter={kind: {}}, output__merge=None, **VLLM)
    assert [fault.path for fault in faults(wrong)] == [PATH]


@pytest.mark.parametrize("adapter", [None, {"lora": {}}, {"qlora": {}}, {"ia3": {}}])
def test_vllm_answers_with_plain_weights_and_adapters_that_merge(adapter: Any) -> None:
    """The base of QLoRA is not quantized in an evaluation."""
    plan = plan_job(job(adapter=adapter, output__merge=None, **ASKED))
    assert evaluation(plan).engine == "vllm"


def test_vllm_is_refused_beside_trl_and_so_for_models_that_workers_share() -> None:
    sharded = {"training__engine": "trl", "compute": {"workers": 2, "sharding": "fsdp"}}
    for trl in ({"training__engine": "trl"}, sharded):
        found = refused(job(**ASKED, **trl))
        assert [*found] == [PATH]
        assert "spec.training.engine" in found[PATH]
    assert PATH in refused(alignment("distill", **VLLM))
    native = refused(alignment("dpo", compute={"workers": 2, "sharding": "fsdp"}, **VLLM))
    assert "spec.optimize.dpo.training.engine" in native
    plan = plan_job(job(compute={"workers": 2}, **ASKED))
    assert {stage.runtime.sharding for stage in plan.stages} == {"none"}


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),
        ({"evaluate__suites": CHOICES}, True),
        ({"evaluate__suites": REFUSALS}, False),
        (HELD_OUT, False),
        ({**HELD_OUT, "method": "pretrain"}, True),
        ({**HELD_OUT, "method": "pretrain", "evaluate__suites": REFUSALS}, False),
    ],
)
def test_vllm_is_refused_where_nothing_is_asked(changes: dict[str, Any], is_refused: bool) -> None:
    asked = job(**VLLM, **changes)
    if is_refused:
        assert [*refused(asked)] == [PATH]
    else:
        assert evaluation(plan_job(asked)).engine == "vllm"


# ---- memory -------------------------------------------------------------------------------------


def test_vllm_is_refused_for_an_alignment_whose_evaluation_asks_nothing() -> None:
    asks_nothing = alignment("dpo", preferences__heldOut=0, **VLLM)
    assert "preferences.heldOut" in refused(asks_nothing)[PATH]
    with_suite = alignment("dpo", preferences__heldOut=0, evaluate__suites=REFUSALS, **VLLM)
    assert evaluation(plan_job(with_suite)).engine == "vllm"
    held_out = alignment("dpo", **VLLM)
    assert evaluation(plan_job(held_out)).engine == "vllm"


def moments(job: Job) -> dict[str, dict[str, int]]:
    stage = next(stage for stage in job.memory({}) if stage.stage == "evaluate")
    return {moment.name: {part.name: part.size for part in moment.parts} for moment in stage.device}


def test_the_engine_holds_the_weights_once_more_while_a_model_is_measured() -> None:
    part, lora = "vLLM's weights and cache", {"adapter": {"lora": {}}}
    plain = moments(planned("8B", "H100", **HELD_OUT, **lora))
    by_vllm = moments(planned("8B", "H100", **ASKED, **lora))
    assert plain.keys() == by_vllm.keys()
    assert not any(part in parts for parts in plain.values())
    sizes = {parts[part] for parts in by_vllm.values()}
    assert len(sizes) == 1
    assert sizes.pop() > 2 * planned("8B", "H100").facts.parameters
    answers = by_vllm["answers to held-out prompts"]
    assert "key-value cache" not in answers, "the engine has a cache of its own"
    assert "key-value cache" in plain["answers to held-out prompts"]


def test_the_engines_cache_is_for_the_longest_prompt_and_answer() -> None:
    def cache(**changes: Any) -> int:
        found = moments(planned("8B", "H100", **ASKED, adapter={"lora": {}}, **changes))
        return found["answers to held-out prompts"]["vLLM's weights and cache"]

    short = cache(evaluate__maxNewTokens=8, data__maxLength=128)
    assert cache(evaluate__maxNewTokens=256, data__maxLength=128) > short
    assert cache(evaluate__maxNewTokens=8, data__maxLength=128, evaluate__fewShot=2) > short
    longer = [
        {
            "name": "capitals",
            "answers": {
                "uri": "file://c.jsonl",
                "metrics": ["exactMatch"],
                "maxNewTokens": 512,
            },
        }
    ]
    assert cache(evaluate__maxNewTokens=8, data__maxLength=128, evaluate__suites=longer) > short


def test_an_alignments_completions_are_in_the_engine_and_its_judge_is_not_beside_it() -> None:
    judge = {"winRate": {"judge": {"model": {"uri": "file://judge"}}}, "engine": "vllm"}
    pairs = {"data": [{"uri": "file://p.jsonl"}]}
    found = moments(
        aligned("8B", "H200", {"dpo": {}}, preferences=pairs, adapter={"lora": {}}, evaluate=judge)
    )
    assert "vLLM's weights and cache" in found["sampling"]
    assert "vLLM's weights and cache" not in found["judging"]


def test_a_job_that_fits_without_the_engine_is_told_so() -> None:
    job = planned("8B", "36Gi", adapter={"lora": {}}, **ASKED)
    found = fit(job)
    assert not found.fits
    assert "remove spec.evaluate.engine" in [way.change for way in found.remedies]
    assert fit(planned("8B", "36Gi", adapter={"lora": {}}, **HELD_OUT)).fits
