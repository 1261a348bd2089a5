"""Whole jobs on a tiny model: done once, then skipped, resumed after a kill, redone on a change."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.data.test_middle import CODER, documents
from tests.trainer.jobs import manifest, planned, write_data
from tests.trainer.several_workers import Notes, spawn
from tuneyard.api.plan import Plan
from tuneyard.errors import StageError
from tuneyard_trainer.evaluation.suites import harness
from tuneyard_trainer.evaluation.suites import parts as suite_parts
from tuneyard_trainer.running import torchrun
from tuneyard_trainer.running.runner import PlanRunner, StageInputs, emit_nothing
from tuneyard_trainer.storage.digests import digest_of
from tuneyard_trainer.storage.records import EARLIER_FILE, Store
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

RECORDING = Path(__file__).parents[1].joinpath("recording.py")
STOPPING = Path(__file__).parents[1].joinpath("stopping.py")


def walk(plan: Plan, folder: Path, output: str = "out") -> dict[str, str]:
    """Run the plan in this process and return how each stage ended."""
    states: dict[str, str] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "stage":
            states[event["stage"]] = event["state"]

    torchrun.run(plan, str(folder / output), base_dir=folder, cache_dir=folder / "cache", emit=emit)
    return states


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "owner.json"
    }


ALL_RUN = dict.fromkeys(("prepare", "sft", "evaluate", "export"), "Succeeded")
ALL_SKIPPED = dict.fromkeys(ALL_RUN, "Skipped")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with data and a finished job; tests that change anything copy it."""
    folder = tmp_path_factory.mktemp("finished")
    write_data(folder)
    assert walk(planned(manifest(tiny_model_dir)), folder) == ALL_RUN
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_second_run_does_nothing_and_touches_nothing(copy: Path, tiny_model_dir: Path) -> None:
    before = snapshot(copy / "out")
    assert walk(planned(manifest(tiny_model_dir)), copy) == ALL_SKIPPED
    assert snapshot(copy / "out") == before


def test_checkpoints_that_a_kill_left_beside_a_record_go_when_the_stage_is_skipped(
    copy: Path, tiny_model_dir: Path
) -> None:
    left = copy / "out/stages/sft/checkpoints/step-00000003"
    left.mkdir(parents=True)
    assert walk(planned(manifest(tiny_model_dir)), copy) == ALL_SKIPPED
    assert not left.parent.exists()


def test_a_moved_model_moved_data_and_a_moved_output_retrain_nothing(
    copy: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "moved-model")
    (copy / "train.jsonl").rename(copy / "renamed.jsonl")
    (copy / "out").rename(copy / "elsewhere")
    data = {
        "train": [{"uri": "file://renamed.jsonl"}],
        "validation": {"data": [{"uri": "file://validation.jsonl"}]},
    }
    moved = planned(manifest(tmp_path / "moved-model", output="elsewhere", data=data))
    assert walk(moved, copy, "elsewhere") == ALL_SKIPPED


def test_a_changed_row_redoes_everything(copy: Path, tiny_model_dir: Path) -> None:
    path = copy / "train.jsonl"
    path.write_text(path.read_text().replace("Lamp 3 is black", "Lamp 3 is ivory"))
    assert walk(planned(manifest(tiny_model_dir)), copy) == ALL_RUN


def test_changed_evaluation_settings_redo_evaluation_and_export_only(
    copy: Path, tiny_model_dir: Path
) -> None:
    changed = planned(manifest(tiny_model_dir, evaluate={"maxNewTokens": 5, "samples": 1}))
    assert walk(changed, copy) == ALL_RUN | {"prepare": "Skipped", "sft": "Skipped"}


def test_a_missed_gate_fails_for_good_and_exports_nothing(copy: Path, tiny_model_dir: Path) -> None:
    shutil.rmtree(copy / "out" / "result")
    gated = manifest(
        tiny_model_dir,
        evaluate={"maxNewTokens": 4, "gates": [{"metric": "lossReduction", "atLeast": 0.999}]},
    )
    with pytest.raises(StageError, match=r"lossReduction is .*, below 0\.999") as failure:
        walk(planned(gated), copy)
    assert failure.value.reason == "GateFailed"
    assert "the model is kept in stages/sft/weights" in failure.value.message
    assert (copy / "out/stages/sft/weights/adapter_model.safetensors").exists()
    assert not failure.value.retryable
    assert not (copy / "out" / "result").exists()
    assert not (copy / "out" / "stages" / "evaluate" / "record.json").exists()


def gated(model: Path, **gate: float) -> Plan:
    evaluate = {"maxNewTokens": 4, "gates": [{"metric": "lossReduction", **gate}]}
    return planned(manifest(model, evaluate=evaluate))


def test_the_model_of_an_earlier_run_is_kept_and_says_so_until_it_is_exported_again(
    copy: Path, tiny_model_dir: Path
) -> None:
    result = copy / "out" / "result"
    before = snapshot(result)
    with pytest.raises(StageError, match=r"below 0\.999") as failure:
        walk(gated(tiny_model_dir, atLeast=0.999), copy)
    assert "The folder result still holds the model of an earlier run" in failure.value.message
    note = (result / EARLIER_FILE).read_text()
    assert "A later run of the job has other settings or data" in note
    assert {name: before[name] for name in before} == {
        name: found for name, found in snapshot(result).items() if name != EARLIER_FILE
    }, "nothing of the earlier model is lost"
    # Back to what the model was exported with: the evaluation runs again with the same outcome.
    assert walk(planned(manifest(tiny_model_dir)), copy)["export"] == "Skipped"
    assert snapshot(result) == before
    walk(gated(tiny_model_dir, atLeast=-1000.0), copy)
    assert not (result / EARLIER_FILE).exists()


def test_a_suite_that_was_measured_is_not_measured_again_with_other_gates(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    rows = [{"good": "Ask the desk.", "bad": "Desk the ask."}] * 3
    (tmp_path / "sense.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = {"name": "sense", "choices": {"uri": "file://sense.jsonl"}}

    def plan(least: float) -> Plan:
        gates = [{"metric": "sense/accuracy", "atLeast": least}]
        evaluate = {"maxNewTokens": 4, "suites": [suite], "gates": gates}
        return planned(manifest(tiny_model_dir, evaluate=evaluate))

    assert walk(plan(0.0), tmp_path) == {**ALL_RUN, "leaks": "Succeeded"}
    store = Store(str(tmp_path / "out"), tmp_path)
    first = store.record("evaluate")
    monkeypatch.setattr(suite_parts.ChoiceSuite, "measure", pytest.fail)
    again = dict.fromkeys(("evaluate", "export"), "Succeeded")
    assert walk(plan(-0.5), tmp_path) == {**ALL_SKIPPED, "leaks": "Skipped", **again}
    second = store.record("evaluate")
    assert first
    assert second
    assert first.metrics == second.metrics


NAMED = {"name": "arc", "task": {"name": "lamp"}}
OF_A_FILE = {
    "name": "mine",
    "task": {"file": {"uri": "file://mine.yaml"}, "data": {"uri": "file://rows.jsonl"}},
}


class KnownTasks:
    all_tasks = ("lamps", "desks")


def refused(plan: Plan, folder: Path) -> StageError:
    """Return the failure of a plan, of which no stage may run."""
    with pytest.raises(StageError) as failure:
        walk(plan, folder)
    assert not [*folder.glob("out/stages/*/record.json")]
    return failure.value


def test_a_task_that_cannot_be_run_ends_a_job_before_its_first_stage(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "known_tasks", KnownTasks)
    write_data(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "Who?"}\n')

    def plan(suite: dict[str, Any], **data: Any) -> Plan:
        value = manifest(tiny_model_dir, evaluate={"suites": [suite]})
        value["spec"]["data"] |= data
        return planned(value)

    unknown = refused(plan(NAMED), tmp_path)
    assert unknown.reason == "UnknownTask"
    assert "spec.evaluate.suites[0].task.name: " in unknown.message
    assert "The nearest names: lamps" in unknown.message
    file = tmp_path / "mine.yaml"
    file.write_text("include: other.yaml\n")
    broken = refused(plan(OF_A_FILE, leaks="off"), tmp_path)
    assert broken.reason == "TaskFailed"
    assert broken.message.startswith("spec.evaluate.suites[0].task.file.uri: the task file cannot")
    file.write_text(
        "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: 0\n"
        "doc_to_choice: options\n"
    )
    misfit = refused(plan(OF_A_FILE), tmp_path)
    assert misfit.reason == "InvalidData"
    assert "spec.evaluate.suites[0].task.data.uri: 1 of 1 rows" in misfit.message


def test_tasks_are_not_looked_up_for_a_job_without_them(
    copy: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "known_tasks", pytest.fail)
    suites = [{"name": "sense", "choices": {"uri": "file://sense.jsonl"}}]
    (copy / "sense.jsonl").write_text('{"good": "A lamp is red.", "bad": "Red a is lamp."}\n')
    plan = planned(manifest(tiny_model_dir, evaluate={"maxNewTokens": 4, "suites": suites}))
    assert walk(plan, copy)["export"] == "Succeeded"


def test_a_missed_advisory_gate_is_exported_with_its_verdict(
    copy: Path, tiny_model_dir: Path
) -> None:
    gates = [
        {"metric": "lossReduction", "atLeast": 0.999, "tier": "advisory"},
        {"metric": "validationLoss", "atMost": 1000.0},
    ]
    gated = manifest(tiny_model_dir, evaluate={"maxNewTokens": 4, "samples": 0, "gates": gates})
    assert walk(planned(gated), copy)["export"] == "Succeeded"
    record = json.loads((copy / "out/stages/evaluate/record.json").read_text())
    verdicts = [gate["verdict"] for gate in record["details"]["gates"]]
    assert verdicts == ["breach", "pass"]
    assert "The advisory gate is not met" in (copy / "out/result/report.html").read_text()
    assert walk(planned(gated), copy) == ALL_SKIPPED


def test_the_answers_to_questions_are_evidence_that_the_record_counts(finished: Path) -> None:
    evaluation = json.loads((finished / "out/stages/evaluate/evaluation.json").read_text())
    assert len(evaluation["items"]["answerAccuracy"]["ids"]) == 4
    record = json.loads((finished / "out/stages/evaluate/record.json").read_text())
    found = record["details"]["evidence"]["answerAccuracy"]
    assert found["items"] == 4
    assert found["value"] == record["metrics"]["answerAccuracy"]
    assert found["base"] == record["metrics"]["baseAnswerAccuracy"]
    assert found["flips"]["gained"] - found["flips"]["lost"] == 4 * found["difference"]


def test_the_result_holds_what_a_user_loads_and_reads(finished: Path) -> None:
    result = finished / "out" / "result"
    names = {path.relative_to(result).as_posix() for path in result.rglob("*") if path.is_file()}
    assert {
        "README.md",
        "job.yaml",
        "loss.png",
        "report.html",
        "report.json",
        "record.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/chat_template.jinja",
        "model/generation_config.json",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    metrics = json.loads((result / "record.json").read_text())["metrics"]
    assert metrics["adapterTensors"] == 28
    assert metrics["modelTensors"] == 20
    assert metrics["mergedWeightDifference"] < 1e-5


def test_the_manifest_beside_the_result_holds_no_credentials(
    copy: Path, tiny_model_dir: Path
) -> None:
    plan = planned(manifest(tiny_model_dir))
    secret = {"model": {"uri": "https://me:hidden@host/model?signature=hidden"}}
    (copy / "out" / "result" / "record.json").unlink()
    walk(plan.model_copy(update={"manifest": plan.manifest | {"spec": secret}}), copy)
    text = (copy / "out" / "result" / "job.yaml").read_text()
    assert "uri: https://host/model" in text
    assert "hidden" not in text


# ---- kill -9 ------------------------------------------------------------------------------


def launch(folder: Path, plan: Plan, output: str, *, kill_after: int) -> int:
    (folder / "plan.json").write_text(plan.to_json())
    command = [sys.executable, RECORDING, folder / f"{output}.rows", str(kill_after)]
    command += ["--plan", folder / "plan.json", "--output", folder / output]
    command += ["--base-dir", folder, "--cache-dir", folder / "cache"]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stderr.decode())
    return done.returncode


def rows_by_step(folder: Path, output: str) -> dict[int, list[int]]:
    """Return the rows of each step of the last time that it was done."""
    lines = (folder / f"{output}.rows").read_text().splitlines()
    return {line["step"]: line["rows"] for line in map(json.loads, lines)}


def test_a_run_killed_during_sft_resumes_with_the_same_samples_and_ends_bit_for_bit_equal(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Nine steps, a checkpoint every two: killed in the sixth step, then three steps later."""
    write_data(tmp_path)
    plan = planned(manifest(tiny_model_dir))
    assert launch(tmp_path, plan, "whole", kill_after=0) == 0
    assert launch(tmp_path, plan, "killed", kill_after=5) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "stages" / "sft" / "record.json").exists()
    assert launch(tmp_path, plan, "killed", kill_after=3) == -signal.SIGKILL
    assert launch(tmp_path, plan, "killed", kill_after=0) == 0

    steps = rows_by_step(tmp_path, "killed")
    assert sorted(steps) == list(range(9))
    for epoch in range(3):
        seen = Counter(row for step in range(3 * epoch, 3 * epoch + 3) for row in steps[step])
        assert seen == Counter(range(10))
    assert steps == rows_by_step(tmp_path, "whole")

    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        whole, killed = (tmp_path / run / "result" / name for run in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()
    record = json.loads((tmp_path / "killed" / "stages" / "sft" / "record.json").read_text())
    assert record["details"]["resumedAtStep"] == 6
    redone = len((tmp_path / "killed.rows").read_text().splitlines()) - 9
    assert redone == 2  # what followed the last checkpoint, each time


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_a_killed_job_that_fills_in_the_middle_ends_as_if_undisturbed(
    engine: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Six steps, a checkpoint every two: killed in the fifth step. The documents keep their gaps,
    and each step its rows."""
    model = tmp_path / "coder"
    shutil.copytree(tiny_model_dir, model)
    CODER.save_pretrained(model)
    lines = [json.dumps(row) + "\n" for row in documents(14)]
    (tmp_path / "train.jsonl").write_text("".join(lines[:12]))
    (tmp_path / "validation.jsonl").write_text("".join(lines[12:]))
    data = {
        "train": [{"uri": "file://train.jsonl"}],
        "validation": {"data": [{"uri": "file://validation.jsonl"}]},
        "fillInTheMiddle": {"rate": 0.5},
        "leaks": "off",
    }
    training = {"epochs": 2, "batchSize": 4, "learningRate": 0.01, "checkpointSteps": 2}
    plan = planned(
        manifest(model, method="pretrain", data=data, training=training | {"engine": engine})
    )
    walk(plan, tmp_path, "whole")
    assert launch(tmp_path, plan, "killed", kill_after=4) == -signal.SIGKILL
    assert walk(plan, tmp_path, "killed")["prepare"] == "Skipped"

    def record(output: str, stage: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(
            (tmp_path / output / "stages" / stage / "record.json").read_text()
        )
        return value

    assert record("killed", "pretrain")["details"]["resumedAtStep"] == 4
    prepared = record("killed", "prepare")
    sequences = prepared["details"]["fillInTheMiddle"]["sequences"]
    assert sequences["changed"] > 0 < sequences["asItWas"]
    for stage in ("prepare", "pretrain", "evaluate"):
        assert record("killed", stage)["digest"] == record("whole", stage)["digest"], stage
    losses = [record(name, "evaluate")["metrics"] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    assert "validationLossOfGaps" in losses[0]


def test_the_checkpoint_of_a_run_with_other_settings_is_not_used(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """That checkpoint would make the new job skip steps and keep weights of another rate."""
    write_data(tmp_path)
    plan = planned(manifest(tiny_model_dir))
    assert launch(tmp_path, plan, "killed", kill_after=5) == -signal.SIGKILL
    training = {"epochs": 1, "batchSize": 4, "learningRate": 0.02, "checkpointSteps": 2}
    changed = planned(manifest(tiny_model_dir, training=training))
    assert walk(changed, tmp_path, "killed") == ALL_RUN | {"prepare": "Skipped"}
    record = json.loads((tmp_path / "killed" / "stages" / "sft" / "record.json").read_text())
    assert record["details"]["resumedAtStep"] is None
    assert record["metrics"]["steps"] == 3


@pytest.mark.parametrize(
    ("check", "step", "saved"),
    [("1", 0, []), ("2", 1, ["step-00000001"])],
    ids=["baseline", "step"],
)
def test_a_stop_request_to_one_rank_stops_all_and_no_rank_returns_before_the_checkpoint(
    tmp_path: Path, tiny_model_dir: Path, check: str, step: int, saved: list[str]
) -> None:
    """In the evaluation of the baseline, before which there is nothing to save, and in a step."""
    write_data(tmp_path)
    (tmp_path / "plan.json").write_text(planned(manifest(tiny_model_dir)).to_json())
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                STOPPING,
                str(rank),
                *(tmp_path / n for n in ("meet", "plan.json", "")),
                check,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        assert out, err
        assert json.loads(out.splitlines()[-1]) == {
            "stage": "sft",
            "step": step,
            "saved": saved,
        }


# ---- stages that all workers run ----------------------------------------------------------


def _measured_together(rank: int, notes: Notes, plan: str, folder: Path) -> None:
    from tuneyard_trainer.evaluation import evaluate
    from tuneyard_trainer.reporting import export

    def noted(name: str, run: Callable[..., StageOutcome]) -> Callable[..., StageOutcome]:
        def noting(context: StageContext) -> StageOutcome:
            notes[name, rank] = context.worker.stage
            return run(context)

        return noting

    evaluate.run, export.run = noted("evaluate", evaluate.run), noted("export", export.run)
    store = Store(str(folder / "out"), folder / f"scratch-{rank}")
    inputs = StageInputs(Plan.model_validate_json(plan), store, folder, folder / "cache")
    records = PlanRunner(inputs, Worker(rank, 2, torch.device("cpu")), emit_nothing).run()
    notes["metrics", rank] = records["evaluate"].metrics


def test_two_workers_evaluate_together_and_rank_0_exports_alone(
    copy: Path, tiny_model_dir: Path
) -> None:
    path = copy / "out" / "stages" / "evaluate" / "record.json"
    before = json.loads(path.read_text())
    path.unlink()
    notes = spawn(2, _measured_together, planned(manifest(tiny_model_dir)).to_json(), copy)
    assert notes["evaluate", 0] == notes["evaluate", 1] == "evaluate"
    assert ("export", 1) not in notes
    after = json.loads(path.read_text())
    for metrics in (after["metrics"], notes["metrics", 0], notes["metrics", 1]):
        assert metrics == pytest.approx(before["metrics"], rel=1e-5)
    assert after["details"] == before["details"]
    assert after["identity"] == before["identity"]


# ---- what decides a result ----------------------------------------------------------------


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A finished job of a model and a data set that are folders with a README each."""
    folder = tmp_path_factory.mktemp("documented")
    shutil.copytree(tiny_model_dir, folder / "model")
    write_data(folder)
    (folder / "rows").mkdir()
    (folder / "train.jsonl").rename(folder / "rows" / "train.jsonl")
    for name in ("model/README.md", "model/pytorch_model.bin", "rows/README.md"):
        (folder / name).write_text("first")
    assert walk(documented_plan(), folder) == ALL_RUN
    return folder


def documented_plan() -> Plan:
    data = {
        "train": [{"uri": "file://rows"}],
        "validation": {"data": [{"uri": "file://validation.jsonl"}]},
    }
    return planned(manifest(Path("model"), data=data))


def test_files_that_no_stage_reads_redo_nothing(documented: Path, tmp_path: Path) -> None:
    shutil.copytree(documented, tmp_path, dirs_exist_ok=True)
    for name in ("README.md", "LICENSE", "pytorch_model.bin", "logo.png", "onnx/model.json"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("edited upstream")
    (tmp_path / "rows" / "README.md").write_text("edited upstream")
    assert walk(documented_plan(), tmp_path) == ALL_SKIPPED


@pytest.mark.parametrize(
    "name",
    [
        "model/model.safetensors",
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/chat_template.jinja",
        "model/additional_chat_templates/tools.jinja",
        "rows/more.jsonl",
    ],
)
def test_a_changed_file_that_a_stage_reads_redoes_everything(
    documented: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(documented, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    with (tmp_path / name).open("a") as file:
        file.write("\n")
    plan = documented_plan()
    store = Store(str(tmp_path / "out"), tmp_path)
    pending = StageInputs(plan, store, tmp_path, tmp_path / "cache").pending()
    assert pending == [stage.name for stage in plan.stages]


def test_an_output_of_0_2_is_continued_and_0_2_continues_one_of_this_version(
    documented: Path, tmp_path: Path
) -> None:
    """0.2's digest of a folder covers each file, and it compares a file of begun work exactly."""
    shutil.copytree(documented, tmp_path, dirs_exist_ok=True)
    plan, stages = documented_plan(), tmp_path / "out" / "stages"
    every_file = digest_of(tmp_path / "model")
    identity = plan.stages[0].identity(
        {
            "model": every_file,
            "train.0": digest_of(tmp_path / "rows"),
            "validation.0": digest_of(tmp_path / "validation.jsonl"),
        }
    )
    record = json.loads((stages / "prepare" / "record.json").read_text())
    assert record["identity"] == identity
    (stages / "sources.json").unlink()
    assert walk(plan, tmp_path) == ALL_SKIPPED
    assert (stages / "sources.json").exists()


def test_a_readme_edited_upstream_leaves_the_checkpoints_of_a_killed_run(
    documented: Path, tmp_path: Path
) -> None:
    shutil.copytree(documented, tmp_path, dirs_exist_ok=True)
    assert launch(tmp_path, documented_plan(), "killed", kill_after=5) == -signal.SIGKILL
    (tmp_path / "model" / "README.md").write_text("edited upstream")
    assert walk(documented_plan(), tmp_path, "killed") == ALL_RUN | {"prepare": "Skipped"}
    record = json.loads((tmp_path / "killed" / "stages" / "sft" / "record.json").read_text())
    assert record["details"]["resumedAtStep"] == 4
