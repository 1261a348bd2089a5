"""`tuneyard gate`: verdicts from an output, a manifest or a status, as an exit code for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tests.cli.cluster_jobs import PLANNED, item
from tuneyard.api.evaluation import Gate
from tuneyard.api.gates import GateResult, Verdict
from tuneyard.cli import gates, main
from tuneyard.cli.jobs import KINDS, read_job

LOSS = {"metric": "lossReduction", "atLeast": 0.3}
ANSWERS = {"metric": "answerAccuracy", "notWorseThanBaseBy": 0.05}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("NO_COLOR", "1")


def result(gate: dict[str, Any], verdict: Verdict, **evidence: float) -> dict[str, Any]:
    found = GateResult.of(Gate.model_validate(gate), verdict, **evidence)
    return found.model_dump(mode="json", by_alias=True)


def record(stage: str, digest: str, **inputs: str) -> str:
    value = {
        "stage": stage,
        "kind": stage,
        "identity": "sha256:0",
        "inputDigests": inputs,
        "digest": digest,
        "attempt": 1,
        "startedAt": "2026-01-01T00:00:00Z",
        "finishedAt": "2026-01-01T00:00:01Z",
    }
    return json.dumps(value)


def write_output(folder: Path, results: list[dict[str, Any]], *, failed: bool = False) -> Path:
    """Write an output whose evaluation has these verdicts; `failed`: so it has no record."""
    for stage in ("prepare", "sft", "evaluate"):
        (folder / "stages" / stage).mkdir(parents=True)
    (folder / "stages/prepare/record.json").write_text(record("prepare", "sha256:rows"))
    (folder / "stages/sft/record.json").write_text(record("sft", "sha256:weights"))
    evaluate = folder / "stages/evaluate"
    (evaluate / "evaluation.json").write_text(json.dumps({"metrics": {}, "gates": results}))
    if failed:
        (folder / "stages/evaluate.begun.json").write_text("{}")
    else:
        inputs = {"tuned": "sha256:weights", "data": "sha256:rows", "model": "sha256:base"}
        (evaluate / "record.json").write_text(record("evaluate", "sha256:found", **inputs))
    return folder


def write_manifest(path: Path, *wanted: dict[str, Any], output: str = "file://out") -> Path:
    value = {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "support-bot"},
        "spec": {
            "model": {"uri": "hf://org/model"},
            "data": {"train": [{"uri": "file://t.jsonl"}], "validation": {"fraction": 0.1}},
            "evaluate": {"gates": list(wanted)},
            "output": {"uri": output},
        },
    }
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([("pass", "required")], 0),
        ([("pass", "required"), ("breach", "advisory"), ("missing", "advisory")], 0),
        ([("pass", "required"), ("breach", "required")], 1),
        ([("missing", "required")], 1),
        ([("pass", "required"), ("insufficientEvidence", "required")], 2),
        ([("insufficientEvidence", "required"), ("breach", "required")], 1),
    ],
)
def test_the_exit_code_is_the_worst_verdict_of_the_required_gates(
    verdicts: list[tuple[Verdict, str]], code: int, tmp_path: Path
) -> None:
    results = [result({**LOSS, "tier": tier}, verdict) for verdict, tier in verdicts]
    failed = code != 0
    assert main.call(["gate", str(write_output(tmp_path / "out", results, failed=failed))]) == code


def test_the_table_shows_verdicts_with_evidence_and_remedies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        result(LOSS, "pass", value=0.41234, low=0.38, high=0.44, items=200),
        result(
            ANSWERS, "insufficientEvidence",
            value=0.8, base=0.85, worse_by=0.05, low=-0.02, high=0.12, items=20,
        ),
        result({**LOSS, "metric": "validationLoss", "tier": "advisory"}, "missing"),
    ]  # fmt: skip
    assert main.call(["gate", str(write_output(tmp_path / "out", found, failed=True))]) == 2
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert lines[1][:4] == ["lossReduction", "pass", "0.4123", "0.38"]
    assert "0.8, base 0.85" in shown
    assert "worse by -0.02 to 0.12" in shown
    assert "not worse than the base by more than 0.05" in shown
    assert "missing (advisory)" in shown
    assert "Hold out more rows" in shown
    assert main.call(["gate", "--json", str(tmp_path / "out")]) == 2
    (printed,) = json.loads(capsys.readouterr().out)
    assert [gate["verdict"] for gate in printed["gates"]] == [
        "pass",
        "insufficientEvidence",
        "missing",
    ]


def test_a_manifest_names_the_output_beside_it(tmp_path: Path) -> None:
    write_output(tmp_path / "out", [result(LOSS, "pass"), result(ANSWERS, "pass")])
    assert main.call(["gate", str(write_manifest(tmp_path / "job.yaml", LOSS, ANSWERS))]) == 0


def test_an_output_in_an_object_store_is_read_like_a_folder(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    out = write_output(tmp_path / "out", [result(LOSS, "breach")], failed=True)
    store = fsspec.filesystem("memory")
    store.put(str(out), "/team/out", recursive=True)
    manifest = write_manifest(tmp_path / "job.yaml", LOSS, output="memory://team/out")
    found = gates.of_output("memory://team/out")
    assert [each.verdict for each in found.results] == ["breach"]
    store.pipe_file("/team/out/stages/sft.begun.json", b"{}")
    with pytest.raises(click.ClickException, match="changed after the evaluation"):
        gates.of_output("memory://team/out")
    with pytest.raises(click.ClickException, match="cannot be read"):
        gates.of_output("nosuchscheme://team/out")
    assert main.call(["gate", str(manifest)]) == 3


@pytest.mark.parametrize("wanted", [[LOSS], [{**LOSS, "atLeast": 0.5}, ANSWERS]])
def test_verdicts_on_other_gates_than_the_manifests_are_refused(
    wanted: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_output(tmp_path / "out", [result(LOSS, "pass"), result(ANSWERS, "pass")])
    assert main.call(["gate", str(write_manifest(tmp_path / "job.yaml", *wanted))]) == 3
    assert "has changed since its evaluation: run the job again" in capsys.readouterr().err


def test_verdicts_on_a_model_that_has_changed_since_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_output(tmp_path / "out", [result(LOSS, "pass")])
    begun = out / "stages/sft.begun.json"
    begun.write_text("{}")
    assert main.call(["gate", str(out)]) == 3
    assert "sft in" in capsys.readouterr().err
    begun.unlink()
    (out / "stages/sft/record.json").write_text(record("sft", "sha256:others"))
    assert main.call(["gate", str(out)]) == 3
    assert "changed after the evaluation" in capsys.readouterr().err
    (out / "stages/sft/record.json").write_text(record("sft", "sha256:weights"))
    (out / "stages/export.begun.json").write_text("{}")
    assert main.call(["gate", str(out)]) == 0, "an export that is not done changes no verdict"


def test_verdicts_on_the_output_of_another_stage_than_the_manifests_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a step was added that trains the model further: the earlier one is still there."""
    out = write_output(tmp_path / "out", [result(LOSS, "pass")])
    manifest = write_manifest(tmp_path / "job.yaml", LOSS)
    assert main.call(["gate", str(manifest)]) == 0
    (out / "stages/earlier").mkdir()
    (out / "stages/earlier/record.json").write_text(record("sft", "sha256:weights"))
    (out / "stages/sft/record.json").write_text(record("sft", "sha256:others"))
    assert main.call(["gate", str(out)]) == 0, "the folder alone does not say which is the model"
    capsys.readouterr()
    assert main.call(["gate", str(manifest)]) == 3
    assert "tuned in" in capsys.readouterr().err


def test_verdicts_that_missed_a_gate_are_refused_too_once_the_model_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such an evaluation has no record; a run that trained again may have ended before the next."""
    out = write_output(tmp_path / "out", [result(LOSS, "breach")], failed=True)
    evaluation = out / "stages/evaluate/evaluation.json"
    value = json.loads(evaluation.read_text())
    assert main.call(["gate", str(out)]) == 1, "an earlier version named no inputs"
    digests = {"tuned": "sha256:weights", "data": "sha256:rows", "model": "sha256:base"}
    evaluation.write_text(json.dumps({**value, "inputDigests": digests}))
    assert main.call(["gate", str(out)]) == 1
    (out / "stages/sft/record.json").write_text(record("sft", "sha256:others"))
    capsys.readouterr()
    assert main.call(["gate", str(out)]) == 3
    assert "tuned in" in capsys.readouterr().err


def test_verdicts_on_a_reward_model_or_pairs_that_have_changed_since_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that trains a reward model alone has no tuned model."""
    out = write_output(tmp_path / "out", [result(LOSS, "pass")])
    inputs = {"model": "sha256:base", "pairs": "sha256:rows", "reward": "sha256:weights"}
    evaluated = out / "stages/evaluate/record.json"
    evaluated.write_text(record("evaluate", "sha256:found", **inputs))
    assert main.call(["gate", str(out)]) == 0
    for stage, digest, role in (("sft", "weights", "reward"), ("prepare", "rows", "pairs")):
        trained = out / f"stages/{stage}/record.json"
        trained.write_text(record(stage, "sha256:others"))
        assert main.call(["gate", str(out)]) == 3
        assert f"{role} in" in capsys.readouterr().err
        trained.write_text(record(stage, f"sha256:{digest}"))
    # A reward model that is optimized, and not trained here, is of no stage.
    inputs = {"tuned": "sha256:weights", "pairs": "sha256:rows", "reward": "sha256:of the hub"}
    evaluated.write_text(record("evaluate", "sha256:found", **inputs))
    assert main.call(["gate", str(out)]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no evaluation"),
        ('{"metrics": {}}', "has no verdicts"),
        ('{"metrics"', "is damaged"),
        ('{"gates": [{"metric": 1}]}', "cannot be read"),
    ],
)
def test_an_output_without_readable_verdicts_ends_with_3(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages/evaluate").mkdir(parents=True)
    if content is not None:
        (tmp_path / "stages/evaluate/evaluation.json").write_text(content)
    assert main.call(["gate", str(tmp_path)]) == 3
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["no/such/folder"], ["job.yml"], ["Not_A_Name"], [], ["a", "--no-such-option"]]
)
def test_bad_input_ends_with_3_as_2_means_too_little_evidence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(["gate", *arguments]) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_a_faulty_manifest_and_one_for_a_cluster_end_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_manifest(tmp_path / "job.yaml", {"metric": "wisdom", "atLeast": 1.0})
    assert main.call(["gate", str(path)]) == 3
    assert "not a metric" in capsys.readouterr().err
    assert main.call(["gate", str(write_manifest(path, LOSS, output="pvc://models/a"))]) == 3
    assert "tuneyard gate support-bot" in capsys.readouterr().err
    assert main.call(["gate", str(write_manifest(path))]) == 3
    assert "has no gates" in capsys.readouterr().err


def test_the_verdicts_of_a_job_in_the_cluster_are_those_of_its_status() -> None:
    stage = {"name": "evaluate", "kind": "evaluate", "state": "Failed"}
    missed = {
        **PLANNED,
        "phase": "Failed",
        "stages": [{**stage, "gates": [result(LOSS, "breach")]}],
    }
    kind = KINDS["finetune"]
    found = gates.of_job(read_job(kind, item("FineTuneJob", "support-bot", missed)))
    assert [each.verdict for each in found.results] == ["breach"]
    assert gates.exit_code([found]) == 1
    unmeasured = {**PLANNED, "phase": "Failed", "stages": [stage]}
    with pytest.raises(click.ClickException, match="no verdicts on gates, and its phase is Failed"):
        gates.of_job(read_job(kind, item("FineTuneJob", "support-bot", unmeasured)))
