"""The memory of a job's stages, by arithmetic that is done here a second time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.planning.models import HELD_OUT, aligned, facts, planned
from tuneyard.api.adapters import Adapter, Bottleneck, Ia3, Lora, PrefixTuning, PromptTuning, Qlora
from tuneyard.api.training import Freeze
from tuneyard.planning.fit import Job
from tuneyard.planning.memory.lengths import micro_batch
from tuneyard.planning.memory.parameters import base_bytes, trained
from tuneyard.planning.memory.parts import StageMemory

PAIRS = {"data": [{"uri": "file://pairs.jsonl"}]}
PROMPTS = {"prompts": {"uri": "file://prompts.jsonl"}}
P = 8_030_261_248
"""Parameters of the 8B model."""


def stages(job: Job) -> dict[str, StageMemory]:
    return {stage.stage: stage for stage in job.memory({})}


def parts(stage: StageMemory, moment: str) -> dict[str, int]:
    (found,) = [m for m in (*stage.device, *stage.host) if m.name == moment]
    return {part.name: part.size for part in found.parts}


# ---- what is trained ----------------------------------------------------------------------------


def test_lora_trains_two_matrices_for_each_linear_layer() -> None:
    learned = trained(facts("8B"), Adapter(lora=Lora()), None)
    per_layer = sum(16 * (linear.inputs + linear.outputs) for linear in facts("8B").linears)
    assert learned.parameters == 32 * per_layer == 41_943_040


@pytest.mark.parametrize(
    ("adapter", "parameters"),
    [
        (Adapter(lora=Lora(targets="attention", layers="30-31")), 2 * 16 * (4 * 4096 + 2 * 5120)),
        (Adapter(lora=Lora(targets=["q_proj"], rank=4)), 32 * 4 * 8192),
        (Adapter(prefix=PrefixTuning(length=20)), 32 * 20 * 2 * 1024),
        (Adapter(prompt=PromptTuning(length=20)), 20 * 4096),
        (Adapter(ia3=Ia3()), 32 * (2 * 1024 + 14336)),
        (Adapter(bottleneck=Bottleneck(size=64)), 32 * 2 * (2 * 4096 * 64 + 64 + 4096)),
    ],
)
def test_each_adapter_trains_its_own_number_of_parameters(
    adapter: Adapter, parameters: int
) -> None:
    assert trained(facts("8B"), adapter, None).parameters == parameters


def test_frozen_layers_are_not_trained_and_those_below_all_trained_ones_keep_nothing() -> None:
    freeze = Freeze(layers="0-15", embeddings=True)
    learned = trained(facts("8B"), None, freeze)
    embeddings = 128256 * 4096
    assert learned.parameters == P - embeddings - 16 * facts("8B").layer_parameters
    assert learned.first_layer == 16
    assert trained(facts("8B"), None, Freeze(layers="0-15")).first_layer == 0


def test_a_base_takes_four_bytes_to_be_trained_two_under_lora_and_half_a_byte_in_4_bits() -> None:
    shape, lora, qlora = facts("8B"), Adapter(lora=Lora()), Adapter(qlora=Qlora())
    linear = 32 * shape.linear_parameters
    scales = linear // 64 + 4 * (linear // 64 // 256)
    assert base_bytes(shape, None, 2) == 4 * P
    assert base_bytes(shape, lora, 2) == 2 * P
    assert base_bytes(shape, qlora, 2) == 2 * (P - linear) + linear // 2 + scales
    single = Adapter(qlora=Qlora(double_quantization=False))
    assert base_bytes(shape, single, 2) == 2 * (P - linear) + linear // 2 + 4 * (linear // 64)


def test_terms_against_forgetting_keep_copies_of_the_trained_weights() -> None:
    """The weights at the start, and for EWC the Fisher information; all terms share one start."""
    general = [{"uri": "file://general.jsonl"}]

    def gradient(**terms: Any) -> dict[str, int]:
        training = {"preserve": terms} if terms else {}
        job = planned("8B", "H200", training=training, adapter=None)
        return parts(stages(job)["sft"], "gradient of the loss")

    plain, l2_sp = gradient(), gradient(l2Sp={})
    ewc, kl = gradient(ewc={}, data=general), gradient(kl={}, data=general)
    every = gradient(l2Sp={}, ewc={}, kl={}, data=general)
    assert "reference" not in plain
    assert l2_sp == plain | {"reference": 4 * P}
    assert ewc == plain | {"reference": 4 * P, "Fisher information": 4 * P}
    assert kl == plain | {"reference": 4 * P, "logits": 2 * plain["logits"]}
    assert every == ewc | {"logits": kl["logits"]}


def test_answers_to_a_suite_during_training_take_a_cache_beside_the_optimizer() -> None:
    """Choices take less than a step: they have micro-batches of training, and no gradients."""
    suites = [
        {"name": "sense", "choices": {"uri": "file://sense.jsonl"}},
        {"name": "manners", "refusals": {"uri": "file://manners.csv"}},
    ]

    def training(*names: str) -> StageMemory:
        chosen = [{"name": name} for name in names]
        changes = {"training__suites": chosen, "evaluate__suites": suites}
        return stages(planned("8B", "H200", adapter=None, **changes))["sft"]

    assert training("sense") == training()
    found = parts(training("sense", "manners"), "answers to suites")
    cache = 32 * (256 + 64) * (2 * 32 * 1024 * 2) * 33 // 32
    assert found["key-value cache"] == cache
    assert (found["weights"], found["optimizer"]) == (4 * P, 8 * P)
    assert "gradients" not in found


# ---- micro-batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "tokens", "share", "group", "rows"),
    [(1024, 4096, 16, 1, 4), (1024, 4096, 2, 1, 2), (9000, 4096, 16, 1, 1), (1024, 5120, 16, 2, 4)],
)
def test_a_micro_batch_holds_the_rows_that_fit_and_at_least_one_group(
    length: int, tokens: int, share: int, group: int, rows: int
) -> None:
    assert micro_batch(length, tokens, share=share, group=group).rows == rows


# ---- training -----------------------------------------------------------------------------------


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter_and_bfloat16_copies() -> None:
    loss = parts(stages(planned("8B", "H200"))["sft"], "gradient of the loss")
    assert loss["weights"] == loss["gradients"] == 4 * P
    assert loss["optimizer"] == 8 * P
    matrices = 32 * facts("8B").linear_parameters + 128256 * 4096
    assert loss["bfloat16 copies"] == 2 * matrices
    assert loss["logits"] == 12 * 128256 * 4 * 1024


def test_workers_sum_their_gradients_in_a_buffer_as_large_as_the_gradients() -> None:
    one, two = planned("8B", "H100"), planned("8B", "H100", devices=2)
    assert "sum of the gradients" not in {m.name for m in stages(one)["sft"].device}
    buffer = parts(stages(two)["sft"], "sum of the gradients")["buffer of the gradients"]
    assert buffer == 4 * P


def test_dpo_keeps_no_second_model_and_ppo_keeps_a_copy_of_what_it_trains() -> None:
    lora = {"adapter": {"lora": {}}}
    dpo = stages(aligned("8B", "H100", {"dpo": {}}, preferences=PAIRS, **lora))["dpo"]
    rule = {"rewardModel": {"rule": {"exactMatch": "answer"}}}
    ppo = stages(aligned("8B", "H100", {"ppo": PROMPTS}, **rule, **lora))["ppo"]
    assert "reference" not in parts(dpo, "gradient of the loss")
    adapter = 4 * 41_943_040
    value_head = 4 * 4097
    assert parts(ppo, "gradient of the loss")["reference"] == adapter + value_head
    assert "gradients" not in parts(ppo, "sampling")


def test_a_reward_model_beside_ppo_takes_two_bytes_a_parameter_of_its_layers() -> None:
    reward = {"rewardModel": {"model": {"uri": "file://reward"}}}
    stage = stages(aligned("8B", "H200", {"ppo": PROMPTS}, adapter={"lora": {}}, **reward))["ppo"]
    head = 128256 * 4096
    assert parts(stage, "gradient of the loss")["reward models"] == 2 * (P - head)
    assert stage.assumptions == (
        "prompts are assumed to have up to 512 tokens",
        "completions are assumed to reach maxNewTokens: 256 tokens",
        "each reward model of which nothing is known is assumed to be as large as the model",
    )


def test_the_cache_of_sampling_takes_at_most_a_quarter_of_the_gpu() -> None:
    rule: dict[str, Any] = {"rewardModel": {"rule": {"exactMatch": "answer"}}}
    long = PROMPTS | {"sampling": {"maxNewTokens": 8192}, "rollouts": 256}
    stage = stages(aligned("8B", "L40S", {"ppo": long}, adapter={"lora": {}}, **rule))["ppo"]
    cache = parts(stage, "sampling")["key-value cache"]
    quarter = 0.25 * 44 * 2**30
    assert 0.9 * quarter < cache <= quarter * 33 / 32


# ---- other stages -------------------------------------------------------------------------------


def test_evaluation_loads_the_base_of_a_qlora_job_in_bfloat16() -> None:
    job = planned("70B", "H100", adapter={"qlora": {}}, **HELD_OUT)
    evaluate = stages(job)["evaluate"]
    weights = parts(evaluate, "loss of held-out rows")["weights in bfloat16"]
    assert weights > 2 * facts("70B").parameters
    assert evaluate.peak.total > job.device.usable


def test_evaluation_of_full_fine_tuning_holds_one_model_after_the_other() -> None:
    compared = stages(planned("8B", "H100", **HELD_OUT))["evaluate"]
    assert parts(compared, "loss of held-out rows")["weights in bfloat16"] == 2 * P


SUITES = {
    "choices": {"choices": {"uri": "file://a.jsonl"}},
    "refusals": {"refusals": {"uri": "file://b.csv"}},
    "task": {"task": {"name": "arc_easy"}},
}


@pytest.mark.parametrize(
    ("kind", "moment", "part"),
    [
        ("choices", "scores of suites", "logits"),
        ("refusals", "answers to suites", "key-value cache"),
        ("task", "tasks of suites", "logits"),
    ],
)
def test_an_evaluation_of_suites_alone_has_a_moment_for_each_way_to_measure(
    kind: str, moment: str, part: str
) -> None:
    suites = [{"name": "one", **SUITES[kind]}]
    evaluate = stages(planned("8B", "H100", evaluate__suites=suites))["evaluate"]
    assert [found.name for found in evaluate.device] == [moment]
    found = parts(evaluate, moment)
    assert found["weights"] == 2 * P
    assert found[part] > 100 * 2**20
    assert evaluate.peak.total > 2 * P
    assert evaluate.assumptions == ("items of suites are assumed to have up to 512 tokens",)


def test_longer_answers_to_a_suite_need_a_larger_cache() -> None:
    def cache(*lengths: int) -> float:
        suites: list[dict[str, Any]] = [
            {
                "name": f"suite-{tokens}",
                "answers": {"uri": "file://c.jsonl", "metrics": ["exactMatch"]}
                | {"maxNewTokens": tokens},
            }
            for tokens in lengths
        ]
        evaluate = stages(planned("8B", "H100", evaluate__suites=suites))["evaluate"]
        return parts(evaluate, "answers to suites")["key-value cache"]

    token = (cache(612) - cache(512)) / 100
    assert cache(512, 612) == cache(612) == pytest.approx((512 + 612) * token)


def test_a_job_whose_suites_do_not_fit_does_not_fit() -> None:
    suites = [{"name": "one", **SUITES["choices"]}]
    job = planned("70B", "H100", adapter={"qlora": {}}, evaluate__suites=suites)
    assert stages(job)["evaluate"].peak.total > job.device.usable


def test_the_export_holds_one_tensor_of_the_model_on_the_cpu_and_the_adapter() -> None:
    tensor, adapter, blocks = 2 * 128_256 * 4096, 4 * 41_943_040, 128 << 20
    lora: dict[str, Any] = {"adapter": {"lora": {}}}
    merged = stages(planned("8B", "H100", output__merge=True, **lora))["export"]
    apart = stages(planned("8B", "H100", output__merge=False, **lora))["export"]
    whole = stages(planned("8B", "H100"))["export"]
    assert not merged.device
    assert merged.host_peak.total == tensor + adapter + blocks
    assert apart.host_peak.total == adapter + blocks
    assert whole.host_peak.total == tensor + blocks


def test_a_checkpoint_copies_weights_and_moments_to_the_pods_memory() -> None:
    assert stages(planned("8B", "H100"))["sft"].host_peak.total == 12 * P


def test_each_worker_of_an_alignment_samples_its_share_of_the_prompts_of_the_evaluation() -> None:
    job = aligned("8B", "H200", {"dpo": {}}, preferences=PAIRS, adapter={"lora": {}})
    one, four = (
        parts(stages(replace(job, devices=devices))["evaluate"], "sampling") for devices in (1, 4)
    )
    assert one["key-value cache"] == 4 * four["key-value cache"]
    assert one["weights"] == four["weights"] > 2 * P
