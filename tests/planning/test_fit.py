"""The choice of `auto` for a job, and the changes that make a job fit that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planning.models import HELD_OUT, aligned, planned
from tuneyard.planning.fit import Job, choose, fit, longest_row
from tuneyard.planning.hardware import GPUS, UnknownGpuError, gpu_of
from tuneyard.planning.memory.parts import Settings


def chosen(job: Job, stage: str = "sft") -> Settings:
    return fit(job).chosen[stage]


def test_a_job_that_fits_keeps_the_settings_of_the_manifest() -> None:
    found = fit(planned("8B", "H100", adapter={"lora": {}}, **HELD_OUT))
    assert found.fits
    assert found.remedies == ()
    assert found.chosen["sft"] == Settings(4185)


def test_smaller_micro_batches_come_before_recomputation() -> None:
    assert chosen(planned("8B", "L40S", adapter={"lora": {}})) == Settings(2048)


def test_activations_are_recomputed_where_small_micro_batches_are_not_enough() -> None:
    job = planned("8B", "L4", adapter={"lora": {}})
    assert chosen(job).gradient_checkpointing
    assert job.peak(job.training[0], chosen(job)) <= job.gpu.usable


def test_micro_batches_that_the_manifest_sets_are_kept() -> None:
    job = planned("8B", "L40S", adapter={"lora": {}}, training__microBatchTokens=8192)
    assert chosen(job).micro_batch_tokens == 8192


def test_the_model_is_sharded_only_where_the_engine_can_and_nothing_else_fits() -> None:
    job = replace(planned("8B", "H100", devices=8), shardings=("none", "fsdp"))
    assert choose(job, job.training[0]).sharding == "fsdp"
    small = replace(planned("8B", "H100", 8, adapter={"lora": {}}), shardings=("none", "fsdp"))
    assert choose(small, small.training[0]).sharding == "none"


def test_the_choice_changes_no_byte_of_the_plan() -> None:
    job = planned("8B", "L40S", adapter={"lora": {}})
    before = job.plan.to_json()
    fit(job)
    assert job.plan.to_json() == before


@pytest.mark.parametrize(
    "job",
    [
        planned("8B", "H100"),
        planned("70B", "48Gi", adapter={"qlora": {}}, **HELD_OUT),
        planned("70B", "L4"),
        planned("8B", "L40S", adapter={"lora": {}}, training__microBatchTokens=16384),
        planned("8B", "A100-40GB", adapter={"lora": {}}, data__maxLength=32768),
        aligned("8B", "H100", {"dpo": {}}, preferences={"data": [{"uri": "file://p.jsonl"}]}),
    ],
    ids=["full", "qlora", "far too large", "micro-batches", "long rows", "dpo"],
)
def test_a_job_that_does_not_fit_has_two_ways_that_name_fields(job: Job) -> None:
    found = fit(job)
    assert not found.fits
    assert len(found.remedies) >= 2
    assert all("spec." in way.change or "GPUs" in way.change for way in found.remedies)
    assert all(way.peak is None or way.peak > 0 for way in found.remedies)


def test_a_remedy_fits_once_it_is_followed() -> None:
    job = planned("8B", "L40S", adapter={"lora": {}}, training__microBatchTokens=16384)
    first = fit(job).remedies[0]
    assert first.change == "set spec.training.microBatchTokens to 2048"
    followed = planned("8B", "L40S", adapter={"lora": {}}, training__microBatchTokens=2048)
    assert fit(followed).fits
    assert fit(followed).peak == first.peak


def test_the_longest_row_fits_and_the_next_one_does_not() -> None:
    job = planned("8B", "L40S", adapter={"lora": {}}, data__maxLength=131072)
    longest = longest_row(job, below=131072)
    assert longest is not None
    for length, fits in [(longest, True), (longest + 128, False)]:
        tried = replace(job, lengths=replace(job.lengths, rows=length, pairs=length))
        settings = choose(tried, tried.training[0])
        assert (tried.peak(tried.training[0], settings) <= job.gpu.usable) is fits


# ---- hardware -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h100", "H100"),
        ("NVIDIA-H100-80GB-HBM3", "H100"),
        ("NVIDIA-A100-SXM4-40GB", "A100-40GB"),
        ("A100", "A100-80GB"),
        ("NVIDIA-L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ],
)
def test_a_gpu_is_found_by_its_name_or_its_product_label(name: str, found: str) -> None:
    assert gpu_of(name).name == found


def test_a_gpu_of_which_only_the_memory_is_known_is_estimated() -> None:
    gpu = gpu_of("48Gi")
    assert gpu.estimated
    assert gpu.memory == 48 * 2**30


@pytest.mark.parametrize("name", ["", "TPU", "12", "48"])
def test_another_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(UnknownGpuError, match=r"is not described: name one of T4, .*such as 48Gi"):
        gpu_of(name)


def test_the_table_is_ordered_by_memory() -> None:
    assert [gpu.memory for gpu in GPUS] == sorted(gpu.memory for gpu in GPUS)
