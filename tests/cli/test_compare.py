"""`tuneyard compare`: its output, its faults and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import numpy as np
import pytest
import yaml

from tests.cli.cluster_jobs import item
from tests.golden.compare import assert_golden
from tests.trainer.comparison.outputs import write_output
from tests.trainer.finished import MANIFEST
from tuneyard.cli import main
from tuneyard.cli.compare import place_in_cluster
from tuneyard.cli.jobs import KINDS, JobView, read_job

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


def test_many_jobs_are_rows_and_few_are_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        write_output(tmp_path / f"j{number}", f"job-{number}", losses=[*(LOSSES - 0.1 * number)],
                     spec={"training": {"seed": number % 2}})
        for number in range(6)
    ]  # fmt: skip
    assert main.call(["compare", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["Job", "validationLoss"]
    assert "  0: job-0, job-2, job-4\n  1: job-1, job-3, job-5" in shown
    assert re.search(r"^job-5 +best 1\.308$", shown, re.MULTILINE)


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
    for argument in (str(manifest), "pvc://models/high"):
        assert main.call(["compare", argument, jobs[1]]) == 2
        assert "pvc://models/high, exists on a cluster only: copy" in capsys.readouterr().err


def test_a_job_in_the_cluster_has_its_output_in_an_object_store_or_is_refused() -> None:
    def view(uri: str) -> JobView:
        return read_job(KINDS["finetune"], item("FineTuneJob", "a", {}, spec__output__uri=uri))

    assert place_in_cluster("a", view("s3://models/a")).uri == "s3://models/a"
    with pytest.raises(click.ClickException, match="pvc://models/a, exists on a cluster only"):
        place_in_cluster("a", view("pvc://models/a"))


@pytest.mark.parametrize("name", ["job.yaml", "no/such/folder/page.html"])
def test_a_page_needs_a_name_that_ends_in_html_and_a_folder(
    jobs: list[str], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / name
    assert main.call(["compare", *jobs, "-o", str(page)]) == 2
    assert str(page if page.parent.exists() else page.parent) in capsys.readouterr().err
    assert not page.exists()


def test_a_page_is_written_beside_the_output(
    jobs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "comparison.html"
    assert main.call(["compare", *jobs, "-o", str(page)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"wrote {page}")
    assert "Comparison of low-rate, high-rate, full" in page.read_text("utf-8")
    assert main.call(["compare", *jobs, "-o", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "Comparison"


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
