"""Two workers train on preferences to the same weights as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.trainer.preferring import CPU, loop_settings, planned, separable, write_pairs
from tests.trainer.several_workers import Notes, spawn
from tests.trainer.stop_after import StopAfter
from tuneyard.api.adapters import Adapter
from tuneyard.api.stage_settings import DpoSettings, RewardSettings
from tuneyard_trainer.preference import dpo, reward
from tuneyard_trainer.trl_engine import dpo as trl_dpo
from tuneyard_trainer.trl_engine import kto as trl_kto
from tuneyard_trainer.trl_engine import reward as trl_reward
from tuneyard_trainer.worker import Interrupted, StageContext, Worker

LOOP = loop_settings(max_steps=3, epochs=None, learning_rate=1e-3, batch_size=5)
LORA = Adapter.model_validate({"lora": {"rank": 4}})
STAGES = ("sigmoid", "sigmoid by trl", "kto", "kto by trl", "reward", "reward by trl")
RESUMED = ("kto by trl", "reward by trl")
"""Stages that one worker begins, and two go on with."""
ENGINES = {
    "sigmoid": dpo,
    "sigmoid by trl": trl_dpo,
    "kto": dpo,
    "kto by trl": trl_kto,
    "reward": reward,
    "reward by trl": trl_reward,
}


def run(kind: str, folder: Path, model: Path, worker: Worker) -> None:
    method = kind.removesuffix(" by trl")
    data = folder.parent / ("labeled" if method == "kto" else "pairs") / "pairs"
    inputs = {"model": model, "data": data}
    folder.mkdir(exist_ok=True)
    settings: RewardSettings | DpoSettings
    if method == "reward":
        settings = RewardSettings(adapter=LORA, margin=0.0, centering=0.01, training=LOOP)
    else:
        settings = DpoSettings(
            adapter=LORA,
            loss=method,  # type: ignore[arg-type]
            beta=0.1,
            label_smoothing=0.0,
            training=LOOP,
        )
    # Two pairs or four completions in a micro-batch: a worker's last one is not full.
    stage = planned(settings, micro_batch_tokens=70)
    ENGINES[kind].run(StageContext(stage, inputs, folder, worker))


def _worker(rank: int, notes: Notes, folder: Path, model: Path) -> None:
    for kind in STAGES:
        run(kind, folder / f"{kind}-by-two", model, Worker(rank, 2, CPU))
        dist.barrier()
    for kind in RESUMED:
        run(kind, folder / f"{kind}-by-more", model, Worker(rank, 2, CPU))
        dist.barrier()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("together")
    rows: list[dict[str, Any]] = separable(16)
    write_pairs(folder / "pairs", tiny_model_dir, rows)
    write_pairs(folder / "labeled", tiny_model_dir, rows, labeled=True)
    for kind in RESUMED:
        with pytest.raises(Interrupted):
            run(kind, folder / f"{kind}-by-more", tiny_model_dir, StopAfter(1).worker())
    spawn(2, _worker, folder, tiny_model_dir)
    for kind in STAGES:
        run(kind, folder / f"{kind}-by-one", tiny_model_dir, Worker(0, 1, CPU))
    return folder


@pytest.mark.parametrize("kind", STAGES)
def test_two_workers_reach_the_same_weights_as_one(finished: Path, kind: str) -> None:
    one, two = (
        load_file(next((finished / f"{kind}-by-{count}" / "weights").glob("*.safetensors")))
        for count in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", RESUMED)
def test_two_workers_go_on_where_one_has_stopped(finished: Path, kind: str) -> None:
    one, two = (
        load_file(next((finished / f"{kind}-by-{count}" / "weights").glob("*.safetensors")))
        for count in ("one", "more")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0)
    curves = [
        [json.loads(line) for line in (finished / f"{kind}-by-{count}" / "metrics.jsonl").open()]
        for count in ("one", "more")
    ]
    steps = [[(line["step"], line["tokens"]) for line in c if "loss" in line] for c in curves]
    assert steps[0] == steps[1]
    assert [step for step, _ in steps[0]] == [1, 2, 3]
