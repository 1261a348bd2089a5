"""The question whether a job fits: when it is asked, and what becomes of the answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.jobs import manifest, planned, write_data
from tuneyard.api.job_facts import JobFacts
from tuneyard.api.plan import Plan, StageRecord
from tuneyard.errors import StageError
from tuneyard_trainer.running import facts as facts_module
from tuneyard_trainer.running import runner
from tuneyard_trainer.running.facts import device_of, job_facts, memory_limit
from tuneyard_trainer.running.runner import PlanRunner, StageInputs
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import StageContext, StageOutcome, Worker

REFUSAL = {"refusal": {"reason": "DoesNotFit", "message": "too large", "advice": "Set this."}}
SMALLER = {"settings": {"sft": {"microBatchTokens": 64, "gradientCheckpointing": True}}}


class Run:
    """A run of a plan, its questions and its events."""

    def __init__(self, plan: Plan, folder: Path, answer: Any) -> None:
        self.plan, self.folder, self._answer = plan, folder, answer
        self.asked: list[JobFacts] = []
        self.log: list[str] = []

    def ask(self, event: dict[str, Any]) -> Any:
        assert event["type"] == "facts"
        self.asked.append(JobFacts.model_validate(event["facts"]))
        self.log.append("asked")
        return self._answer

    def emit(self, event: dict[str, Any]) -> None:
        if event["type"] == "stage" and event["state"] != "Running":
            self.log.append(event["stage"])

    def go(self) -> dict[str, StageRecord]:
        store = Store(str(self.folder / "out"), self.folder / "scratch")
        store.claim(self.plan.job, attempt=1)
        return PlanRunner(
            stage_inputs=StageInputs(self.plan, store, self.folder, self.folder / "cache"),
            worker=Worker(rank=0, world_size=1, device=torch.device("cpu")),
            emit=self.emit,
            ask=self.ask,
        ).run()


@pytest.fixture
def start(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Run]:
    write_data(tmp_path)
    plan = planned(manifest(tiny_model_dir, training={"maxSteps": 1}, evaluate={"samples": 0}))
    return lambda answer=None: Run(plan, tmp_path, answer)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runtime of each stage that runs, in order."""
    seen: list[Any] = []
    original = runner._stage_function

    def recorded(kind: Any) -> Callable[[StageContext], StageOutcome]:
        def run(context: StageContext) -> StageOutcome:
            seen.append((context.stage.name, context.stage.runtime))
            return original(kind)(context)

        return run

    monkeypatch.setattr(runner, "_stage_function", recorded)
    return seen


def test_the_question_comes_once_after_the_data_is_prepared_and_before_the_training(
    start: Callable[..., Run],
) -> None:
    run = start()
    records = run.go()
    assert run.log == ["prepare", "asked", "sft", "evaluate", "export"]
    (facts,) = run.asked
    assert facts.model is not None
    assert facts.model.architecture == "llama"
    assert facts.rows == records["prepare"].metrics["longestRow"]
    assert facts.done == ["prepare"]
    assert facts.device is not None
    assert facts.device.gpu is None
    again = start()
    again.go()
    assert again.log == ["prepare", "sft", "evaluate", "export"]
    assert not again.asked, "a job without a stage left that trains asks nobody"


def test_a_job_that_does_not_fit_ends_before_its_training_and_leaves_nothing_half_trained(
    start: Callable[..., Run],
) -> None:
    run = start(REFUSAL)
    with pytest.raises(StageError) as error:
        run.go()
    assert (error.value.reason, error.value.advice) == ("DoesNotFit", "Set this.")
    assert not error.value.retryable
    assert run.log == ["prepare", "asked"]
    assert not (run.folder / "out/stages/sft/weights").exists()
    assert not (run.folder / "out/result").exists()


def test_the_chosen_settings_run_the_stage_and_change_neither_identity_nor_other_stages(
    start: Callable[..., Run], settings: list[Any]
) -> None:
    plain = start().go()
    shutil.rmtree(start().folder / "out")
    settings.clear()
    chosen = start(SMALLER).go()
    runtimes = dict(settings)
    assert runtimes["sft"].micro_batch_tokens == 64
    assert runtimes["sft"].gradient_checkpointing
    assert runtimes["sft"].checkpoint_steps is None
    assert runtimes["evaluate"].micro_batch_tokens == "auto"
    assert chosen["sft"].identity == plain["sft"].identity


def test_without_an_answer_the_job_trains_as_planned(
    start: Callable[..., Run], settings: list[Any]
) -> None:
    start(None).go()
    assert dict(settings)["sft"].micro_batch_tokens == "auto"


# ---- facts --------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def record(kind: str, longest: float, **details: Any) -> StageRecord:
    return StageRecord.model_validate(
        {
            "stage": kind,
            "kind": kind,
            "identity": "i",
            "inputDigests": {},
            "digest": "d",
            "attempt": 1,
            "startedAt": "",
            "finishedAt": "",
            "metrics": {"longestRow": longest},
            "details": details,
        }
    )


def test_a_row_is_no_longer_than_it_was_cut(tmp_path: Path) -> None:
    records = {
        "prepare": record("prepare", 5000.0, maxLength=1024),
        "pairs": record("pairs", 300.0, maxLength=1024),
    }
    facts = job_facts(tmp_path, records, CPU, devices=4, neighbors=1)
    assert (facts.rows, facts.pairs, facts.devices) == (1024, 300, 4)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model_type": "mamba"}', "\xff"])
def test_a_model_that_is_not_described_gives_the_reason_and_ends_nothing(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    facts = job_facts(tmp_path, {}, CPU, devices=1, neighbors=1)
    assert facts.model is None
    assert facts.unknown_model
    assert facts.rows is None


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/jobs/one", "jobs/memory.max"),
        ("0::/jobs/one", "jobs/one/memory.max"),
        ("4:cpu:/a\n9:memory:/jobs/one\n0::/", "memory/jobs/one/memory.limit_in_bytes"),
        ("9:cpu,memory:/of/the/host", "memory/memory.limit_in_bytes"),
    ],
    ids=["around its own", "version 2", "version 1", "a container's root"],
)
def test_the_limit_of_the_cgroup_is_shared_by_the_workers_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, file: str
) -> None:
    monkeypatch.setattr(facts_module, "MOUNT", tmp_path)
    monkeypatch.setattr(facts_module, "OWN_GROUPS", tmp_path / "own")
    machine = memory_limit()
    (tmp_path / "own").write_text(groups)
    limit = tmp_path / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    limit.write_text("max\n")
    assert memory_limit() == machine
    limit.write_text(f"{64 << 20}\n")
    assert device_of(CPU, 4).memory == 16 << 20
