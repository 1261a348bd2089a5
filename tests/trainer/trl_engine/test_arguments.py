"""The arguments of TRL's config: the platform's, and those of a job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.rows import random_rows, write_prepared
from tests.trainer.trl_engine.test_sft import lines, run
from tuneyard.errors import StageError
from tuneyard_trainer.trl_engine import sft

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
    run(sft, tmp_path / "nll", inputs)
    run(sft, tmp_path / "dft", inputs, trl={"loss_type": "dft"})
    nll, dft = (lines(tmp_path / name)[0]["loss"] for name in ("nll", "dft"))
    assert dft < nll / 10  # each token's loss is weighted with its probability


def test_an_argument_that_trl_refuses_ends_the_job_with_its_field(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    with pytest.raises(StageError) as ended:
        run(sft, tmp_path / "trl", inputs, trl={"loss_type": "nonsense"})
    assert ended.value.reason == "TrlRefused"
    assert "training.trl" in ended.value.advice
    assert "loss_type" in ended.value.message


def test_an_error_without_arguments_of_the_job_keeps_its_type(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(sft, "SFTConfig", broken)
    with pytest.raises(ValueError, match="a defect"):
        run(sft, tmp_path / "trl", inputs)
