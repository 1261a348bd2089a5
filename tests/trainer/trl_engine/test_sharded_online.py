"""GRPO and RLOO on a model that two workers share."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.several_workers import Notes, spawn
from tests.trainer.speaking import share_of, write_prompts
from tests.trainer.stop_after import StopAfter
from tests.trainer.trl_engine.test_online import LORA, by_trl, stage, updates
from tuneyard.api.plan import PlannedStage, TrainRuntime
from tuneyard_trainer.models import sharding
from tuneyard_trainer.models.policies import Reference
from tuneyard_trainer.reinforcement import rewards
from tuneyard_trainer.worker import Interrupted, StageContext, Worker, never_stop

CPU = torch.device("cpu")
CASES: dict[str, tuple[str, Any]] = {
    "grpo, full": ("grpo", None),
    "rloo, lora": ("rloo", LORA),
}
STOPPED = "grpo, full"


def stage_of(case: str, shared: str) -> PlannedStage:
    """Return a stage with a KL. Its second update is measured, and its micro-batches are small."""
    estimator, adapter = CASES[case]
    training = {"max_steps": 3, "optimizer": {"epsilon": 1e-3}, "learning_rate": 2e-2}
    chosen = stage(estimator, {**training, "evaluation_steps": 2}, adapter=adapter)
    runtime = TrainRuntime(micro_batch_tokens=100, sharding=shared)
    return chosen.model_copy(update={"runtime": runtime})


def run(case: str, folder: Path, inputs: dict[str, Path], worker: Worker, shared: str) -> Any:
    folder.mkdir(exist_ok=True)
    chosen = stage_of(case, shared)
    return by_trl(chosen).run(StageContext(chosen, inputs, folder, worker))


def _worker(rank: int, notes: Notes, folder: Path, inputs: dict[str, Path]) -> None:
    rewards.load = lambda *_: share_of("a")
    worker, loaded, swap = Worker(rank, 2, CPU), sharding.require_sharded, Reference._swap

    def noted(model: Any, world_size: int) -> None:
        loaded(model, world_size)
        notes["held", rank] = sharding.local_bytes(model)

    def swapped(self: Any) -> None:
        swap(self)
        notes["swaps", rank] = notes.get(("swaps", rank), 0) + 1

    sharding.require_sharded, Reference._swap = noted, swapped  # type: ignore[method-assign]
    for case in CASES:
        run(case, folder / f"{case}, whole", inputs, worker, "none")
        assert ("held", rank) not in notes
        outcome = run(case, folder / case, inputs, worker, "fsdp")
        notes["held", case, rank] = notes.pop(("held", rank))
        notes["sharding", case, rank] = outcome.details["sharding"]
    stopper = StopAfter(1)
    asked = replace(worker, report=stopper.report, stop=stopper if rank else never_stop)
    with contextlib.suppress(Interrupted):
        run(STOPPED, folder / "stopped", inputs, asked, "fsdp")
    notes["stopped", rank] = (folder / "stopped" / "weights").exists()
    run(STOPPED, folder / "stopped", inputs, worker, "fsdp")


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, speaking_model_dir: Path
) -> tuple[Path, dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("two")
    inputs = {"model": speaking_model_dir, "prompts": write_prompts(folder / "prompts.jsonl")}
    return folder, spawn(2, _worker, folder, inputs)


def same(first: Path, second: Path) -> None:
    one, other = (
        load_file(next((folder / "weights").glob("*.safetensors"))) for folder in (first, second)
    )
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("case", CASES)
def test_workers_that_share_the_policy_make_the_updates_of_workers_with_whole_ones(
    case: str, two: tuple[Path, dict[Any, Any]]
) -> None:
    folder = two[0]
    same(folder / f"{case}, whole", folder / case)
    whole, shared = updates(folder / f"{case}, whole"), updates(folder / case)
    assert len(whole) == 3
    for one, other in zip(whole, shared, strict=True):
        assert one.keys() == other.keys()
        for name in ("reward", "kl", "loss", "gradientNorm", "entropy", "completionLength"):
            assert other[name] == pytest.approx(one[name], rel=5e-3, abs=1e-4), name
    assert shared[-1]["kl"] != pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_worker_holds_half_of_the_policy(
    rank: int, case: str, two: tuple[Path, dict[Any, Any]]
) -> None:
    held, total = two[1]["held", case, rank]
    assert 0.45 < held / total < 0.55
    assert two[1]["sharding", case, rank] == "fsdp"


def test_a_request_to_stop_one_worker_ends_both_and_the_run_goes_on_with_its_reference(
    two: tuple[Path, dict[Any, Any]],
) -> None:
    assert [two[1]["stopped", rank] for rank in (0, 1)] == [False, False]
    same(two[0] / STOPPED, two[0] / "stopped")
