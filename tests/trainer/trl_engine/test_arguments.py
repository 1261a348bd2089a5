"""The arguments of TRL's config: the platform's, and those of a job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.rows import random_rows, write_prepared
from tests.trainer.trl_engine.test_sft import lines, run
from tuneyard.errors import StageError
from tuneyard_trainer.trl_engine import arguments, sft
from tuneyard_trainer.worker import Interrupted

ROOT = Path(__file__).parents[3]


@pytest.fixture
def inputs(tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: Any) -> dict[str, Path]:
    write_prepared(tmp_path / "data", tiny_tokenizer, random_rows(6))
    return {"model": tiny_model_dir, "data": tmp_path / "data"}


def test_the_planner_knows_the_fields_of_the_installed_trl() -> None:
    command = [sys.executable, "scripts/trl_fields.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_argument_of_the_job_reaches_the_trainer(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    run(sft, tmp_path / "plain", inputs)
    run(sft, tmp_path / "noise", inputs, trl={"neftune_noise_alpha": 500})
    plain, noise = (lines(tmp_path / name)[0]["loss"] for name in ("plain", "noise"))
    assert abs(noise - plain) > 0.01


def process_settings() -> tuple[Any, ...]:
    named = {name: os.environ.get(name) for name in arguments.DETERMINISM}
    precision = torch.backends.fp32_precision
    return torch.are_deterministic_algorithms_enabled(), precision, named


def test_an_argument_does_not_change_the_stages_after_it(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in the same process, and need not have deterministic algorithms for all they do."""
    during: list[tuple[Any, ...]] = []

    class Watching(sft.Following):
        def on_step_begin(self, *args: Any, **others: Any) -> Any:
            during.append(process_settings())
            torch.backends.fp32_precision = "tf32"  # what the argument tf32 sets, without a GPU
            return super().on_step_begin(*args, **others)

    monkeypatch.setattr(sft, "Following", Watching)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = process_settings()
    run(sft, tmp_path / "trl", inputs, trl={"full_determinism": True})
    assert during[0][0] is True
    assert during[0][2]["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert process_settings() == before


@pytest.mark.parametrize(
    ("given", "runtime"),
    [
        ({"torch_compile_mode": "nonsense"}, {}),
        ({"neftune_noise_alpha": -1.0}, {}),  # fails in the first step
        ({"activation_checkpointing_kwargs": {"nonsense": 1}}, {"gradientCheckpointing": True}),
    ],
)
def test_an_argument_that_trl_refuses_ends_the_job_with_its_field(
    given: dict[str, Any], runtime: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError) as ended:
        run(sft, tmp_path / "trl", inputs, trl=given, runtime=runtime)
    assert ended.value.reason == "TrlRefused"
    assert "training.trl" in ended.value.advice
    assert next(iter(given)) in ended.value.message


@pytest.mark.parametrize(
    "error",
    [
        StageError("LossNotFinite", "the loss became nan."),
        Interrupted("sft", 1),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
        OSError("no space left on device"),
    ],
)
def test_an_error_with_another_cause_stays_what_it_is(
    error: Exception, tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sft, "trainer", broken)
    with pytest.raises(type(error)) as ended:
        run(sft, tmp_path / "trl", inputs, trl={"torch_compile": True})
    assert ended.value is error


def test_an_error_after_a_step_is_not_one_of_the_arguments(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(sft.Following):
        def on_step_begin(self, *args: Any, **others: Any) -> Any:
            if self.state.step == 1:
                raise RuntimeError("a defect")
            return super().on_step_begin(*args, **others)

    monkeypatch.setattr(sft, "Following", Failing)
    with pytest.raises(RuntimeError, match="a defect"):
        run(sft, tmp_path / "trl", inputs, trl={"neftune_noise_alpha": 5})


def test_an_error_without_arguments_of_the_job_keeps_its_type(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(sft, "SFTConfig", broken)
    with pytest.raises(ValueError, match="a defect"):
        run(sft, tmp_path / "trl", inputs)
