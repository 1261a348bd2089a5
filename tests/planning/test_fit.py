"""The choice of `auto` for a job, and the changes that make a job fit that does not."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest

from tests.planning.models import HELD_OUT, aligned, planned
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.plan import Plan
from tuneyard.planning import fit as fitting
from tuneyard.planning.fit import Job, choose, fit, longest_row
from tuneyard.planning.hardware import GPUS, Cpu, Gpu, UnknownGpuError, gpu_of
from tuneyard.planning.memory.lengths import Lengths
from tuneyard.planning.memory.parts import Settings
from tuneyard.planning.memory.stages import job_memory
from tuneyard.planning.plan import plan_job


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
    assert job.peak(job.training[0], chosen(job)) <= job.device.usable


def test_micro_batches_that_the_manifest_sets_are_kept() -> None:
    job = planned("8B", "L40S", adapter={"lora": {}}, training__microBatchTokens=8192)
    assert chosen(job).micro_batch_tokens == 8192


TRL: dict[str, Any] = {"training__engine": "trl"}
WHOLE: dict[str, Any] = {**TRL, "compute": {"workers": 8, "sharding": "none"}}
SHARED: dict[str, Any] = {**TRL, "compute": {"workers": 8, "sharding": "fsdp"}}


def test_sharding_is_never_chosen_to_fit_as_the_manifest_decides_it() -> None:
    job = planned("8B", "H100", devices=8)
    assert {settings.sharding for settings in fit(job).chosen.values()} == {"none"}


def test_workers_that_share_a_model_hold_a_part_of_its_weights_and_of_their_state() -> None:
    alone, shared = planned("8B", "H100", 8, **WHOLE), planned("8B", "H100", 8, **SHARED)
    parts = {
        name: dict(fit(job).memory[0].peak.parts) for name, job in (("1", alone), ("8", shared))
    }
    for part in ("weights", "gradients", "optimizer"):
        assert parts["8"][part] == pytest.approx(parts["1"][part] / 8, rel=1e-6)
    assert fit(shared).fits
    assert not fit(alone).fits


def test_an_adapter_is_whole_on_each_worker() -> None:
    lora = {"adapter": {"lora": {}}}
    alone, shared = (
        planned("8B", "H100", 8, **WHOLE, **lora),
        planned("8B", "H100", 8, **SHARED, **lora),
    )
    for part in ("gradients", "optimizer"):
        sizes = [dict(fit(job).memory[0].peak.parts)[part] for job in (alone, shared)]
        assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize(("devices", "expected"), [(1, "none"), (8, "fsdp")])
def test_auto_shards_on_several_gpus_what_takes_more_than_half_of_one(
    devices: int, expected: str
) -> None:
    auto = {**TRL, "compute": {"workers": 8}}
    assert chosen(planned("8B", "H100", devices, **auto)).sharding == expected
    lora = {"adapter": {"lora": {}}}
    assert chosen(planned("8B", "H100", devices, **auto, **lora)).sharding == "none"


def test_a_model_that_no_gpu_holds_is_shared_by_the_fewest_workers() -> None:
    found = fit(planned("8B", "H100"))
    assert found.remedies[0].change == (
        "set spec.training.engine to trl, spec.compute.sharding to fsdp and spec.compute.workers "
        "to 2"
    )
    assert fit(planned("8B", "H100", 2, **SHARED)).fits
    own = fit(planned("8B", "H100", 1, **TRL, training__microBatchTokens=64))
    assert own.remedies[0].change == (
        "set spec.compute.sharding to fsdp and spec.compute.workers to 2"
    )
    assert all(
        "fsdp" not in way.change
        for way in fit(planned("70B", "L4", adapter={"qlora": {}})).remedies
    )


def test_the_teacher_of_a_distillation_is_counted_beside_the_policy() -> None:
    teacher = {"uri": "file://teacher"}
    prompts = {"uri": "file://prompts.jsonl"}
    job = aligned("8B", "H200", {"distill": {"teacher": teacher, "prompts": prompts}})
    (memory,) = [found for found in fit(job).memory if found.stage == "distill"]
    assert dict(memory.peak.parts)["teacher"] == 2 * job.facts.parameters
    assert any("the teacher is assumed" in text for text in memory.assumptions)


def test_trl_computes_the_logits_of_a_large_vocabulary_in_tiles() -> None:
    lora = {"adapter": {"lora": {}}, "training__microBatchTokens": 16384}
    native, trl = planned("8B", "H200", **lora), planned("8B", "H200", **TRL, **lora)
    logits = [dict(fit(job).memory[0].device[0].parts)["logits"] for job in (native, trl)]
    assert logits[1] < logits[0] / 8


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


def followed(job: Job, change: str) -> Job:
    """Return a job whose manifest was changed as a remedy says. Raises the errors of planning."""
    value, device = copy.deepcopy(job.plan.manifest), job.device
    for remove in re.findall(r"remove ([^,]*)", change):
        for path in re.findall(r"spec\.[\w.]+", remove):
            *folders, last = path.split(".")
            del reduce(lambda place, folder: place[folder], folders, value)[last]
    for path, text in re.findall(r"(spec\.[\w.]+) to (\w+)", change):
        *folders, last = path.split(".")
        new: Any = int(text) if text.isdecimal() else text
        adapter = (value["spec"].get("adapter") or {}).get("lora", {})
        place = reduce(lambda place, folder: place.setdefault(folder, {}), folders, value)
        place[last] = {text: adapter} if last == "adapter" else new
    if name := re.search(r"run it on (\S+) GPUs", change):
        device = gpu_of(name[1])
    kind = FineTuneJob if value["kind"] == "FineTuneJob" else AlignmentJob
    plan = plan_job(kind.model_validate(value))
    devices = (plan.compute.workers or 1) * plan.compute.processes_per_worker
    return Job(plan, job.facts, device, devices, Lengths.of(plan, job.facts))


GATES = {"evaluate__gates": [{"metric": "validationLoss", "atMost": 3}]}
STOPPING = {**HELD_OUT, "training__earlyStopping": {}}
PAIRS = {"data": [{"uri": "file://p.jsonl"}]}
LONG_ROWS = {"data": {"train": [{"uri": "file://t.jsonl"}], "maxLength": 131072}}
BY_VLLM: dict[str, Any] = {
    "grpo": {"prompts": {"uri": "file://q.jsonl"}, "sampling": {"engine": "vllm"}}
}


@pytest.mark.parametrize(
    "job",
    [
        planned("8B", "L40S", 3, compute={"gpusPerWorker": 3}),
        planned("8B", "H100", 8, compute={"gpusPerWorker": 8}),
        planned("8B", "H100", data__packing="always"),
        planned("70B", "H100", 4, compute={"workers": 4, "minWorkers": 1}, adapter={"lora": {}}),
        planned("70B", "A100-40GB", 5, training__engine="trl", compute={"workers": 5}),
        planned("8B", "48Gi", training__freeze={"layers": "0-3"}),
        planned("70B", "48Gi", adapter={"qlora": {}}, **STOPPING),
        planned("70B", "48Gi", adapter={"qlora": {}}, **HELD_OUT, **GATES),
        planned("70B", "48Gi", adapter={"qlora": {}}, **STOPPING, **GATES),
        planned("8B", "A100-40GB", adapter={"lora": {}}, data__maxLength=131072),
        aligned("8B", "H100", {"dpo": {}}, preferences=PAIRS, adapter={"lora": {}}, sft=LONG_ROWS),
        aligned(
            "8B",
            "48Gi",
            {"dpo": {}},
            preferences={**PAIRS, "maxLength": 131072},
            adapter={"lora": {}},
            sft={"data": {"train": [{"uri": "file://t.jsonl"}]}},
        ),
        aligned(
            "8B",
            "56Gi",
            BY_VLLM,
            adapter={"lora": {}},
            rewardModel={"model": {"uri": "file://reward"}},
        ),
        planned("8B", "36Gi", adapter={"lora": {}}, evaluate__engine="vllm", **HELD_OUT),
    ],
    ids=[
        "three GPUs a worker",
        "eight GPUs",
        "packed",
        "elastic",
        "shared, and not under qlora",
        "frozen layers",
        "stops early",
        "gates",
        "stops early, gates",
        "long rows",
        "long rows, short pairs",
        "long pairs",
        "vllm",
        "evaluation by vllm",
    ],
)
def test_every_calculated_remedy_is_accepted_once_it_is_followed_and_fits(job: Job) -> None:
    for way in fit(job).remedies:
        if way.peak is not None:
            assert fit(followed(job, way.change)).fits, way.change


def in_rounds(number: int) -> Job:
    """Return an alignment in rounds, whose micro-batches are too large for its GPU."""
    judge = {"model": {"uri": "file://judge"}}
    feedback = {"judge": judge, "prompts": {"uri": "file://q.jsonl"}}
    dpo = {"training": {"microBatchTokens": 65536, "batchSize": 64}}
    more: dict[str, Any] = {"adapter": {"lora": {}}, "rounds": number}
    return aligned("8B", "40Gi", {"dpo": dpo}, preferences={"aiFeedback": feedback}, **more)


def test_a_field_that_all_rounds_share_is_named_once() -> None:
    once, thrice = fit(in_rounds(1)).remedies, fit(in_rounds(3)).remedies
    assert thrice == once
    assert once[0].change == "set spec.optimize.dpo.training.microBatchTokens to 2048"


def test_many_rounds_take_little_longer_to_decide_than_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """32 rounds of PPO took 15 seconds, while a driver waits 10 for a response."""
    calls: list[int] = []

    def counted(plan: Plan, *more: Any, **named: Any) -> Any:
        calls.append(len(plan.stages))
        return job_memory(plan, *more, **named)

    monkeypatch.setattr(fitting, "job_memory", counted)
    fit(in_rounds(2))
    few = sum(calls)
    calls.clear()
    fit(in_rounds(32))
    assert sum(calls) < 6 * few


@pytest.mark.parametrize(
    ("of_model", "changes", "expected"),
    [
        ({"architecture": "gpt2"}, {}, "none"),
        ({"architecture": "gpt2"}, {"adapter": {"lora": {}}}, "none"),
        ({"architecture": "mixtral"}, {}, "none"),
        ({"architecture": "mixtral"}, {"adapter": {"lora": {}}}, "fsdp"),
        ({"tied_embeddings": True, "vocabulary_size": 128257}, {}, "none"),
        ({"tied_embeddings": True, "vocabulary_size": 128257}, {"adapter": {"lora": {}}}, "fsdp"),
        ({"tied_embeddings": True}, {}, "fsdp"),
    ],
)
def test_a_model_that_cannot_be_shared_is_planned_whole_and_no_remedy_shares_it(
    of_model: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    job = planned("70B", "H100", 8, **TRL, compute={"workers": 8}, **changes)
    job = replace(job, facts=job.facts.model_copy(update=of_model))
    found = fit(job)
    assert found.chosen["sft"].sharding == expected
    if expected == "none":
        assert all("fsdp" not in way.change for way in found.remedies)


def test_the_longest_row_fits_and_the_next_one_does_not() -> None:
    job = planned("8B", "L40S", adapter={"lora": {}}, data__maxLength=131072)
    longest = longest_row(job, below=131072)
    assert longest is not None
    for length, fits in [(longest, True), (longest + 128, False)]:
        tried = replace(job, lengths=replace(job.lengths, rows=length, pairs=length))
        settings = choose(tried, tried.training[0])
        assert (tried.peak(tried.training[0], settings) <= job.device.usable) is fits


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
        ("NVIDIA-GeForce-RTX-4090", "RTX4090"),
        ("AMD_Instinct_MI300X_OAM", "MI300X"),
        ("rtx-4090", "RTX4090"),
        ("NVIDIA-H100-NVL", "H100-NVL"),
        ("NVIDIA-H200-NVL", "H200"),
        ("A100 40 GB", "A100-40GB"),
        ("H100 80 GB", "H100"),
    ],
)
def test_a_gpu_is_found_by_its_name_or_its_product_label(name: str, found: str) -> None:
    assert gpu_of(name).name == found


def test_a_gpu_of_which_only_the_memory_is_known_is_estimated() -> None:
    gpu = gpu_of("48Gi")
    assert gpu.estimated
    assert gpu.memory == 48 * 2**30


@pytest.mark.parametrize(
    "name",
    [
        "",
        "TPU",
        "12",
        "48",
        "NVIDIA-L40",
        "NVIDIA-T400-4GB",
        "NVIDIA-GH200-480GB",
        "NVIDIA-H100-64GB",
        "NVIDIA-H100-96GB-HBM3",
        "H100 96 GB",
        "H100-64G",
        "NVIDIA-L40S-12Q",
        "NVIDIA-H100-1-10CME",
        "GRID-T4-2B4",
        "NVIDIA-H100-80GB-HBM3-SHARED",
        "GRID-T4-4Q",
        "NVIDIA-H100-80GB-HBM3-MIG-1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_another_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(UnknownGpuError, match=r"is not described: name one of T4, .*such as 48Gi"):
        gpu_of(name)


@pytest.mark.parametrize("device", [gpu_of("1Gi"), Cpu(1 << 29, most=1 << 29)])
def test_a_device_that_holds_no_process_offers_nothing_and_not_less(device: Gpu | Cpu) -> None:
    found = fit(replace(planned("8B", "H100"), device=device))
    assert found.limit == 0
    assert [stage.stage for stage in found.too_large] == ["sft"], "the export uses no GPU"


def test_the_table_is_ordered_by_memory() -> None:
    assert [gpu.memory for gpu in GPUS] == sorted(gpu.memory for gpu in GPUS)
