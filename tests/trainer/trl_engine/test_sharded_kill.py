"""Workers that share a model: one is killed, and fewer of them go on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessExitedException

from tests.trainer.rows import random_rows, train_stage, write_prepared
from tests.trainer.several_workers import Notes, spawn
from tuneyard_trainer.trl_engine import sft
from tuneyard_trainer.worker import StageContext, Worker

CPU = torch.device("cpu")
KILLED_AT = 2
"""The checkpoint after which a worker is killed, before the next step is reported."""


def stage(sharding: str) -> Any:
    return train_stage(
        learning_rate=1e-2, runtime={"sharding": sharding, "checkpointSteps": 1}, keep_best=False
    )


def _worker(
    rank: int, notes: Notes, folder: Path, inputs: dict[str, Path], workers: int, killed: bool
) -> None:
    def is_asked_to_stop() -> bool:
        if killed and rank == 1 and (folder / "checkpoints" / f"step-{KILLED_AT:08d}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    worker = Worker(rank, workers, CPU, stop=is_asked_to_stop)
    outcome = sft.run(StageContext(stage("fsdp"), inputs, folder, worker))
    notes["resumed", rank] = outcome.details["resumedAtStep"]


@pytest.mark.slow  # seven processes load torch, and six of them train
def test_of_four_workers_one_is_killed_and_two_go_on_with_each_row_once(
    tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any
) -> None:
    write_prepared(tmp_path / "data", tiny_tokenizer, random_rows(10), random_rows(3, seed=9))
    inputs = {"model": tiny_model_dir, "data": tmp_path / "data"}
    for name in ("parts", "whole"):
        (tmp_path / name).mkdir()
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(4, _worker, tmp_path / "parts", inputs, 4, True)
    assert not (tmp_path / "parts" / "weights").exists()
    notes = spawn(2, _worker, tmp_path / "parts", inputs, 2, False)
    assert [notes["resumed", rank] for rank in (0, 1)] == [KILLED_AT] * 2

    sft.run(StageContext(stage("none"), inputs, tmp_path / "whole", Worker(0, 1, CPU)))
    parts, whole = (
        load_file(next((tmp_path / name / "weights").glob("*.safetensors")))
        for name in ("parts", "whole")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=2e-4, rtol=0)
    curves = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("parts", "whole")
    ]
    assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
    for one, other in zip(*curves, strict=True):
        for name in {"loss", "tokens", "validationLoss"} & other.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
