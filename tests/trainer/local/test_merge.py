"""`tuneyard merge` writes a model that loads, or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tuneyard.cli import main
from tuneyard_trainer.models import base
from tuneyard_trainer.models.files import SINGLE


@pytest.fixture
def models(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    """The folders of a base and of two models that differ from it."""
    folders = [tmp_path / name for name in ("base", "one", "two")]
    for number, folder in enumerate(folders):
        shutil.copytree(tiny_model_dir, folder)
        tensors = load_file(folder / SINGLE)
        changed = {name: tensor + 0.01 * number for name, tensor in tensors.items()}
        save_file(changed, folder / SINGLE, {"format": "pt"})
    return list(map(str, folders))


def test_the_merged_model_loads_and_names_what_it_was_made_from(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, one, two = models
    options = ["--base", start, "--method", "taskArithmetic", "--weight", "0.5", "--weight", "2"]
    assert main.call(["merge", one, two, *options, "-o", str(tmp_path / "merged")]) == 0
    assert "2 models merged by taskArithmetic" in capsys.readouterr().out
    found, expected = load_file(tmp_path / "merged" / SINGLE), load_file(Path(start) / SINGLE)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor + 0.5 * 0.01 + 2 * 0.02, atol=1e-6)
    base.load_base(tmp_path / "merged", dtype=torch.float32, device=torch.device("cpu"))
    base.load_tokenizer(tmp_path / "merged")
    record = yaml.safe_load((tmp_path / "merged/merge.yaml").read_text())
    assert [each["uri"] for each in record["models"]] == [one, two]
    assert [each["weight"] for each in record["models"]] == [0.5, 2.0]
    assert record["base"]["digest"].startswith("sha256:")
    assert record["recipe"]["method"] == "taskArithmetic"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{one}", "{nowhere}"], 1, "there is no model at"),
        (["{one}", "--method", "slerp"], 1, "slerp merges two models, and there are 1"),
        (["{one}", "{two}", "--weight", "1"], 2, "--weight is given 1 times for 2 models"),
        (["{one}", "--density", "0.5"], 2, "--method is linear"),
        (["{one}", "{two}", "--weight", "1", "--weight", "-1"], 1, "add up to 0"),
    ],
)
def test_a_merge_that_cannot_be_made_leaves_no_folder(
    models: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    start, one, two = models
    places = {"one": one, "two": two, "nowhere": str(tmp_path / "nowhere")}
    given = [argument.format(**places) for argument in arguments]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main.call(["merge", *given, "--base", start, "-o", str(tmp_path / "merged")]) == code
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_exists_stays_as_it_is(
    models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start, one, two = models
    before = sorted(Path(two).iterdir())
    assert main.call(["merge", one, "--base", start, "-o", two]) == 2
    assert "exists: name a new folder" in capsys.readouterr().err
    assert sorted(Path(two).iterdir()) == before
