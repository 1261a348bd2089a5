"""Whether a job trains, decided from the facts that its driver posts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.planning.jobs import job
from tests.planning.models import HELD_OUT, facts
from tuneyard.api.job_facts import Device, FitAnswer, JobFacts
from tuneyard.api.model_facts import Experts, LinearShape, ModelFacts
from tuneyard.api.plan import Plan
from tuneyard.api.status import MemoryEstimate
from tuneyard.planning.decision import Decision, decide
from tuneyard.planning.memory.lengths import packed_bins
from tuneyard.planning.plan import plan_job

GIB = 1 << 30
LORA: dict[str, Any] = {"adapter": {"lora": {}}}


def posted(
    name: str = "8B", gpu: str | None = "NVIDIA H100", gib: int = 79, **more: Any
) -> JobFacts:
    """Return the facts of a job on GPUs of `gib` GiB, or on the CPU."""
    return JobFacts(model=facts(name), device=Device(gpu=gpu, memory=gib * GIB), **more)


def decided(plan: Plan, posted: JobFacts) -> Decision:
    found = decide(plan, posted)
    assert found is not None
    return found


def test_a_job_that_fits_trains_as_planned_and_its_estimate_adds_up() -> None:
    estimate, answer = decided(plan_job(job(**LORA, **HELD_OUT)), posted())
    assert answer == FitAnswer()
    assert estimate.device == "NVIDIA H100"
    assert [stage.name for stage in estimate.stages] == ["sft", "evaluate"]
    for stage in estimate.stages:
        assert stage.total_bytes == sum(part.bytes for part in stage.parts)
        assert estimate.capacity_bytes is not None
        assert stage.total_bytes <= estimate.capacity_bytes
    names = {part.name for part in estimate.stages[0].parts}
    assert {"weights", "gradients", "optimizer", "activations", "logits"} <= names


def test_a_job_that_cannot_fit_is_refused_with_two_ways_that_name_fields() -> None:
    answer = decided(plan_job(job()), posted()).answer
    assert answer.refusal is not None
    assert answer.refusal.reason == "DoesNotFit"
    assert "the job does not fit: each worker can use 74.8 GiB of NVIDIA H100" in (
        answer.refusal.message
    )
    assert "sft takes " in answer.refusal.message
    assert "set spec.adapter to lora" in answer.refusal.advice
    assert answer.refusal.advice.count("; ") >= 1
    assert not answer.settings


def test_what_auto_leaves_open_is_chosen_and_changes_no_byte_of_the_plan() -> None:
    plan = plan_job(job(**LORA))
    before = plan.to_json()
    answer = decided(plan, posted(gib=22, gpu="NVIDIA L4")).answer
    assert answer.refusal is None
    chosen = answer.settings["sft"]
    assert chosen.gradient_checkpointing
    assert chosen.micro_batch_tokens > 0
    assert plan.to_json() == before


def test_a_micro_batch_that_the_manifest_sets_is_not_changed_but_refused_with_its_field() -> None:
    plan = plan_job(job(**LORA, training__microBatchTokens=65536))
    refusal = decided(plan, posted(gpu="NVIDIA L40S", gib=36)).answer.refusal
    assert refusal is not None
    assert "set spec.training.microBatchTokens to " in refusal.advice


def test_the_true_rows_decide_and_not_the_longest_that_the_manifest_allows() -> None:
    plan = plan_job(job(**LORA, data__maxLength=131072))
    assert decided(plan, posted()).answer.refusal is not None
    assert decided(plan, posted(rows=900)).answer.refusal is None


def test_short_rows_that_are_packed_share_bins_as_long_as_the_manifest_allows() -> None:
    assert packed_bins(900, 1024, 4096, 16) == (1024, 16)
    assert packed_bins(500, 1024, 4096, 16) == (1024, 8)
    assert packed_bins(54, 1024, 4096, 16) == (864, 1), "all rows fit into one bin"
    assert packed_bins(500, 32768, 4096, 64) == (4096, 8), "a bin is no longer than a micro-batch"
    assert packed_bins(9000, 9000, 4096, 2) == (9000, 2)
    plan = plan_job(job(**LORA, data__maxLength=8192))
    whole = decided(plan, posted(rows=8192, gib=139)).estimate.stages[0].total_bytes
    packed = decided(plan, posted(rows=4096, gib=139)).estimate.stages[0].total_bytes
    apart = plan_job(job(**LORA, data__maxLength=8192, data__packing="never"))
    alone = decided(apart, posted(rows=4096, gib=139)).estimate.stages[0].total_bytes
    assert alone <= packed <= whole


def test_on_hardware_that_nobody_described_the_estimate_is_shown_and_nothing_refused() -> None:
    for name in (None, "an unknown card"):
        plan = plan_job(job(compute={"gpu": name} if name else {}))
        estimate, answer = decided(plan, JobFacts(model=facts("70B")))
        assert answer == FitAnswer()
        assert estimate.capacity_bytes is None
        assert estimate.device == "unknown"
        assert estimate.stages[0].total_bytes > 500 * GIB


def test_the_gpu_of_the_manifest_decides_only_where_the_workers_report_none() -> None:
    plan = plan_job(job(compute={"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L40S"}}))
    assert decided(plan, JobFacts(model=facts("8B"))).estimate.device == "L40S"
    plan = plan_job(job(compute={"gpu": "L4"}))
    unreported = decided(plan, JobFacts(model=facts("8B")))
    assert unreported.estimate.device == "L4"
    assert unreported.answer.refusal is not None
    assert decided(plan, posted(gpu="NVIDIA B200", gib=178)).answer.refusal is None


def test_a_gpu_without_a_description_is_judged_by_the_memory_that_it_reports() -> None:
    plan = plan_job(job(**LORA))
    assert decided(plan, posted(gpu="Next", gib=200)).answer.refusal is None
    assert decided(plan, posted(gpu="Next", gib=12)).answer.refusal is not None


@pytest.mark.parametrize(
    ("namespace", "way"),
    [("team", "set spec.compute.memory to "), (None, "run it on a machine with ")],
)
def test_on_the_cpu_the_memory_of_the_process_is_the_limit(namespace: str | None, way: str) -> None:
    plan = plan_job(job(**LORA))
    plan = plan.model_copy(update={"job": plan.job.model_copy(update={"namespace": namespace})})
    small = decided(plan, posted(gpu=None, gib=16))
    assert small.estimate.device == "CPU"
    assert small.answer.refusal is not None
    assert way in small.answer.refusal.advice
    gib = int(small.answer.refusal.advice.split(way)[1].split("G")[0])
    assert decided(plan, posted(gpu=None, gib=gib)).answer.refusal is None
    assert decided(plan, posted(gpu=None, gib=gib - 2)).answer.refusal is not None


def test_a_stage_that_is_done_takes_no_memory_any_more() -> None:
    plan = plan_job(job(**HELD_OUT))
    assert decided(plan, posted()).answer.refusal is not None
    later = decided(plan, posted(done=["prepare", "sft"]))
    assert later.answer == FitAnswer()
    assert [stage.name for stage in later.estimate.stages] == ["evaluate"]


def test_a_job_that_exceeds_only_the_estimated_reserve_of_a_gpu_trains_with_the_least() -> None:
    plan = plan_job(job(**LORA))
    peaks = [stage.total_bytes for stage in decided(plan, posted(gib=10)).estimate.stages]
    gib = -(-max(peaks) // GIB)  # a GPU that the job fills
    answer = decided(plan, posted(gib=gib)).answer
    assert answer.refusal is None
    assert answer.settings["sft"].gradient_checkpointing
    assert decided(plan, posted(gib=gib - 1)).answer.refusal is not None


def test_nothing_is_said_of_a_model_that_is_not_described() -> None:
    assert decide(plan_job(job()), JobFacts(unknown_model="mamba is not described")) is None


def test_whatever_facts_are_valid_are_decided_and_their_estimate_can_be_stored() -> None:
    """An exception would end the post with the driver's outcome, each time that it is sent."""
    draw = random.Random(3)
    for _ in range(60):
        found = decided(plan_job(job(**draw.choice([{}, LORA, HELD_OUT]))), any_facts(draw))
        stored = found.estimate.model_dump_json(by_alias=True)
        assert MemoryEstimate.model_validate_json(stored) == found.estimate
        assert found.answer.refusal is None or found.answer.refusal.advice.count("; ") >= 1


def any_facts(draw: random.Random) -> JobFacts:
    """Return facts that are valid and mostly absurd."""

    def number(least: int = 1, bits: int = 20) -> int:
        return least + draw.getrandbits(draw.randrange(1, bits))

    while True:
        model = ModelFacts(
            architecture="x",
            layers=number(bits=7),
            hidden_size=number(),
            intermediate_size=number(),
            attention_heads=number(),
            key_value_heads=number(),
            head_dim=number(),
            vocabulary_size=number(),
            embedding_size=number(),
            positions=number(0),
            context_length=draw.choice([None, number()]),
            tied_embeddings=draw.random() < 0.5,
            linears=[
                LinearShape(name="q_proj", inputs=number(), outputs=number(), reads="mlpHidden")
            ][: number(0, 2)],
            experts=draw.choice(
                [None, Experts(count=number(), per_token=number(), intermediate_size=number())]
            ),
            norm=draw.choice(["rms", "rmsFloat32", "layer"]),
            norms=number(),
            activation_tensors=number(bits=3),
            stored_bytes=draw.choice([2, 4]),
        )
        if model.parameters <= 10**14:
            break
    return JobFacts(
        model=model,
        rows=draw.choice([None, number(bits=24)]),
        device=draw.choice(
            [
                None,
                Device(gpu="x", memory=draw.getrandbits(50)),
                Device(memory=draw.getrandbits(50)),
                Device(gpu="x", memory=0),
            ]
        ),
        devices=number(),
    )


def test_a_job_under_trl_is_neither_refused_nor_given_settings() -> None:
    """The sizes are those of the native engine."""
    tight = posted("70B", gib=22, gpu="NVIDIA L4")
    assert decided(plan_job(job()), tight).answer.refusal is not None
    assert decide(plan_job(job(training__engine="trl")), tight) is None
    sharded = job(training__engine="trl", compute__sharding="fsdp", compute__workers=2)
    assert decide(plan_job(sharded), tight) is None
