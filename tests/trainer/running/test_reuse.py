"""Jobs that use the prepared data of others: which ones do, and what they get."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.jobs import manifest, planned, write_data
from tests.trainer.preferring import separable
from tuneyard.api.plan import Plan, StageRecord
from tuneyard.api.stage_settings import StageKind
from tuneyard_trainer.running import runner
from tuneyard_trainer.running.group import Places
from tuneyard_trainer.running.runner import PlanRunner, StageInputs
from tuneyard_trainer.storage import results
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.storage.results import Results, is_reusable
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the stages that ran, in their order."""
    names: list[str] = []
    original = runner._stage_function

    def counted(stage: Any) -> Any:
        def run(context: StageContext) -> StageOutcome:
            names.append(stage.kind)
            return original(stage)(context)

        return run

    monkeypatch.setattr(runner, "_stage_function", counted)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data."""
    write_data(tmp_path)
    return tmp_path


@pytest.fixture
def plan(tiny_model_dir: Path) -> Plan:
    return preparing(tiny_model_dir)


def preparing(model: Path, **spec: Any) -> Plan:
    """Return the stage `prepare` of a job, alone."""
    plan = planned(manifest(model, **spec))
    return plan.model_copy(update={"stages": plan.stages[:1]})


class Job:
    """A job in this process, with an output of its own."""

    def __init__(self, folder: Path, plan: Plan, *, shares: bool = True, attempt: int = 1) -> None:
        self.output = folder / "outputs" / os.urandom(4).hex()
        store = Store(str(self.output), folder / "scratch")
        store.claim(plan.job, attempt)
        self.events: list[dict[str, Any]] = []
        self.records = PlanRunner(
            StageInputs(plan, store, folder, folder / "cache"),
            Worker(0, 1, torch.device("cpu"), attempt=attempt),
            self.events.append,
            results=Results(folder / "cache/results", 1 << 40) if shares else None,
        ).run()

    def files(self, stage: str = "prepare") -> dict[str, bytes]:
        """Return the stage's files without its record, by name."""
        root = self.output / "stages" / stage
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.name != "record.json"
        }

    @property
    def record(self) -> StageRecord:
        return self.records["prepare"]

    @property
    def messages(self) -> list[str]:
        events = (event for event in self.events if event["type"] == "progress")
        return [event["message"] for event in events if event["message"]]


def test_a_job_with_another_output_and_learning_rate_prepares_nothing(
    folder: Path, tiny_model_dir: Path, ran: list[str]
) -> None:
    rates = [{"epochs": 1, "batchSize": 4, "learningRate": rate} for rate in (0.01, 0.02)]
    first, second = (
        Job(folder, planned(manifest(tiny_model_dir, training=training))) for training in rates
    )
    assert ran == ["prepare", "sft", "evaluate", "export", "sft", "evaluate", "export"]
    alone = Job(folder, preparing(tiny_model_dir), shares=False)
    assert first.files() == second.files() == alone.files()
    states = [event["state"] for event in second.events if event["type"] == "stage"]
    assert states == ["Running", "Succeeded"] * 4


def test_preferences_are_reused_too(folder: Path, tiny_model_dir: Path, ran: list[str]) -> None:
    rows = separable(12)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = manifest(tiny_model_dir) | {"kind": "AlignmentJob"}
    job["spec"] = {
        "model": job["spec"]["model"],
        "preferences": {"data": [{"uri": "file://pairs.jsonl"}], "heldOut": 0.25},
        "optimize": {"dpo": {}},
        "adapter": {"lora": {}},
        "output": job["spec"]["output"],
    }
    plan = planned(job)
    plan = plan.model_copy(update={"stages": plan.stages[:1]})
    first, second = Job(folder, plan), Job(folder, plan)
    alone = Job(folder, plan, shares=False)
    [name] = first.records
    assert ran == ["pairs"] * 2
    assert second.records[name].reused
    assert second.files(name) == alone.files(name)
    same = {"metrics", "details", "digest", "identity", "input_digests"}
    assert json.loads(json.dumps(second.records[name].model_dump(include=same))) == json.loads(
        json.dumps(alone.records[name].model_dump(include=same))
    )


def test_a_stage_that_trains_is_never_reused(
    folder: Path, tiny_model_dir: Path, ran: list[str]
) -> None:
    training = {"epochs": 1, "batchSize": 4, "learningRate": 0.01}
    plan = planned(manifest(tiny_model_dir, training=training))
    plan = plan.model_copy(update={"stages": plan.stages[:2]})
    for _ in range(2):
        Job(folder, plan)
    assert ran == ["prepare", "sft", "sft"]
    kept: list[StageKind] = [
        json.loads(path.read_text())["kind"] for path in folder.glob("cache/results/*/record.json")
    ]
    assert kept == ["prepare"]


def test_the_record_of_a_reused_stage_is_the_jobs_own_with_what_the_first_one_measured(
    folder: Path, plan: Plan
) -> None:
    first, second = Job(folder, plan), Job(folder, plan, attempt=3)
    assert not first.record.reused
    assert (second.record.reused, second.record.attempt) == (True, 3)
    assert second.record.started_at >= first.record.finished_at
    own = {"attempt", "started_at", "finished_at", "reused"}
    assert second.record.model_dump(exclude=own) == json.loads(
        json.dumps(first.record.model_dump(exclude=own))
    )
    written = [
        json.loads((job.output / "stages/prepare/record.json").read_text())
        for job in (first, second)
    ]
    assert [record.get("reused") for record in written] == [None, True]
    assert StageRecord.model_validate(written[1]) == second.record
    done = [event["record"] for event in second.events if event["type"] == "stage"][-1]
    assert done == written[1]


def test_an_attempt_after_a_reuse_skips_the_stage(folder: Path, plan: Plan, ran: list[str]) -> None:
    Job(folder, plan)
    output = Job(folder, plan).output
    store = Store(str(output), folder / "scratch")
    store.claim(plan.job, 2)
    shutil.rmtree(folder / "cache/results")
    assert StageInputs(plan, store, folder, folder / "cache").pending() == []
    assert ran == ["prepare"]


def test_data_that_a_job_makes_itself_is_not_kept(tiny_model_dir: Path) -> None:
    data = {"train": [{"uri": "file://train.jsonl"}]}
    augment = {"augment": {"templates": ["Please: {prompt}"]}}
    plain, augmented = (
        planned(manifest(tiny_model_dir, data=each)).stages for each in (data, data | augment)
    )
    assert [stage.name for stage in plain if is_reusable(stage)] == ["prepare"]
    assert [stage.kind for stage in augmented][:2] == ["augment", "prepare"]
    assert [stage.name for stage in augmented if is_reusable(stage)] == []


# ---- what decides -------------------------------------------------------------------------------


def test_a_changed_row_is_prepared(folder: Path, plan: Plan, ran: list[str]) -> None:
    Job(folder, plan)
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace("Lamp 3 is black", "Lamp 3 is ivory"))
    assert not Job(folder, plan).record.reused
    assert ran == ["prepare"] * 2


def test_a_changed_setting_is_prepared(folder: Path, plan: Plan, tiny_model_dir: Path) -> None:
    Job(folder, plan)
    data = {"train": [{"uri": "file://train.jsonl"}], "maxLength": 100}
    assert not Job(folder, preparing(tiny_model_dir, data=data)).record.reused


def test_another_tokenizer_is_prepared_for(
    folder: Path, plan: Plan, tiny_model_dir: Path, tmp_path: Path
) -> None:
    Job(folder, plan)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    path = model / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert not Job(folder, preparing(model)).record.reused


@pytest.mark.parametrize("package", ["tokenizers", "jinja2", "tuneyard", "ftfy"])
def test_data_of_another_version_of_a_package_is_prepared(
    package: str, folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    Job(folder, plan)
    found = results._software() | {package: "0.0.1"}
    monkeypatch.setattr(results, "_software", lambda: found)
    assert not Job(folder, plan).record.reused


def test_data_of_another_state_of_the_trainers_code_is_prepared(
    folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    Job(folder, plan)
    copy = folder / "code/tuneyard_trainer"
    shutil.copytree(Path(results.__file__).parents[1], copy)
    monkeypatch.setattr(results.tuneyard_trainer, "__file__", str(copy / "__init__.py"))
    software = results._software.__wrapped__
    assert software() == results._software(), "a copy of the code is the same code"
    (copy / "data/__pycache__").mkdir(exist_ok=True)
    (copy / "data/__pycache__/prepare.cpython.pyc.140234").write_bytes(b"half of a compiled module")
    assert software() == results._software(), "what Python makes of the code is not the code"
    (copy / "data/prepare.py").write_text("# changed")
    found = software()
    monkeypatch.setattr(results, "_software", lambda: found)
    assert not Job(folder, plan).record.reused


def test_moved_data_of_another_name_is_prepared_since_the_record_names_the_file(
    folder: Path, plan: Plan, tiny_model_dir: Path
) -> None:
    Job(folder, plan)
    moved, renamed = (
        {"train": [{"uri": f"file://{name}"}]} for name in ("in/train.jsonl", "new.jsonl")
    )
    validation = {"validation": {"data": [{"uri": "file://validation.jsonl"}]}}
    (folder / "in").mkdir()
    shutil.copy(folder / "train.jsonl", folder / "in/train.jsonl")
    shutil.copy(folder / "train.jsonl", folder / "new.jsonl")
    assert Job(folder, preparing(tiny_model_dir, data=moved | validation)).record.reused
    assert not Job(folder, preparing(tiny_model_dir, data=renamed | validation)).record.reused


def test_a_model_in_another_place_changes_no_byte_of_the_data(
    folder: Path, plan: Plan, tiny_model_dir: Path, tmp_path: Path
) -> None:
    first = Job(folder, plan)
    shutil.copytree(tiny_model_dir, tmp_path / "moved")
    moved = preparing(tmp_path / "moved")
    second, alone = Job(folder, moved), Job(folder, moved, shares=False)
    assert second.record.reused
    assert first.files() == second.files() == alone.files()


# ---- trouble ------------------------------------------------------------------------------------


def test_a_damaged_entry_is_prepared_again_and_said_to_be_damaged(
    folder: Path, plan: Plan, ran: list[str]
) -> None:
    first = Job(folder, plan)
    [tokens] = folder.glob("cache/results/*/files/train.tokens.npy")
    tokens.write_bytes(tokens.read_bytes()[:-1])
    second, third = Job(folder, plan), Job(folder, plan)
    assert ran == ["prepare"] * 2
    assert "the data in the cache is damaged and is prepared again" in second.messages
    assert third.record.reused
    assert first.files() == second.files() == third.files()


def test_a_disk_that_is_full_when_the_data_is_kept_leaves_the_job_as_it_is(
    folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results.shutil, "copyfile", full)
    job = Job(folder, plan)
    assert job.record.metrics["rows"] == 10
    assert "No space left" in job.messages[-1]


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
@pytest.mark.parametrize("removed", [False, True])
def test_data_that_changes_while_it_is_prepared_is_not_kept(
    name: str, removed: bool, folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry would have the name of the former rows, and the content of the later ones."""
    path, counted = folder / name, runner._stage_function
    before = path.read_text()

    def changing(stage: Any) -> Any:
        def run(context: StageContext) -> StageOutcome:
            path.write_text(before.replace("Lamp 3 is black", "Lamp 3 is ivory") + before)
            outcome = counted(stage)(context)
            if removed:
                path.unlink()
            return outcome

        return run

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_stage_function", changing)
        job = Job(folder, plan)
    assert "an input has changed" in job.messages[-1]
    path.write_text(before)
    second, alone = Job(folder, plan), Job(folder, plan, shares=False)
    assert not second.record.reused
    assert second.files() == alone.files()


def test_an_attempt_that_was_superseded_while_it_waited_changes_no_file(
    folder: Path, plan: Plan
) -> None:
    output = Job(folder, plan).output
    store = Store(str(output), folder / "scratch")
    record = output / "stages/prepare/record.json"
    [entry] = folder.glob("cache/results/*/record.json")
    done = record.read_bytes()
    waiting = PlanRunner(
        StageInputs(plan, store, folder, folder / "cache"),
        Worker(0, 1, torch.device("cpu"), attempt=1),
        lambda _: None,
        results=Results(entry.parents[1], 1 << 40),
    )
    record.unlink()

    @contextmanager
    def waited(*arguments: Any) -> Iterator[Any]:
        store.claim(plan.job, 2)
        record.write_bytes(done)  # by the newer attempt
        with held(*arguments) as found:
            yield found

    held = Results.held
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "held", waited)
        with pytest.raises(runner.StageError) as caught:
            waiting.run()
    assert caught.value.reason == "StaleAttempt"
    assert record.read_bytes() == done


def test_a_stage_that_fails_leaves_no_entry(
    folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "train.jsonl").write_text("{}\n")
    with pytest.raises(runner.StageError):
        Job(folder, plan)
    assert [path for path in (folder / "cache/results").iterdir() if path.is_dir()] == []


def test_without_a_shared_cache_each_job_prepares(folder: Path, plan: Plan, ran: list[str]) -> None:
    for _ in range(2):
        Job(folder, plan, shares=False)
    assert ran == ["prepare"] * 2
    assert not (folder / "cache/results").exists()


def test_a_pod_shares_no_data_unless_its_driver_says_so() -> None:
    places = Places("out", "scratch", "/", "/tmp/tuneyard/cache")
    assert places.results is None
    shared = replace(places, results_bytes=5)
    assert shared.results == Results(Path("/tmp/tuneyard/cache/results"), 5)
