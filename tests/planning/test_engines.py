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
from tuneyard.planning.trl_arguments import DISTILL_CONFIG, DPO_CONFIG, OWNED, SFT_CONFIG

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
        sft={
            "data": {"train": [{"uri": "file://rows.jsonl"}]},
            "training": {"engine": "trl"},
        },
        rewardModel={"train": {"training": {"engine": "trl"}}},
        compute={"sharding": "fsdp", "workers": 2},
    )
    assert [fault.path for fault in faults(wrong)] == [
        "spec.compute.sharding",
        "spec.sft.training.engine",
        "spec.rewardModel.train.training.engine",
    ]


def test_dpo_is_trained_by_trl_and_the_stages_around_it_are_not() -> None:
    planned = plan_job(alignment(optimize__dpo={"training": {"engine": "trl"}}))
    engines = {stage.name: getattr(stage.settings, "training", None) for stage in planned.stages}
    assert engines["dpo"] is not None
    assert engines["dpo"].engine == "trl"
    assert set(shardings(planned).values()) == {"none"}


@pytest.mark.parametrize(
    ("dpo", "path", "remedy"),
    [
        ({"loss": "kto"}, "training.engine", "remove engine"),
        ({"labelSmoothing": 0.1}, "labelSmoothing", "loss to robust"),
        ({"training": {"trl": {"beta": 1}}}, "training.trl.beta", "optimize.dpo.beta sets it"),
        ({"training": {"trl": {"ld_alpha": 0.5}}}, "training.trl.ld_alpha", "held-out loss"),
        (
            {"training": {"trl": {"packing": True}}},
            "training.trl.packing",
            "no argument of TRL's DPOConfig",
        ),
    ],
)
def test_trls_dpo_is_not_asked_for_what_it_does_not_do(
    dpo: dict[str, Any], path: str, remedy: str
) -> None:
    training = {"engine": "trl", **dpo.get("training", {})}
    (fault,) = faults(alignment(optimize__dpo={**dpo, "training": training}))
    assert fault.path == f"spec.optimize.dpo.{path}"
    assert remedy in fault.message


def test_trls_reinforcement_is_refused_by_name() -> None:
    training = {"training": {"engine": "trl"}, "prompts": {"uri": "file://prompts.jsonl"}}
    reward = {"rule": {"exactMatch": "answer"}}
    for kind, reason in (("ppo", "no PPO any more"), ("grpo", "does not train this step")):
        wrong = alignment(preferences=None, optimize={kind: training}, rewardModel=reward)
        (fault,) = faults(wrong)
        assert fault.path == f"spec.optimize.{kind}.training.engine"
        assert reason in fault.message


def distillation(**changes: Any) -> AlignmentJob:
    """Return a job with this in `optimize.distill`; `spec__NAME` is a field of the job."""
    distill = {"teacher": {"uri": "file://teacher"}, "prompts": {"uri": "file://prompts.jsonl"}}
    of_job = {name.removeprefix("spec__"): changes.pop(name) for name in set(changes) - FIELDS}
    return alignment(preferences=None, optimize={"distill": distill | changes}, **of_job)


FIELDS = {"teacher", "sampling", "beta", "training"}


def test_a_distillation_is_trained_by_trl_without_asking_for_it() -> None:
    planned = plan_job(distillation())
    assert [stage.kind for stage in planned.stages] == ["distill", "assess", "export"]
    training = getattr(planned.stages[0].settings, "training", None)
    assert training is not None
    assert (training.engine, training.batch_size) == ("trl", 64)
    written = plan_job(distillation(training={"engine": "trl"}))
    assert written.to_json() == planned.to_json()


@pytest.mark.parametrize(
    ("changes", "path", "remedy"),
    [
        ({"training": {"engine": "native"}}, "distill.training.engine", "remove engine"),
        ({"sampling": {"engine": "vllm"}}, "distill.sampling.engine", "vLLM 0.22 to 0.31"),
        ({"teacher": {"uri": "file://model"}}, "distill.teacher.uri", "name another model"),
        ({"training": {"trl": {"top_q": 1}}}, "distill.training.trl.top_q", "'top_k'"),
        ({"training": {"trl": {"beta": 0.1}}}, "distill.training.trl.beta", "distill.beta sets"),
        ({"training": {"trl": {"use_vllm": True}}}, "distill.training.trl.use_vllm", "newer one"),
        (
            {"training": {"trl": {"teacher_model_name_or_path": "org/x"}}},
            "distill.training.trl.teacher_model_name_or_path",
            "distill.teacher",
        ),
        (
            {"training": {"batchSize": 6}, "spec__compute": {"workers": 4}},
            "distill.training.batchSize",
            "a multiple of 4",
        ),
        (
            {"spec__compute": {"workers": 4, "minWorkers": 2}},
            "distill.training.batchSize",
            "64 prompts cannot be divided among 3 workers",
        ),
    ],
)
def test_a_distillation_is_not_asked_for_what_trl_does_not_do(
    changes: dict[str, Any], path: str, remedy: str
) -> None:
    (fault,) = faults(distillation(**changes))
    assert fault.path == f"spec.optimize.{path}"
    assert remedy in fault.message


@pytest.mark.parametrize(
    ("adapter", "path"),
    [
        ({"prefix": {}}, "prefix"),
        ({"prompt": {}}, "prompt"),
        ({"lora": {"targets": ["q_proj", "lm_head"]}}, "lora.targets"),
        ({"qlora": {"targets": ["lm_head"]}}, "qlora.targets"),
    ],
)
def test_an_adapter_that_a_distillation_would_not_train_is_refused(adapter: Any, path: str) -> None:
    (fault,) = faults(distillation(spec__adapter=adapter))
    assert fault.path == f"spec.adapter.{path}"


@pytest.mark.parametrize("adapter", [None, {"lora": {}}, {"qlora": {}}, {"ia3": {}}])
def test_other_adapters_distill(adapter: Any) -> None:
    assert plan_job(distillation(spec__adapter=adapter)).stages


def test_all_faults_of_a_distillation_are_named_at_once() -> None:
    wrong = distillation(
        training={"engine": "native", "batchSize": 3, "trl": {"top_p": 0.5}},
        sampling={"engine": "vllm"},
        spec__adapter={"prompt": {}},
        spec__compute={"workers": 2, "sharding": "fsdp"},
    )
    assert {fault.path for fault in faults(wrong)} == {
        "spec.compute.sharding",
        "spec.adapter.prompt",
        "spec.optimize.distill.sampling.engine",
        "spec.optimize.distill.training.batchSize",
        "spec.optimize.distill.training.engine",
        "spec.optimize.distill.training.trl",
        "spec.optimize.distill.training.trl.top_p",
    }


def test_a_model_may_learn_from_what_it_was_before_fine_tuning() -> None:
    sft = {"data": {"train": [{"uri": "file://rows.jsonl"}]}}
    assert plan_job(distillation(teacher={"uri": "file://model"}, spec__sft=sft)).stages


# ---- arguments of TRL ---------------------------------------------------------------------------


def test_arguments_of_trl_reach_the_stage_and_are_a_part_of_its_identity() -> None:
    given = {"use_liger_kernel": True, "neftune_noise_alpha": 5}
    planned = plan_job(job(**TRL, training__trl=given))
    stage = planned.stages[1]
    assert getattr(stage.settings, "trl", None) == given
    assert stage.fingerprint != plan_job(job(**TRL)).stages[1].fingerprint
    assert Plan.model_validate_json(planned.to_json()) == planned


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("use_liger_kernal", True, "did you mean 'use_liger_kernel'?"),
        ("qwertz", 1, "see TRL's documentation"),
        ("use_liger_kernel", "yes", "'yes' is not of the type bool"),
        ("use_liger_kernel", 1, "1 is not of the type bool"),
        ("neftune_noise_alpha", True, "True is not of the type float | null"),
        ("neftune_noise_alpha", float("inf"), "inf is not of the type float | null"),
        ("activation_checkpointing_kwargs", "/etc/file.json", "is not of the type dict | null"),
        ("learning_rate", 1e-3, "training.learningRate sets it"),
        ("output_dir", "/tmp", "Tuneyard writes checkpoints"),
        ("push_to_hub", True, "Tuneyard writes checkpoints"),
        ("report_to", "wandb", "Tuneyard writes checkpoints"),
        ("resume_from_checkpoint", "/tmp", "no code and no file from elsewhere"),
        ("trust_remote_code", True, "no code and no file from elsewhere"),
        ("fsdp", "full_shard", "set spec.compute.sharding"),
        ("max_length", 5, "data.maxLength sets it"),
    ],
)
def test_an_argument_that_a_job_may_not_set_is_refused_with_the_reason(
    name: str, value: Any, message: str
) -> None:
    (fault,) = faults(job(**TRL, training__trl={name: value}))
    assert fault.path == f"spec.training.trl.{name}"
    assert message in fault.message


def test_all_wrong_arguments_are_named_at_once() -> None:
    assert len(faults(job(**TRL, training__trl={"a": 1, "b": 2, "seed": 3}))) == 3


def test_arguments_of_trl_need_trl() -> None:
    (fault,) = faults(job(training__trl={"use_liger_kernel": True}))
    assert (fault.path, "set engine to trl" in fault.message) == ("spec.training.trl", True)


def test_the_arguments_that_jobs_may_set_are_those_that_somebody_looked_at() -> None:
    """A new version of TRL may add arguments: decide for each of them."""
    of_all = {
        *("use_liger_kernel", "liger_kernel_config", "neftune_noise_alpha", "loss_type", "tf32"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode", "full_determinism"),
        *("activation_checkpointing_kwargs", "activation_offloading", "torch_empty_cache_steps"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_static_graph", "router_aux_loss_coef"),
    }
    assert set(SFT_CONFIG.free) == of_all | {"label_smoothing_factor"}
    assert set(DPO_CONFIG.free) == of_all - {"loss_type"}
    sampling = {"top_k", "min_p", "repetition_penalty", "cache_implementation"}
    unknown = {"loss_type", "activation_offloading", "router_aux_loss_coef"}
    assert set(DISTILL_CONFIG.free) == of_all - unknown | sampling
    assert OWNED.keys() <= SFT_CONFIG.fields.keys()
