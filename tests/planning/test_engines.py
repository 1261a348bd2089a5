"""The engine of a job's training and the sharding of its models, in plans."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from tests.golden.compare import GOLDEN
from tests.planning.jobs import changed, job
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.compute import Compute
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.plan import Plan
from tuneyard.errors import Fault, PlanError
from tuneyard.planning.plan import plan_job
from tuneyard.planning.trl_arguments import (
    DISTILL_CONFIG,
    DPO_CONFIG,
    KTO_CONFIG,
    ONLINE_CONFIGS,
    OWNED,
    REWARD_CONFIG,
    SFT_CONFIG,
)
from tuneyard.rendering.placement import placed

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


def test_the_gpus_of_one_worker_can_share_a_model() -> None:
    gpus = {"compute__workers": 1, "compute__gpusPerWorker": 8, "compute__minWorkers": 1}
    assert shardings(plan_job(job(**{**FSDP, **gpus})))["sft"] == "fsdp"


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


SHARED = {"compute": {"sharding": "fsdp", "workers": 2}}
ROWS = {"data": {"train": [{"uri": "file://rows.jsonl"}]}}


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_all_stages_that_run_the_policy_of_a_sharded_dpo_are_sharded(loss: str) -> None:
    trl = {"training": {"engine": "trl"}}
    wanted = alignment(**SHARED, sft={**ROWS, **trl}, optimize__dpo={"loss": loss, **trl})
    assert shardings(plan_job(wanted)) == {
        "prepare": "none",
        "sft": "fsdp",
        "pairs": "none",
        "dpo": "fsdp",
        "evaluate": "fsdp",
        "export": "none",
    }


def test_what_needs_a_whole_model_on_each_worker_is_refused_in_a_sharded_alignment() -> None:
    judge = {"model": {"uri": "file://judge"}}
    wrong = alignment(
        **SHARED,
        adapter={"qlora": {}},
        sft=ROWS,
        rewardModel={"train": {}},
        evaluate={"winRate": {"judge": judge}},
    )
    assert [fault.path for fault in faults(wrong)] == [
        "spec.sft.training.engine",
        "spec.optimize.dpo.training.engine",
        "spec.compute.sharding",
        "spec.rewardModel",
        "spec.evaluate.winRate.judge.model",
    ]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_workers_share_the_policy_of_a_job_with_a_rule_as_its_reward(method: str) -> None:
    training = {"engine": "trl", "batchSize": 32}
    optimize = {method: {"prompts": {"uri": "file://p.jsonl"}, "training": training}}
    rule, model = {"rule": {"exactMatch": "answer"}}, {"model": {"uri": "file://reward"}}
    wanted = {**SHARED, "preferences": None, "optimize": optimize}
    planned = plan_job(alignment(**wanted, rewardModel=rule))
    assert shardings(planned) == {method: "fsdp", "evaluate": "fsdp", "export": "none"}
    wrong = alignment(**wanted, rewardModel=model, rewardTerms=[{**model, "weight": 1}])
    assert [fault.path for fault in faults(wrong)] == [
        "spec.rewardModel",
        "spec.rewardTerms[0].model",
    ]


def test_a_sharded_alignment_has_a_method_of_trl_and_two_workers() -> None:
    ppo = {"ppo": {"prompts": {"uri": "file://p.jsonl"}}}
    rule = {"rule": {"exactMatch": "answer"}}
    wrong = alignment(**SHARED, preferences=None, optimize=ppo, rewardModel=rule)
    assert [fault.path for fault in faults(wrong)] == ["spec.compute.sharding"]
    one = alignment(compute__sharding="fsdp", optimize__dpo={"training": {"engine": "trl"}})
    assert "at least 2 workers" in faults(one)[0].message


def test_auto_shards_no_alignment_with_a_part_that_needs_whole_models() -> None:
    trl = {"training": {"engine": "trl"}}
    assert shardings(plan_job(alignment(optimize__dpo=trl)))["dpo"] == "auto"
    whole = plan_job(alignment(optimize__dpo=trl, rewardModel={"train": {}}))
    assert set(shardings(whole).values()) == {"none"}


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_dpo_is_trained_by_trl(loss: str) -> None:
    planned = plan_job(alignment(optimize__dpo={"loss": loss, "training": {"engine": "trl"}}))
    engines = {stage.name: getattr(stage.settings, "training", None) for stage in planned.stages}
    assert engines["dpo"] is not None
    assert engines["dpo"].engine == "trl"


def test_a_reward_model_is_trained_by_trl_with_its_arguments() -> None:
    training = {"engine": "trl", "trl": {"neftune_noise_alpha": 5}}
    planned = plan_job(alignment(rewardModel={"train": {"training": training}}))
    settings = next(stage.settings for stage in planned.stages if stage.name == "reward")
    loop = getattr(settings, "training", None)
    assert loop is not None
    assert (loop.engine, loop.trl) == ("trl", {"neftune_noise_alpha": 5})
    native = plan_job(alignment(rewardModel={"train": {}}))
    prints = [{s.name: s.fingerprint for s in plan.stages} for plan in (planned, native)]
    assert prints[0]["reward"] != prints[1]["reward"]
    assert prints[0]["pairs"] == prints[1]["pairs"]
    assert set(shardings(planned).values()) == {"none"}


@pytest.mark.parametrize(
    ("given", "path", "remedy"),
    [
        ({"center_rewards_coefficient": 0.1}, "center_rewards_coefficient", "train.centering sets"),
        ({"pad_token": "x"}, "pad_token", "Tuneyard tokenizes"),
        ({"beta": 0.1}, "beta", "no argument of TRL's RewardConfig"),
    ],
)
def test_trls_reward_trainer_is_not_asked_for_what_it_does_not_do(
    given: dict[str, Any], path: str, remedy: str
) -> None:
    training = {"engine": "trl", "trl": given}
    (fault,) = faults(alignment(rewardModel={"train": {"training": training}}))
    assert fault.path == f"spec.rewardModel.train.training.trl.{path}"
    assert remedy in fault.message


FEEDBACK = {"judge": {"model": {"uri": "file://judge"}}, "prompts": {"uri": "file://p.jsonl"}}
ENDPOINT = {**FEEDBACK, "judge": {"endpoint": {"url": "https://judge.example/v1", "model": "j"}}}


@pytest.mark.parametrize("feedback", [FEEDBACK, {**ENDPOINT, "disagreement": "tie"}])
def test_trl_is_not_asked_to_train_on_the_probabilities_of_a_judge(
    feedback: dict[str, Any],
) -> None:
    wrong = alignment(
        preferences={"aiFeedback": feedback},
        rewardModel={"train": {"training": {"engine": "trl"}}},
        optimize__dpo={"training": {"engine": "trl"}},
    )
    found = faults(wrong)
    assert [fault.path for fault in found] == [
        "spec.optimize.dpo.training.engine",
        "spec.rewardModel.train.training.engine",
    ]
    assert all("set engine to native" in fault.message for fault in found)


@pytest.mark.parametrize(("loss", "feedback"), [("kto", FEEDBACK), ("sigmoid", ENDPOINT)])
def test_a_judges_certain_labels_are_left_to_trl(loss: str, feedback: dict[str, Any]) -> None:
    plan_job(
        alignment(
            preferences={"aiFeedback": feedback},
            optimize__dpo={"loss": loss, "training": {"engine": "trl"}},
        )
    )


@pytest.mark.parametrize(
    ("dpo", "path", "remedy"),
    [
        (
            {"loss": "kto", "training": {"trl": {"desirable_weight": 2}}},
            "training.trl.desirable_weight",
            "equal total weight",
        ),
        (
            {"loss": "kto", "training": {"trl": {"ld_alpha": 0.5}}},
            "training.trl.ld_alpha",
            "no argument of TRL's KTOConfig",
        ),
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


def online(kind: str, training: dict[str, Any] | None = None, **changes: Any) -> AlignmentJob:
    method = {
        "training": {"engine": "trl", **(training or {})},
        "prompts": {"uri": "file://prompts.jsonl"},
        **changes.pop("method", {}),
    }
    reward = {"rule": {"exactMatch": "answer"}}
    return alignment(preferences=None, optimize={kind: method}, rewardModel=reward, **changes)


def test_ppo_stays_native() -> None:
    (fault,) = faults(online("ppo"))
    assert fault.path == "spec.optimize.ppo.training.engine"
    assert "PPO stays native" in fault.message


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_grpo_and_rloo_are_trained_by_trl(kind: str) -> None:
    given = {"epsilon_high": 0.28, "num_iterations": 2}
    planned = plan_job(online(kind, {"trl": given}, compute={"workers": 2}))
    stage = next(stage for stage in planned.stages if stage.name == kind)
    training = getattr(stage.settings, "training", None)
    assert training is not None
    assert (training.engine, training.trl) == ("trl", given)
    assert stage.fingerprint != plan_job(online(kind)).stages[0].fingerprint


@pytest.mark.parametrize("kind", ["grpo", "rloo", "distill"])
def test_the_workers_of_a_profile_must_share_a_batch_equally(kind: str) -> None:
    def refused(**compute: Any) -> list[Fault]:
        job = _method(kind, batchSize=32, compute={"profile": "gpus", **compute})
        profiles = {"gpus": Compute(workers=4, min_workers=2, gpus_per_worker=2)}
        try:
            placed(plan_job(job), profiles=profiles)
        except PlanError as error:
            return [fault for fault in error.faults if not fault.path.endswith("uri")]
        return []

    (fault,) = refused()
    assert fault.path == f"spec.optimize.{kind}.training.batchSize"
    assert "32 cannot be divided among the 6 of 3 workers" in fault.message
    assert not refused(workers=2)
    assert not refused(minWorkers=4)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "distill"])
def test_workers_that_no_profile_changes_must_share_a_batch_where_no_profile_is_known(
    kind: str,
) -> None:
    """`tuneyard plan` and `tuneyard run` know no profiles, and a job's own workers hold."""

    def of(workers: int) -> AlignmentJob:
        return _method(kind, batchSize=32, compute={"profile": "gpus", "workers": workers})

    with pytest.raises(PlanError, match="32 cannot be divided among the 3 of 3 workers"):
        plan_job(of(3))
    assert plan_job(of(4)).compute.profile == "gpus"


def _method(kind: str, *, compute: Any, **training: Any) -> AlignmentJob:
    if kind == "distill":
        return distillation(training=training, spec__compute=compute)
    return online(kind, training, compute=compute)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize(
    ("changes", "path", "remedy"),
    [
        ({"method": {"sampling": {"engine": "vllm"}}}, "optimize.{}.sampling.engine", "pins 0.32"),
        ({"adapter": {"prompt": {}}}, "adapter.prompt", "another adapter"),
        ({"adapter": {"prefix": {}}}, "adapter.prefix", "engine to native"),
        (
            {"training": {"batchSize": 32}, "compute": {"workers": 3}},
            "optimize.{}.training.batchSize",
            "32 cannot be divided among the 3 of 3 workers",
        ),
        (
            {"compute": {"workers": 4, "minWorkers": 2, "gpusPerWorker": 2}},
            "optimize.{}.training.batchSize",
            "among the 6 of 3 workers",
        ),
        *(
            ({"training": {"trl": {name: value}}}, f"optimize.{{}}.training.trl.{name}", remedy)
            for name, value, remedy in (
                ("use_vllm", True, "TRL 1.16 takes vLLM 0.22 to 0.31"),
                ("vllm_mode", "server", "pins 0.32"),
                ("beta", 0.1, "klCoefficient sets it"),
                ("num_generations", 4, "groupSize sets it"),
                ("steps_per_generation", 4, "training.batchSize sets it"),
                ("reward_weights", [1.0], "spec.rewardTerms"),
                ("top_k", 5, "held-out reward"),
                ("log_completions", True, "Tuneyard writes"),
                ("sync_ref_model", True, "as the stage began"),
                ("epsilon_high", "wide", "is not of the type float | null"),
                ("epsilon_hihg", 0.3, "did you mean 'epsilon_high'?"),
                ("num_iterations", 0, "between 1 and 1000"),
                ("num_iterations", 10**12, "between 1 and 1000"),
                ("num_iterations", 1.5, "is not of the type int"),
            )
        ),
    ],
)
def test_trls_grpo_and_rloo_are_not_asked_for_what_they_do_not_do(
    kind: str, changes: dict[str, Any], path: str, remedy: str
) -> None:
    (fault,) = faults(online(kind, **changes))
    assert fault.path == f"spec.{path.format(kind)}"
    assert remedy in fault.message


def test_a_batch_that_workers_cannot_share_is_for_the_native_engine_alone() -> None:
    plan_job(online("grpo", {"engine": "native", "batchSize": 32}, compute={"workers": 3}))


def distillation(**changes: Any) -> AlignmentJob:
    """Return a job with this in `optimize.distill`; `spec__NAME` is a field of the job."""
    distill = {"teacher": {"uri": "file://teacher"}, "prompts": {"uri": "file://prompts.jsonl"}}
    of_job = {name.removeprefix("spec__"): changes.pop(name) for name in set(changes) - FIELDS}
    return alignment(preferences=None, optimize={"distill": distill | changes}, **of_job)


FIELDS = {"teacher", "sampling", "beta", "training"}


def test_a_distillation_is_trained_by_trl_without_asking_for_it() -> None:
    planned = plan_job(distillation())
    assert [stage.kind for stage in planned.stages] == ["distill", "evaluate", "export"]
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
        (
            {"training": {"trl": {"neftune_noise_alpha": 5}}},
            "distill.training.trl.neftune_noise_alpha",
            "changes the completions",
        ),
        (
            {"training": {"trl": {"use_vllm": True}}},
            "distill.training.trl.use_vllm",
            "pins 0.32: remove it",
        ),
        (
            {"training": {"trl": {"teacher_model_name_or_path": "org/x"}}},
            "distill.training.trl.teacher_model_name_or_path",
            "distill.teacher",
        ),
        (
            {"training": {"batchSize": 6}, "spec__compute": {"workers": 4}},
            "distill.training.batchSize",
            "set a multiple",
        ),
        (
            {"spec__compute": {"workers": 4, "minWorkers": 2}},
            "distill.training.batchSize",
            "64 cannot be divided among the 3 of 3 workers",
        ),
        (
            {"spec__compute": {"workers": 1, "gpusPerWorker": 3}},
            "distill.training.batchSize",
            "equally many prompts on each process, and 64 cannot be divided among the 3",
        ),
        (
            {"training": {"trl": {"tf32": True}}, "spec__compute": {"gpusPerWorker": 0}},
            "distill.training.trl.tf32",
            "raise gpusPerWorker",
        ),
        (
            {"training": {"trl": {"activation_checkpointing_kwargs": {}}}},
            "distill.training.trl.activation_checkpointing_kwargs",
            "set training.gradientCheckpointing to true",
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
    given = {"torch_compile": True, "neftune_noise_alpha": 5}
    planned = plan_job(job(**TRL, training__trl=given))
    stage = planned.stages[1]
    assert getattr(stage.settings, "trl", None) == given
    assert stage.fingerprint != plan_job(job(**TRL)).stages[1].fingerprint
    assert Plan.model_validate_json(planned.to_json()) == planned


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("torch_compil", True, "did you mean 'torch_compile'?"),
        ("qwertz", 1, "see TRL's documentation"),
        ("torch_compile", "yes", "'yes' is not of the type bool"),
        ("torch_compile", 1, "1 is not of the type bool"),
        ("neftune_noise_alpha", True, "True is not of the type float | null"),
        ("neftune_noise_alpha", float("inf"), "inf is not finite"),
        ("activation_checkpointing_kwargs", "/etc/file.json", "is not of the type dict | null"),
        ("learning_rate", 1e-3, "training.learningRate sets it"),
        ("output_dir", "/tmp", "Tuneyard writes checkpoints"),
        ("push_to_hub", True, "Tuneyard writes checkpoints"),
        ("report_to", "wandb", "Tuneyard writes checkpoints"),
        ("resume_from_checkpoint", "/tmp", "no code and no file from elsewhere"),
        ("trust_remote_code", True, "no code and no file from elsewhere"),
        ("fsdp", "full_shard", "set spec.compute.sharding"),
        ("max_length", 5, "data.maxLength sets it"),
        ("loss_type", "dft", "the held-out loss"),
        ("label_smoothing_factor", 0.1, "the held-out loss"),
        ("router_aux_loss_coef", 0.01, "the held-out loss"),
        ("use_liger_kernel", True, "liger-kernel is in no image"),
        ("liger_kernel_config", {}, "liger-kernel is in no image"),
        ("ddp_static_graph", True, "how the workers share their gradients"),
    ],
)
def test_an_argument_that_a_job_may_not_set_is_refused_with_the_reason(
    name: str, value: Any, message: str
) -> None:
    recomputed = {"training__gradientCheckpointing": True}
    (fault,) = faults(job(**TRL, **recomputed, training__trl={name: value}))
    assert fault.path == f"spec.training.trl.{name}"
    assert message in fault.message


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"inner": value}
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1.0, float("nan")]}, "nan is not finite"),
        ({"a": float("-inf")}, "-inf is not finite"),
        ({"a": date(2026, 1, 1)}, "of the type date, which JSON does not have"),
        ({"a": b"x"}, "of the type bytes, which JSON does not have"),
        ({"a": {1: 2}}, "the key 1, which is no string"),
        ({"a": 1 << 63}, "is no 64-bit integer"),
        ({"a": "x" * 2_000_000}, "more than 4096 characters"),
        ({"a": [0] * 5000}, "more than 4096 characters"),
        (nested(5000), "nested deeper than 4 levels"),
    ],
)
def test_a_value_that_a_plan_cannot_hold_is_refused_however_deep_it_lies(
    value: dict[str, Any], message: str
) -> None:
    changes = {"training__gradientCheckpointing": True}
    (fault,) = faults(
        job(**TRL, **changes, training__trl={"activation_checkpointing_kwargs": value})
    )
    assert fault.path == "spec.training.trl.activation_checkpointing_kwargs"
    assert message in fault.message
    assert len(fault.message) < 200


def test_an_argument_that_trl_would_not_use_is_refused() -> None:
    recomputed = {"training__gradientCheckpointing": True}
    given = {"activation_checkpointing_kwargs": {"use_reentrant": False}}
    (fault,) = faults(job(**TRL, training__trl=given))
    assert "set training.gradientCheckpointing to true" in fault.message
    plan_job(job(**TRL, **recomputed, training__trl=given))
    on_cpu = {"compute__gpusPerWorker": 0, "training__trl": {"tf32": True}}
    (fault,) = faults(job(**TRL, **on_cpu))
    assert "raise gpusPerWorker" in fault.message
    plan_job(job(**TRL, training__trl={"tf32": True}))
    dpo = {"training": {"engine": "trl", "trl": given}}
    (fault,) = faults(alignment(optimize__dpo=dpo))
    assert fault.path.startswith("spec.optimize.dpo.training.trl.")


def test_an_argument_of_another_loss_of_grpo_is_refused() -> None:
    for given, loss in (
        ({"sapo_temperature_pos": 2.0}, "sapo"),
        ({"vespo_k_pos": 2.0, "loss_type": "grpo"}, "vespo"),
        ({"delta": 2.0, "loss_type": "cispo", "epsilon_high": 5.0}, "dapo"),
    ):
        (fault,) = faults(online("grpo", {"trl": given}))
        assert fault.path == f"spec.optimize.grpo.training.trl.{next(iter(given))}"
        assert "has no effect with loss_type" in fault.message
        plan_job(online("grpo", {"trl": given | {"loss_type": loss}}))


def test_cispo_needs_its_own_limit_of_the_ratio() -> None:
    (fault,) = faults(online("grpo", {"trl": {"loss_type": "cispo"}}))
    assert fault.path == "spec.optimize.grpo.training.trl.loss_type"
    assert "set epsilon_high too" in fault.message
    plan_job(online("grpo", {"trl": {"loss_type": "cispo", "epsilon_high": 5.0}}))


def test_a_pair_of_numbers_is_written_as_a_list() -> None:
    plan_job(online("rloo", {"trl": {"reward_clip_range": [-1.0, 1.0]}}))


def test_all_wrong_arguments_are_named_at_once() -> None:
    assert len(faults(job(**TRL, training__trl={"a": 1, "b": 2, "seed": 3}))) == 3


def test_arguments_of_trl_need_trl() -> None:
    (fault,) = faults(job(training__trl={"torch_compile": True}))
    assert (fault.path, "set engine to trl" in fault.message) == ("spec.training.trl", True)


def test_the_arguments_that_jobs_may_set_are_those_that_somebody_looked_at() -> None:
    """A new version of TRL may add arguments: decide for each of them."""
    of_all = {
        *("neftune_noise_alpha", "tf32", "full_determinism", "torch_empty_cache_steps"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("activation_checkpointing_kwargs", "activation_offloading"),
    }
    for config in (SFT_CONFIG, DPO_CONFIG, KTO_CONFIG, REWARD_CONFIG):
        assert set(config.free) == of_all, config.name
    shared = {"num_iterations", "epsilon_high", "mask_truncated_completions"}
    online = (of_all - {"neftune_noise_alpha", "activation_offloading"}) | shared
    assert set(ONLINE_CONFIGS["rloo"].free) == online | {
        "normalize_advantages",
        "reward_clip_range",
    }
    assert set(ONLINE_CONFIGS["grpo"].free) == online | {
        *("loss_type", "delta", "sapo_temperature_neg", "sapo_temperature_pos", "scale_rewards"),
        *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        *("importance_sampling_level", "top_entropy_quantile", "entropy_coef"),
        *("off_policy_mask_threshold", "use_bias_correction_kl"),
    }
    sampling = {"top_k", "min_p", "repetition_penalty", "cache_implementation"}
    noisy = {"neftune_noise_alpha", "activation_offloading"}
    assert set(DISTILL_CONFIG.free) == of_all - noisy | sampling
    assert OWNED.keys() <= SFT_CONFIG.fields.keys()
