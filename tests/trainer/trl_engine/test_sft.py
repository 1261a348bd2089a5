"""TRL's SFTTrainer and the native loop train the same model on the same rows."""

from __future__ import annotations

import contextlib
import json
import os
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.trainer.rows import random_rows, train_stage, write_prepared
from tests.trainer.several_workers import Notes, spawn
from tests.trainer.stop_after import StopAfter, StopAtCheck
from tuneyard.api.plan import PlannedStage, StageInput, TrainRuntime
from tuneyard.api.stage_settings import EvaluateSettings
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation import evaluate
from tuneyard_trainer.generation.batches import generate
from tuneyard_trainer.models import layers, policies, sharding
from tuneyard_trainer.models.base import load_base
from tuneyard_trainer.training import sft as native
from tuneyard_trainer.training.checkpoints import Checkpoints, LoopState
from tuneyard_trainer.trl_engine import sft as trl
from tuneyard_trainer.worker import Interrupted, StageContext, Worker, never_stop

CPU = torch.device("cpu")
LAST = {"keep_best": False}
"""Keep the last weights: the best ones may be older than what a test is about."""
ROWS = random_rows(10)
HELD_OUT = random_rows(4, seed=9)


@pytest.fixture
def inputs(tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any) -> dict[str, Path]:
    write_prepared(tmp_path / "data", tiny_tokenizer, ROWS, HELD_OUT)
    return {"model": tiny_model_dir, "data": tmp_path / "data"}


def run(
    engine: Any,
    folder: Path,
    inputs: dict[str, Path],
    worker: Worker | None = None,
    **settings: Any,
) -> tuple[dict[str, torch.Tensor], Any]:
    folder.mkdir(exist_ok=True)
    stage = train_stage(**(LAST | settings))
    outcome = engine.run(StageContext(stage, inputs, folder, worker or Worker(0, 1, CPU)))
    return load_file(next((folder / "weights").glob("*.safetensors"))), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


PACKING = {"packedSequences", "packedRows", "paddingShare"}
"""Metrics of the native engine alone: TRL's trainer packs nothing."""
JOBS: dict[str, dict[str, Any]] = {
    "full": {},
    "pretrain": {"kind": "pretrain"},
    "frozen": {"freeze": {"layers": "0", "embeddings": True}},
    "recomputed": {"runtime": {"gradientCheckpointing": True}},
    "stopped early": {
        "early_stopping": {"patience": 1},
        "evaluation_steps": 1,
        "learning_rate": 0.1,
    },
    "lora": {"adapter": {"lora": {}}},
    "lora, recomputed": {"adapter": {"lora": {}}, "runtime": {"gradientCheckpointing": True}},
    "dora": {"adapter": {"lora": {"decomposed": True}}},
    "qlora": {"adapter": {"qlora": {}}},
    "ia3": {"adapter": {"ia3": {}}},
    "bottleneck": {"adapter": {"bottleneck": {}}},
    "prompt": {"adapter": {"prompt": {}}},
    "prefix": {"adapter": {"prefix": {}}},
}


@pytest.mark.parametrize("name", JOBS)
def test_both_engines_reach_the_same_weights_by_the_same_losses(
    name: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"learning_rate": 1e-2, "runtime": {"microBatchTokens": 64}, **JOBS[name]}
    ours, expected = run(native, tmp_path / "native", inputs, packing="never", **settings)
    theirs, found = run(trl, tmp_path / "trl", inputs, packing="never", **settings)
    assert ours.keys() == theirs.keys()
    # A rate of 0.1 enlarges the rounding of a processor: one of 12,800 weights was 3e-4 off.
    scale = 10 if settings["learning_rate"] == 0.1 else 1
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=scale * 1e-3, atol=scale * 1e-4)
    for one, other in zip(lines(tmp_path / "native"), lines(tmp_path / "trl"), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"tokensPerSecond"}:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert found.metrics.keys() == expected.metrics.keys() - PACKING


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_goes_on_with_the_next_row_and_reaches_the_same_weights(
    stop: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    whole, _ = run(trl, tmp_path / "whole", inputs)
    with pytest.raises(Interrupted) as stopped:
        run(trl, tmp_path / "parts", inputs, StopAfter(stop).worker())
    assert stopped.value.step == stop + 1
    resumed, outcome = run(trl, tmp_path / "parts", inputs)
    assert outcome.details["resumedAtStep"] == stop + 1
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-6)
    steps = [line["step"] for line in lines(tmp_path / "parts") if "loss" in line]
    assert steps == [*range(1, len(steps) + 1)]


def test_a_resumed_run_repeats_the_dropout_of_its_steps(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"adapter": {"lora": {"dropout": 0.5}}, "learning_rate": 1e-2}
    whole, _ = run(trl, tmp_path / "whole", inputs, **settings)
    with pytest.raises(Interrupted):
        run(trl, tmp_path / "parts", inputs, StopAfter(2).worker(), **settings)
    resumed, _ = run(trl, tmp_path / "parts", inputs, **settings)
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-6)


def test_without_a_limit_on_the_gradient_norm_nothing_is_clipped(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"learning_rate": 1e-2, "optimizer": {"maxGradientNorm": None}, "packing": "never"}
    ours, _ = run(native, tmp_path / "native", inputs, **settings)
    theirs, _ = run(trl, tmp_path / "trl", inputs, **settings)
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4)
    norms = [
        [line["gradientNorm"] for line in lines(tmp_path / engine) if "loss" in line]
        for engine in ("native", "trl")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_trainer_prints_nothing(
    tmp_path: Path, inputs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run(trl, tmp_path / "trl", inputs)
    out, err = capfd.readouterr()
    assert "grad_norm" not in out
    assert "%|" not in err  # a progress bar


def test_a_mixture_of_experts_is_trained_on_its_targets_and_keeps_its_own_configs(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    config = Qwen3MoeConfig(
        vocab_size=400,
        hidden_size=32,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        router_aux_loss_coef=1.0,
        bos_token_id=5,
        eos_token_id=6,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.generation_config.eos_token_id = [6, 7]
    model.save_pretrained(tmp_path / "experts")
    given = {**inputs, "model": tmp_path / "experts"}
    run(native, tmp_path / "native", given, packing="never", learning_rate=1e-2)
    run(trl, tmp_path / "trl", given, packing="never", learning_rate=1e-2)
    losses = [
        [line["loss"] for line in lines(tmp_path / engine) if "loss" in line]
        for engine in ("native", "trl")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (tmp_path / engine / "weights" / name for engine in ("native", "trl"))
        assert json.loads(theirs.read_text()) == json.loads(ours.read_text())


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"lora": {"rank": 4, "dropout": 0.0}}},
    "full, sharded": {"runtime": {"sharding": "fsdp"}},
    "frozen, recomputed, sharded": {
        "keep_best": True,
        "freeze": {"layers": "0"},
        "runtime": {"sharding": "fsdp", "gradientCheckpointing": True},
    },
    "lora, sharded": {
        "adapter": {"lora": {"rank": 4, "dropout": 0.0}},
        "runtime": {"sharding": "fsdp"},
    },
}


MEASURED = ("full, sharded", "lora, sharded")


def measure(
    folder: Path, tuned: Path, inputs: dict[str, Path], worker: Worker, sharding: str
) -> dict[str, float]:
    """Evaluate the weights in `tuned`; return the metrics, which only rank 0 has."""
    settings = {"compareWithBase": True, "samples": 2, "maxNewTokens": 6, "gates": []}
    stage = PlannedStage(
        name="evaluate",
        settings=EvaluateSettings.model_validate(settings),
        inputs={role: StageInput(stage=role) for role in ("model", "data", "tuned")},
        runtime=TrainRuntime(sharding=sharding),
        fingerprint="sha256:test",
    )
    folder.mkdir(exist_ok=True)
    outcome = evaluate.run(StageContext(stage, {**inputs, "tuned": tuned}, folder, worker))
    return dict(outcome.metrics)


def _worker(rank: int, held: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(3)
    loaded = sharding.require_sharded

    def noted(model: Any, world_size: int) -> None:
        loaded(model, world_size)
        held[rank] = sharding.local_bytes(model)

    def misses_one(model: Any, world_size: int) -> None:
        if rank == 1:
            model.whole = torch.nn.Parameter(torch.zeros(3))
        loaded(model, world_size)

    sharding.require_sharded = misses_one
    try:
        stage = train_stage(**LAST, runtime={"sharding": "fsdp"})
        trl.run(StageContext(stage, inputs, folder, Worker(rank, 2, CPU)))
    except StageError as error:
        held[f"refused {rank}"] = error.message
    sharding.require_sharded = noted
    for name, settings in CASES.items():
        (folder / name).mkdir(exist_ok=True)
        stage = train_stage(**(LAST | {"learning_rate": 1e-2} | settings))
        trl.run(StageContext(stage, inputs, folder / name, Worker(rank, 2, CPU)))
        held.setdefault(f"threads {rank}", torch.get_num_threads())  # after the first one
        dist.barrier()
        torch.set_num_threads(1)
    model = load_base(inputs["model"], dtype=torch.float32, device=CPU, shards=2)
    stop = range(400) if rank == 0 else ()  # rank 0's first token is its last
    held[f"completed {rank}"] = generate(model, [[5, 6]], pad=3, stop=[*stop], max_new_tokens=5)
    held[f"durable {rank}"] = is_durable_after(model, folder / "slow", rank)
    for name in MEASURED:
        worker = Worker(rank, 2, CPU)
        measure(folder / f"{name}, measured", folder / name, inputs, worker, "fsdp")
    stop = StopAtCheck(3) if rank == 1 else never_stop  # while it generates
    try:
        measure(folder / "x", folder / name, inputs, Worker(rank, 2, CPU, stop=stop), "fsdp")
    except Interrupted:
        held[f"stopped {rank}"] = True
    grown = train_stage(**LAST, learning_rate=1e-2, runtime={"sharding": "fsdp"})
    trl.run(StageContext(grown, inputs, folder / "grown", Worker(rank, 2, CPU)))
    dist.barrier()
    stopper = StopAfter(2)
    with contextlib.suppress(Interrupted):
        stage = train_stage(**LAST, learning_rate=1e-2, runtime={"sharding": "fsdp"})
        worker = Worker(rank, 2, CPU, report=stopper.report)
        worker = replace(worker, stop=stopper if rank == 1 else never_stop)
        (folder / "stopped").mkdir(exist_ok=True)
        trl.run(StageContext(stage, inputs, folder / "stopped", worker))
    dist.barrier()
    held[f"types {rank}"] = types_in_bfloat16(inputs["model"])


def is_durable_after(model: Any, folder: Path, rank: int) -> bool:
    """Save a checkpoint in a place that is slow; return whether it is durable afterwards."""
    durable = folder / "durable"

    def persist(_: Path) -> None:
        time.sleep(0.5)
        durable.touch()

    folder.mkdir(exist_ok=True)
    parameters = layers.trainable(model)
    context = StageContext(train_stage(), {}, folder, Worker(rank, 2, CPU, persist=persist))
    optimizer = torch.optim.AdamW(parameters.values())
    Checkpoints(context, LoopState, parameters, optimizer).save(LoopState(step=1))
    return durable.exists()


def types_in_bfloat16(folder: Path) -> set[tuple[str, torch.dtype]]:
    """Return the types of a layer's weights while a sharded model computes in bfloat16, and those
    of the weights and gradients that the workers keep."""
    model = load_base(folder, dtype=torch.float32, device=CPU, shards=2, computes=torch.bfloat16)
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    types = set()
    layer.register_forward_hook(lambda module, *_: types.add(("gathered", module.weight.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss
    loss.backward()
    for parameter in model.parameters():
        types |= {("kept", parameter.dtype)}
        if parameter.grad is not None:
            types.add(("gradient", parameter.grad.dtype))
    return types


@pytest.fixture(scope="module")
def by_two(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_tokenizer: Any
) -> tuple[Path, dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("together")
    write_prepared(folder / "data", tiny_tokenizer, ROWS, HELD_OUT)
    inputs = {"model": tiny_model_dir, "data": folder / "data"}
    with pytest.raises(Interrupted):
        run(trl, folder / "grown", inputs, StopAfter(2).worker(), learning_rate=1e-2)
    return folder, spawn(2, _worker, folder, inputs)


@pytest.mark.parametrize("case", CASES)
def test_two_workers_sharded_or_not_reach_the_weights_of_one(
    case: str,
    by_two: tuple[Path, dict[Any, Any]],
    tmp_path: Path,
    inputs: dict[str, Path],
) -> None:
    settings = {name: value for name, value in CASES[case].items() if name != "runtime"}
    one, _ = run(trl, tmp_path / "one", inputs, learning_rate=1e-2, **settings)
    two = load_file(next((by_two[0] / case / "weights").glob("*.safetensors")))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0)


def test_a_sharded_run_that_one_worker_was_asked_to_stop_goes_on_with_a_whole_model(
    by_two: tuple[Path, dict[Any, Any]], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    one, _ = run(trl, tmp_path / "one", inputs, learning_rate=1e-2)
    resumed, outcome = run(trl, by_two[0] / "stopped", inputs, learning_rate=1e-2)
    assert outcome.details["resumedAtStep"] == 3
    for name, tensor in one.items():
        torch.testing.assert_close(resumed[name], tensor, atol=2e-4, rtol=0)


def test_two_workers_that_share_the_model_go_on_from_the_checkpoint_of_one(
    by_two: tuple[Path, dict[Any, Any]], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    one, _ = run(trl, tmp_path / "one", inputs, learning_rate=1e-2)
    grown = load_file(by_two[0] / "grown" / "weights" / "model.safetensors")
    steps = [line["step"] for line in lines(by_two[0] / "grown") if "loss" in line]
    assert steps == [*range(1, len(steps) + 1)]
    for name, tensor in one.items():
        torch.testing.assert_close(grown[name], tensor, atol=2e-4, rtol=0)


@pytest.mark.parametrize("case", MEASURED)
def test_the_evaluation_of_a_sharded_model_measures_what_one_worker_measures(
    case: str,
    by_two: tuple[Path, dict[Any, Any]],
    tmp_path: Path,
    inputs: dict[str, Path],
) -> None:
    alone = Worker(0, 1, CPU)
    one = measure(tmp_path / "one", by_two[0] / case, inputs, alone, "none")
    assert {"validationLoss", "baseValidationLoss"} <= one.keys()
    files = [by_two[0] / f"{case}, measured", tmp_path / "one"]
    two, expected = (json.loads((file / "evaluation.json").read_text()) for file in files)
    assert two["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-6)
    assert two["samples"] == expected["samples"]


def test_sharded_workers_gather_bfloat16_and_keep_float32(
    by_two: tuple[Path, dict[Any, Any]],
) -> None:
    expected = {
        ("gathered", torch.bfloat16),
        ("kept", torch.float32),
        ("gradient", torch.float32),
    }
    assert by_two[1]["types 0"] == by_two[1]["types 1"] == expected


def test_an_evaluation_frees_the_tuned_model_before_it_loads_the_base(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def loaded(*given: Any, **named: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        model = load_base(*given, **named)
        models.append(weakref.ref(model))
        return model

    run(native, tmp_path / "full", inputs)
    monkeypatch.setattr(policies, "load_base", loaded)
    measure(tmp_path / "measured", tmp_path / "full", inputs, Worker(0, 1, CPU), "none")
    assert alive == [0, 0]


def test_a_request_to_stop_one_worker_ends_a_sharded_evaluation_on_all(
    by_two: tuple[Path, dict[Any, Any]],
) -> None:
    assert {"stopped 0", "stopped 1"} <= by_two[1].keys()


def test_what_one_worker_holds_whole_ends_the_job_on_all(
    by_two: tuple[Path, dict[Any, Any]],
) -> None:
    assert "another worker holds more than its part" in by_two[1]["refused 0"]
    assert "not sharded over 2 workers: whole" in by_two[1]["refused 1"]


def test_a_worker_whose_completion_has_ended_takes_part_in_those_of_the_others(
    by_two: tuple[Path, dict[Any, Any]],
) -> None:
    (ended,), (others,) = by_two[1]["completed 0"], by_two[1]["completed 1"]
    assert (len(ended), len(others)) == (1, 5)
    assert others[:1] == ended


def test_a_trainer_leaves_the_number_of_threads_as_it_is(
    by_two: tuple[Path, dict[Any, Any]],
) -> None:
    assert [by_two[1][f"threads {rank}"] for rank in (0, 1)] == [3, 3]


def test_without_a_second_worker_a_job_that_asks_for_sharding_ends(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError) as ended:
        run(trl, tmp_path / "trl", inputs, runtime={"sharding": "fsdp"})
    assert ended.value.reason == "NotSharded"
    assert "compute.workers" in ended.value.advice


def test_auto_keeps_a_model_whole_on_a_cpu(tmp_path: Path, inputs: dict[str, Path]) -> None:
    _, outcome = run(trl, tmp_path / "trl", inputs, runtime={"sharding": "auto"})
    assert outcome.details["sharding"] == "none"


def test_no_worker_goes_on_before_the_checkpoint_of_a_shared_model_is_durable(
    by_two: tuple[Path, dict[Any, Any]],
) -> None:
    """It would wait in the next step, which has a short timeout."""
    assert [by_two[1][f"durable {rank}"] for rank in (0, 1)] == [True, True]


def test_auto_shards_what_takes_more_than_half_of_a_gpu(tiny_model_dir: Path) -> None:
    (file,) = tiny_model_dir.glob("*.safetensors")
    parameters = sum(tensor.numel() for tensor in load_file(file).values())
    for each in (2, 16):
        assert not policies.exceeds_share(tiny_model_dir, each, 2 * each * parameters)
        assert policies.exceeds_share(tiny_model_dir, each, 2 * each * parameters - 1)


def test_the_files_of_a_sharded_model_are_those_of_a_whole_one(
    by_two: tuple[Path, dict[Any, Any]], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    run(trl, tmp_path / "one", inputs, learning_rate=1e-2)
    for name in ("config.json", "generation_config.json"):
        sharded = json.loads((by_two[0] / "full, sharded" / "weights" / name).read_text())
        assert sharded == json.loads((tmp_path / "one" / "weights" / name).read_text())


def test_each_worker_of_a_sharded_model_holds_half_of_its_bytes(
    by_two: tuple[Path, dict[Any, Any]],
) -> None:
    for held, total in (by_two[1][rank] for rank in (0, 1)):
        assert held / total == pytest.approx(0.5, abs=0.01)
