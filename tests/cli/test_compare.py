"""`tuneyard compare`: its output, its faults and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.golden.compare import assert_golden
from tests.trainer.comparison.outputs import write_output
from tests.trainer.finished import MANIFEST
from tuneyard.cli import main

LOSSES = np.random.default_rng(1).gamma(4, 0.5, 40)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def jobs(tmp_path: Path) -> list[str]:
    """Return the outputs of three jobs: the second is better, and took longer."""
    low, high, full = tmp_path / "low", tmp_path / "high", tmp_path / "full"
    write_output(
        low, "low-rate", losses=[*LOSSES], right=[0.0, 1.0] * 20, training={"trainingSeconds": 60.0}
    )
    noise = np.random.default_rng(2).normal(0, 0.05, 40)
    write_output(
        high,
        "high-rate",
        losses=[*(LOSSES - 0.2 + noise)],
        right=[1.0] * 36 + [0.0] * 4,
        spec={"training": {"learningRate": 0.002}},
        training={"trainingSeconds": 108.0},
    )
    write_output(
        full,
        "full",
        losses=[*(LOSSES + 0.1 - noise)],
        base="sha256:other",
        spec={"adapter": None},
        training={"peakMemoryBytes": 6.0 * 2**30},
    )
    return [str(low), str(high), str(full)]  # fmt: skip


def test_the_output_of_a_comparison_is_frozen(
    jobs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(["compare", *jobs[:2]]) == 0
    assert_golden("compare/two.txt", capsys.readouterr().out)
    assert main.call(["compare", *jobs]) == 0
    assert_golden("compare/three.txt", capsys.readouterr().out)


def test_json_is_a_document_of_a_version(
    jobs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(["compare", "--json", *jobs]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["version"]) == ("Comparison", 1)
    assert [job["name"] for job in found["jobs"]] == ["low-rate", "high-rate", "full"]
    loss = found["metrics"][0]
    assert loss["metric"] == "validationLoss"
    assert len(loss["values"]) == len(loss["intervals"]) == 3
    assert loss["best"] == 1
    assert [(each["first"], each["second"]) for each in loss["differences"]] == [
        (0, 1),
        (0, 2),
        (1, 2),
    ]


def test_a_manifest_stands_for_its_jobs(
    jobs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def document(name: str, output: str) -> dict[str, object]:
        spec = {**MANIFEST["spec"], "output": {"uri": output}}
        del spec["adapter"]
        return {**MANIFEST, "metadata": {"name": name}, "spec": spec}

    manifest = tmp_path / "sweep.yaml"
    both = [document("low-rate", "file://low"), document("high-rate", "file://high")]
    manifest.write_text(yaml.safe_dump_all(both))
    assert main.call(["compare", "--json", str(manifest)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [job["name"] for job in found["jobs"]] == ["low-rate", "high-rate"]
    both[1]["spec"] = {**both[1]["spec"], "output": {"uri": "pvc://models/high"}}
    manifest.write_text(yaml.safe_dump_all(both))
    assert main.call(["compare", str(manifest), jobs[1]]) == 2
    assert "pvc://models/high, exists on a cluster only: copy" in capsys.readouterr().err


def test_all_faults_are_printed_and_nothing_else(
    jobs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("kind: [")
    bad = [str(tmp_path / "empty"), "missing.yaml", str(tmp_path / "bad.yaml"), "Not_A_Name"]
    assert main.call(["compare", jobs[0], jobs[0], *bad]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in (
        "missing.yaml: there is no manifest and no folder of this name",
        "bad.yaml:1",
        "Not_A_Name",
        f"{jobs[0]}: is the same output as {jobs[0]}",
        "empty: is not the output of a job",
    ):
        assert text in captured.err
    assert "Traceback" not in captured.err
    assert main.call(["compare", jobs[0]]) == 2
    assert "name at least two jobs" in capsys.readouterr().err
