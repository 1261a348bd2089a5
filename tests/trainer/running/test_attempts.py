"""Two attempts of a job at one output, and an attempt that continues on another node.

The scratch folder of an attempt is removed with its node, so only the output is left to resume
from.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig.s3 import S3Server

from tests.trainer.jobs import manifest, planned, write_data
from tuneyard.api.plan import Plan
from tuneyard.errors import StageError
from tuneyard_trainer.running.runner import PlanRunner, StageInputs
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted, Worker

STEPS = 9


class Attempt:
    """One attempt, with a scratch folder of its own. `at_step` is called at each reported step."""

    def __init__(self, plan: Plan, output: str, folder: Path, number: int = 1) -> None:
        self.store = Store(output, folder / uuid.uuid4().hex)
        self.store.claim(plan.job, number)
        self.plan, self.folder, self.number = plan, folder, number
        self.stop_after = STEPS + 1
        self.at_step: dict[int, Callable[[], None]] = {}
        self.resumed: int | None = None
        self._step = 0

    def run(self) -> None:
        """Run the plan in this process. Raises StageError and Interrupted."""
        worker = Worker(0, 1, torch.device("cpu"), stop=self._stops, attempt=self.number)
        inputs = StageInputs(self.plan, self.store, self.folder, self.folder / "cache")
        PlanRunner(inputs, worker, self._on_event).run()

    def _stops(self) -> bool:
        return self._step >= self.stop_after

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["type"] != "progress" or event["stage"] != "sft":
            return
        if event["resumedStep"] is not None:
            self.resumed = event["resumedStep"]
        if event["step"] > self._step:
            self._step = event["step"]
            self.at_step.get(self._step, lambda: None)()


@pytest.fixture
def plan(tmp_path: Path, tiny_model_dir: Path) -> Plan:
    write_data(tmp_path)
    return planned(manifest(tiny_model_dir))


def test_a_stale_attempt_leaves_the_newer_attempts_checkpoints_as_they_are(
    plan: Plan, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    stale, checkpoints = Attempt(plan, output, tmp_path), tmp_path / "out/stages/sft/checkpoints"
    newer: dict[str, str] = {}

    def taken_over() -> None:
        Attempt(plan, output, tmp_path, number=2)
        for name in ("step-00000001", "step-00000004", "step-00000007.partial"):
            (checkpoints / name).mkdir()
            (checkpoints / name / "state.json").write_text(f"newer {name}")
        newer.update(contents(checkpoints))

    stale.at_step[3] = taken_over
    with pytest.raises(StageError, match="attempt 2 has taken over") as failure:
        stale.run()
    assert failure.value.reason == "StaleAttempt"
    kept = contents(checkpoints)
    assert {name: kept.get(name) for name in newer} == newer
    assert {name for name in kept if ".partial/" not in name} == {
        name for name in newer if ".partial/" not in name
    }


@pytest.fixture(params=["memory", "s3"])
def objects(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an output on an object store."""
    if request.param == "memory":
        return f"memory://bucket-{uuid.uuid4().hex}/out"
    server: S3Server = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.bucket}/{uuid.uuid4().hex}/out"


def curves(store: Store) -> list[dict[str, Any]]:
    """Return the lines of the training's metrics, without those that measure time."""
    lines = (store.workdir("sft") / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokensPerSecond"}
        for line in lines
    ]


def test_a_resume_on_another_node_keeps_the_curves_and_the_baseline(
    plan: Plan, objects: str, tmp_path: Path
) -> None:
    whole = Attempt(plan, str(tmp_path / "whole"), tmp_path)
    whole.run()
    first = Attempt(plan, objects, tmp_path)
    first.stop_after = 5  # requested at step 5, carried out at step 6
    with pytest.raises(Interrupted):
        first.run()
    shutil.rmtree(first.store.root)
    second = Attempt(plan, objects, tmp_path, number=2)
    second.run()
    assert second.resumed == 6
    assert curves(second.store) == curves(whole.store)
    expected, found = whole.store.record("sft"), second.store.record("sft")
    assert expected
    assert found
    assert found.digest == expected.digest
    assert found.metrics["baseValidationLoss"] == expected.metrics["baseValidationLoss"]


def test_the_evaluation_of_a_job_that_misses_a_gate_is_kept(
    tmp_path: Path, tiny_model_dir: Path, objects: str
) -> None:
    write_data(tmp_path)
    gates = [{"metric": "lossReduction", "atLeast": 0.999}]
    gated = planned(manifest(tiny_model_dir, evaluate={"maxNewTokens": 4, "gates": gates}))
    attempt = Attempt(gated, objects, tmp_path)
    with pytest.raises(StageError, match="lossReduction is") as failure:
        attempt.run()
    assert failure.value.reason == "GateFailed"
    shutil.rmtree(attempt.store.root)
    later = Store(objects, tmp_path / "later")
    assert later.record("evaluate") is None
    later.pull("evaluate")
    evaluation = json.loads((later.workdir("evaluate") / "evaluation.json").read_text())
    assert evaluation["metrics"]["lossReduction"] < 0.999


def contents(folder: Path) -> dict[str, str]:
    """Return the text of the files of every checkpoint, except for tensors."""
    files = folder.rglob("*.json")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(files)}
