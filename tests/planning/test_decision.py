"""Whether a job trains, decided from the facts that its driver posts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.planning.jobs import job
from tests.planning.models import CONFIGS, HELD_OUT, LLAMA, aligned, facts
from tuneyard.api.job_facts import Device, FitAnswer, JobFacts, PromptFacts, RowFacts
from tuneyard.api.model_config import facts_of
from tuneyard.api.model_facts import Experts, LinearShape, ModelFacts
from tuneyard.api.plan import Plan
from tuneyard.api.stage_settings import AssessSettings, EvaluateSettings
from tuneyard.api.status import MemoryEstimate
from tuneyard.manifests.manifest import read
from tuneyard.planning.decision import Decision, decide, job_of
from tuneyard.planning.fit import fit
from tuneyard.planning.hardware import gpu_of
from tuneyard.planning.memory.lengths import packed_bins
from tuneyard.planning.memory.parts import StageMemory
from tuneyard.planning.plan import plan_job

GIB = 1 << 30
LORA: dict[str, Any] = {"adapter": {"lora": {}}}


def posted(
    name: str = "8B", gpu: str | None = "NVIDIA H100", gib: int = 79, **more: Any
) -> JobFacts:
    """Return the facts of a job on GPUs of `gib` GiB, or on the CPU."""
    return JobFacts(model=facts(name), device=Device(gpu=gpu, memory=gib * GIB), **more)


def rows(longest: int) -> dict[str, Any]:
    """Return the facts of prepared rows."""
    return {"rows": {"prepare": RowFacts(longest=longest)}}


def decided(plan: Plan, posted: JobFacts) -> Decision:
    found = decide(plan, posted)
    assert found is not None
    return found


def changes_nothing(answer: FitAnswer) -> bool:
    return answer.refusal is None and not answer.settings


def test_a_job_that_fits_trains_as_planned_and_its_estimate_adds_up() -> None:
    estimate, answer = decided(plan_job(job(**LORA, **HELD_OUT)), posted())
    assert changes_nothing(answer)
    assert answer.planned_bytes == {stage.name: stage.total_bytes for stage in estimate.stages}
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
    assert "the job does not fit: each worker has 79.0 GiB of NVIDIA H100" in (
        answer.refusal.message
    )
    assert "sft takes at least 149.6 GiB (optimizer step)." in answer.refusal.message
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


def test_a_micro_batch_that_the_manifest_sets_is_neither_changed_nor_refused_if_one_row_fits() -> (
    None
):
    """It may never be full: only the rows of each step decide."""
    plan = plan_job(job(**LORA, training__microBatchTokens=65536))
    estimate, answer = decided(plan, posted(gpu="NVIDIA L40S", gib=36, **rows(900)))
    assert answer.refusal is None
    assert not answer.settings or answer.settings["sft"].micro_batch_tokens == 65536
    assert estimate.stages[0].total_bytes > 36 * GIB, "but the status says that it may not fit"


def test_the_true_rows_decide_and_not_the_longest_that_the_manifest_allows() -> None:
    plan = plan_job(job(**LORA, data__maxLength=131072))
    unknown, short, long = (
        decided(plan, posted(**more)) for more in ({}, rows(900), rows(100_000))
    )
    assert unknown.answer.refusal is None
    assert unknown.estimate.stages[0].total_bytes > 79 * GIB
    assert unknown.estimate.stages[0].assumptions == [
        "rows are assumed to be as long as the manifest allows: 131072 tokens"
    ]
    assert short.answer.refusal is None
    assert short.estimate.stages[0].total_bytes < 79 * GIB
    assert not short.estimate.stages[0].assumptions
    assert long.answer.refusal is not None
    assert "set spec.data.maxLength to " in long.answer.refusal.advice


@pytest.mark.parametrize(
    "loop",
    [{"maxSteps": 50}, {"epochs": 0.5}, {"epochs": 2, "earlyStopping": {"patience": 1}}],
    ids=["steps", "half an epoch", "early stopping"],
)
def test_the_longest_row_refuses_no_job_that_may_end_before_it(loop: dict[str, Any]) -> None:
    plan = plan_job(job(**LORA, **HELD_OUT, data__maxLength=131072, training=loop))
    assert decided(plan, posted(**rows(100_000))).answer.refusal is None


def test_short_rows_that_are_packed_share_bins_as_long_as_the_manifest_allows() -> None:
    assert packed_bins(900, 1024, 4096, 16) == (1024, 16)
    assert packed_bins(500, 1024, 4096, 16) == (1024, 8)
    assert packed_bins(54, 1024, 4096, 16) == (864, 1), "all rows fit into one bin"
    assert packed_bins(500, 32768, 4096, 64) == (4096, 8), "a bin is no longer than a micro-batch"
    assert packed_bins(9000, 9000, 4096, 2) == (9000, 2)
    plan = plan_job(job(**LORA, data__maxLength=8192))
    whole = decided(plan, posted(**rows(8192), gib=139)).estimate.stages[0].total_bytes
    packed = decided(plan, posted(**rows(4096), gib=139)).estimate.stages[0].total_bytes
    apart = plan_job(job(**LORA, data__maxLength=8192, data__packing="never"))
    alone = decided(apart, posted(**rows(4096), gib=139)).estimate.stages[0].total_bytes
    assert alone <= packed <= whole


def test_on_hardware_that_nobody_described_the_estimate_is_shown_and_nothing_refused() -> None:
    for name in (None, "an unknown card"):
        plan = plan_job(job(compute={"gpu": name} if name else {}))
        estimate, answer = decided(plan, JobFacts(model=facts("70B")))
        assert changes_nothing(answer)
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


@pytest.mark.parametrize(
    "compute",
    [
        {"gpuResource": "nvidia.com/mig-1g.10gb"},
        {"gpuResource": "nvidia.com/gpu.shared"},
        {"gpu": "A100-1g.10gb"},
    ],
)
def test_a_part_of_a_gpu_is_not_taken_for_the_whole_one_that_its_label_names(
    compute: dict[str, Any],
) -> None:
    label = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    plan = plan_job(job(compute={"nodeSelector": label, **compute}))
    assert decided(plan, JobFacts(model=facts("8B"))).estimate.device == "unknown"


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
    enough = decided(plan, posted(gpu=None, gib=gib))
    assert enough.answer.refusal is None
    assert enough.estimate.stages[0].total_bytes <= (enough.estimate.capacity_bytes or 0)


def test_a_stage_that_is_done_takes_no_memory_any_more() -> None:
    plan = plan_job(job(**HELD_OUT))
    assert decided(plan, posted()).answer.refusal is not None
    later = decided(plan, posted(done=["prepare", "sft"]))
    assert changes_nothing(later.answer)
    assert [stage.name for stage in later.estimate.stages] == ["evaluate"]


def test_a_job_that_exceeds_only_what_is_estimated_trains_with_the_least() -> None:
    plan = plan_job(job(**LORA))
    answer = decided(plan, posted(gib=17)).answer
    assert answer.refusal is None
    assert answer.settings["sft"].gradient_checkpointing
    assert decided(plan, posted(gib=15)).answer.refusal is not None, "the weights are certain"


def test_a_job_is_refused_by_the_bytes_of_a_gpu_and_not_by_whole_gib() -> None:
    plan = plan_job(job(**LORA))
    known = posted(gib=0)
    takes = max(stage.peak.total for stage in certain(plan, known))
    for size, refused in ((takes, False), (takes - 1, True)):
        here = known.model_copy(update={"device": Device(gpu="H100", memory=size)})
        assert (decided(plan, here).answer.refusal is not None) is refused
    # A described GPU that no worker has reported has up to a GiB more than its description says.
    described = gpu_of("H100")
    assert described.most == described.memory + GIB


def certain(plan: Plan, known: JobFacts) -> list[StageMemory]:
    found = job_of(plan, known)
    assert found is not None
    return fit(found).certain


def test_on_the_cpu_only_all_of_its_memory_is_a_bound() -> None:
    """Pages of libraries and of files can be dropped, workers share them, and memory is swapped."""
    plan = plan_job(job())
    known = posted(gpu=None, gib=1)
    takes = max(stage.peak.total for stage in certain(plan, known))
    for most, refused in ((takes, False), (takes - 1, True)):
        here = Device(memory=GIB, most=most)  # the share of one of many workers
        answer = decided(plan, known.model_copy(update={"device": here})).answer
        assert (answer.refusal is not None) is refused


@pytest.mark.parametrize(("dtype", "refused"), [("float32", False), ("bfloat16", True)])
def test_weights_that_stay_in_their_file_refuse_no_job_on_the_cpu(
    dtype: str, refused: bool
) -> None:
    """They take no memory of their own if they are used in the type of the file."""
    model = facts_of(CONFIGS["8B"] | {"dtype": dtype})
    lora, full = plan_job(job(**LORA)), plan_job(job())
    known = JobFacts(model=model, device=Device(memory=16 * GIB))
    assert (decided(lora, known).answer.refusal is not None) is refused
    assert decided(full, known).answer.refusal is not None, "what is trained is changed"
    frozen = {"layers": "0-30", "embeddings": True, "head": True}
    partly = plan_job(job(training__freeze=frozen))
    assert (decided(partly, known).answer.refusal is not None) is refused


# ---- what is assumed refuses nothing ------------------------------------------------------------

SMOLLM2 = LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
PAIRS = {"data": [{"uri": "file://pairs.jsonl"}]}


def of_pairs(longest: int) -> dict[str, Any]:
    """Return the facts of prepared preferences with 40 held-out prompts of 30 tokens."""
    found = {"pairs": RowFacts(longest=longest, held_out=longest)}
    return {
        "rows": found,
        "prompts": {"evaluate": PromptFacts(longest=30, count=40)},
        "done": ["pairs"],
    }


@pytest.mark.parametrize(("gpu", "gib"), [("L4", 22), ("A10G", 22), ("RTX4090", 23)])
def test_dpo_of_8b_with_short_pairs_trains_on_a_small_gpu(gpu: str, gib: int) -> None:
    plan = aligned("8B", gpu, {"dpo": {}}, preferences=PAIRS, adapter={"lora": {}}).plan
    estimate, answer = decided(plan, posted(gpu=gpu, gib=gib, **of_pairs(200)))
    assert answer.refusal is None
    sampling = next(stage for stage in estimate.stages if stage.name == "evaluate")
    assert sampling.total_bytes < gib * GIB, "with the prompts that were measured"
    unmeasured = decided(plan, posted(gpu=gpu, gib=gib))
    assert unmeasured.answer.refusal is None
    sampling = next(stage for stage in unmeasured.estimate.stages if stage.name == "evaluate")
    assert sampling.total_bytes > gib * GIB
    assert "prompts are assumed to have up to 512 tokens" in sampling.assumptions


def test_the_example_of_ppo_trains_on_the_cpu_with_4_gib() -> None:
    example = Path(__file__).resolve().parents[2] / "examples/alignment/ppo.yaml"
    (ppo,) = read(example.read_text(encoding="utf-8"))
    here = Device(memory=4 * GIB)
    facts = JobFacts(model=facts_of(SMOLLM2), device=here, **rows(180), done=["prepare"])
    estimate, answer = decided(plan_job(ppo), facts)
    assert answer.refusal is None
    (stage,) = (stage for stage in estimate.stages if stage.name == "reward")
    assert stage.assumptions == [
        "preferences are assumed to be as long as the manifest allows: 1024 tokens"
    ]


@pytest.mark.parametrize("gib", [2.0, 2.5, 3.0, 3.5])
def test_dpo_of_a_small_model_trains_on_the_cpu_with_little_memory(gib: float) -> None:
    plan = aligned("8B", "L4", {"dpo": {}}, preferences=PAIRS, adapter={"lora": {}}).plan
    here = Device(memory=int(gib * GIB))
    for more in ({}, of_pairs(200)):
        known = JobFacts(model=facts_of(SMOLLM2), device=here, **more)
        assert decided(plan, known).answer.refusal is None


def test_reward_models_count_as_large_as_they_are_or_refuse_nothing() -> None:
    four = {
        "rewardModel": {"model": {"uri": "hf://org/reward"}},
        "rewardTerms": [{"model": {"uri": f"hf://org/{n}"}, "weight": 1.0} for n in range(3)],
    }
    grpo = {"grpo": {"prompts": {"uri": "file://prompts.jsonl"}}}
    plan = aligned("8B", "H100", grpo, adapter={"lora": {}}, **four).plan
    unknown = decided(plan, posted())
    assert unknown.answer.refusal is None
    assumed = "each reward model of which nothing is known is assumed to be as large as the model"
    assert all(assumed in stage.assumptions for stage in unknown.estimate.stages[:2])
    roles = ("reward", "reward.0", "reward.1", "reward.2")
    small, large = (
        {f"{stage}/{role}": size for stage in ("grpo", "evaluate") for role in roles}
        for size in (400_000_000, 20_000_000_000)
    )
    known = decided(plan, posted(models=small))
    assert known.answer.refusal is None
    assert not any(assumed in stage.assumptions for stage in known.estimate.stages)
    (rewards,) = {
        part.bytes
        for stage in known.estimate.stages
        for part in stage.parts
        if part.name == "reward models"
    }
    assert rewards == 4 * 2 * 400_000_000
    refusal = decided(plan, posted(models=large)).answer.refusal
    assert refusal is not None
    assert "grpo takes at least " in refusal.message


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
        rows=draw.choice([{}, rows(number(bits=24))["rows"]]),
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


def test_a_job_under_trl_is_refused_too_unless_its_workers_share_the_model() -> None:
    trl = {"training__engine": "trl", "compute__workers": 8, "adapter": {"lora": {}}}
    posts = posted("70B", devices=8)
    whole = job(**trl, compute__sharding="none")
    refusal = decided(plan_job(whole), posts).answer.refusal
    assert refusal is not None
    assert "spec.compute.sharding to fsdp" in refusal.advice
    shared = job(**trl, compute__sharding="fsdp")
    assert decided(plan_job(shared), posts).answer.refusal is None


def test_the_evaluation_of_an_alignment_of_0_2_is_estimated_as_that_of_this_version() -> None:
    pairs = {"data": [{"uri": "file://pairs.jsonl"}]}
    plan = aligned("8B", "H100", {"dpo": {}}, preferences=pairs, **LORA).plan
    *others, evaluate, export = plan.stages
    settings = evaluate.settings
    assert isinstance(settings, EvaluateSettings)
    assert settings.completions
    assert settings.preferences
    assert settings.chat
    old = AssessSettings(
        chat=settings.chat,
        prompts=None,
        sampling=settings.completions.sampling,
        reward=[],
        beta=settings.preferences.beta,
        win_rate=None,
        samples=settings.samples,
        gates=[],
        seed=0,
    )
    inputs = {"data" if role == "pairs" else role: it for role, it in evaluate.inputs.items()}
    changed = evaluate.model_copy(update={"settings": old, "inputs": inputs})
    before = plan.model_copy(update={"stages": [*others, changed, export]})
    assert Plan.model_validate_json(before.to_json()) == before
    assert decided(before, posted()) == decided(plan, posted())
