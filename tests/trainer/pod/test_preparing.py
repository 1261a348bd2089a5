"""The driver as the pod of a Job starts it that prepares data, before there is a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.jobs import write_data
from tests.trainer.pod.test_driver import UID, cluster_plan, last_words, pictures
from tests.trainer.status_server import StatusServer, serving
from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard.api.plan import Plan
from tuneyard.api.pods import PREPARE_OPTION, UNKNOWN_OPTION
from tuneyard.api.status import Failure
from tuneyard.errors import StageError
from tuneyard_trainer.pod import driver
from tuneyard_trainer.running.runner import PlanRunner, StageInputs
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Worker


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StatusServer]:
    (tmp_path / "tls").mkdir()
    with serving(tmp_path / "tls") as server:
        yield server


@pytest.fixture
def plan(tmp_path: Path, tiny_model_dir: Path) -> Plan:
    """The plan of a job with two workers of four GPUs each."""
    write_data(tmp_path)
    plan = cluster_plan(tmp_path, tiny_model_dir, workers=2)
    compute = plan.compute.model_copy(update={"gpus_per_worker": 4})
    return plan.model_copy(update={"compute": compute})


def started(
    folder: Path, plan: Plan, server: StatusServer, attempt: int = 1
) -> subprocess.Popen[str]:
    """Start the driver with the arguments of the pod; its standard output is a pipe, as there."""
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "token").write_text("secret")
    environment = {
        "TUNEYARD_PROGRESS_URL": server.url,
        "TUNEYARD_TOKEN_FILE": str(folder / "token"),
        "TUNEYARD_CA": server.ca,
        "TMPDIR": str(folder),
    }
    command = [sys.executable, "-m", "tuneyard_trainer", "--plan", str(folder / "plan.json")]
    return subprocess.Popen(
        [*command, "--attempt", str(attempt), "--job-uid", UID, PREPARE_OPTION],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def prepared(
    folder: Path, plan: Plan, server: StatusServer, attempt: int = 1
) -> tuple[int, str, str]:
    """Run the driver to its end; return its exit code and what it wrote."""
    process = started(folder, plan, server, attempt)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def stages_of(server: StatusServer) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in pictures(server)[-1]["stages"]}


def asked(server: StatusServer) -> list[JobFacts]:
    """Return the facts that were posted."""
    found = (picture["facts"] for picture in pictures(server) if picture.get("facts"))
    return [JobFacts.model_validate_json(json.dumps(facts)) for facts in found]


def test_the_leading_stages_are_done_without_ray_and_the_run_of_the_plan_finds_their_records(
    tmp_path: Path, plan: Plan, server: StatusServer
) -> None:
    code, out, err = prepared(tmp_path, plan, server)
    assert code == 0, err
    assert "event=prepared stages=prepare" in out
    assert "ray" not in out.lower()
    assert not (tmp_path / "out/stages/sft").exists()
    store = Store(str(tmp_path / "out"), tmp_path / "read", UID)
    record = store.record("prepare")
    assert record is not None
    assert record.metrics["rows"] == 10

    assert all(picture["preparing"] for picture in pictures(server))
    assert stages_of(server)["prepare"] == "Succeeded"
    outcomes = [picture for picture in pictures(server) if picture.get("outcome")]
    assert outcomes == [], "its success is not that of the job"
    facts = asked(server)[0]
    assert facts.model is not None
    assert (facts.device, facts.devices) == (None, 8), "it does not know the workers' GPUs"
    assert 0 < facts.rows["prepare"].longest < 256

    assert not (tmp_path / "tuneyard/cache/results").exists(), "the cache ends with the pod"
    logs = tmp_path / "out/logs/attempt-1"
    assert "event=prepared" in (logs / "driver.log").read_text()
    assert "worker 0 of 1" in (logs / "worker-0.log").read_text()

    again = Run(plan.model_copy(update={"stages": plan.stages[:2]}), tmp_path)
    again.carry_out()
    assert again.states == {"prepare": "Skipped", "sft": "Succeeded"}
    assert store.record("prepare") == record


class Run:
    """A run of the plan in this process, as one worker."""

    def __init__(self, plan: Plan, folder: Path, answer: FitAnswer | None = None) -> None:
        """`answer`: to the job's facts. None: the job trains as planned."""
        self.asked: list[JobFacts] = []
        self.states: dict[str, str] = {}
        self.store = Store(str(folder / "out"), folder / "read", UID)
        self.store.claim(plan.job, 1)
        self._inputs = StageInputs(plan, self.store, Path("/"), folder / "cache")
        self._answer = answer or FitAnswer()

    def carry_out(self, *, preparing: bool = False) -> None:
        """Run it; `preparing`: the leading stages alone."""
        worker = Worker(0, 1, torch.device("cpu"))
        PlanRunner(self._inputs, worker, self._follow, self._ask, preparing=preparing).run()

    def _follow(self, event: dict[str, Any]) -> None:
        if event["type"] == "stage":
            self.states[event["stage"]] = event["state"]

    def _ask(self, event: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(JobFacts.model_validate_json(json.dumps(event["facts"])))
        return self._answer.model_dump(mode="json", by_alias=True)


def test_bad_data_end_the_attempt_with_their_row_before_anything_is_trained(
    tmp_path: Path, plan: Plan, server: StatusServer
) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"messages": 7}\n')
    code, out, err = prepared(tmp_path, plan, server)
    assert code == 1
    outcome = last_words(err)
    assert (outcome.state, outcome.retryable) == ("Failed", False)
    posted = pictures(server)[-1]["outcome"]
    assert outcome.failure is not None
    assert posted["failure"]["reason"] == outcome.failure.reason
    assert "train.jsonl" in outcome.failure.message
    assert "event=failed" in (tmp_path / "out/logs/attempt-1/driver.log").read_text()
    assert "event=failed" in out


REFUSED = FitAnswer(refusal=Failure(reason="DoesNotFit", message="it does not fit"))


def test_a_job_that_cannot_fit_is_refused_when_its_rows_are_measured_and_before_it_has_workers(
    tmp_path: Path, plan: Plan
) -> None:
    run = Run(plan, tmp_path, REFUSED)
    with pytest.raises(StageError) as refused:
        run.carry_out(preparing=True)
    assert refused.value.reason == "DoesNotFit"
    assert run.states == {"prepare": "Succeeded"}
    assert run.store.record("prepare") is not None


def test_a_stage_that_has_a_record_is_left_to_its_workers_to_judge(
    tmp_path: Path, plan: Plan
) -> None:
    """It may be done, and needs no memory any more: only its inputs tell."""
    Run(plan, tmp_path).carry_out(preparing=True)
    again = Run(plan, tmp_path, REFUSED)
    record = again.store.record("prepare")
    assert record is not None
    done = record.model_copy(update={"stage": "sft", "kind": "sft"})
    (tmp_path / "out/stages/sft").mkdir()
    (tmp_path / "out/stages/sft/record.json").write_text(done.model_dump_json(by_alias=True))
    again.carry_out(preparing=True)
    assert again.states == {"prepare": "Skipped"}
    assert again.asked == []


def test_a_pod_of_an_older_attempt_writes_nothing(
    tmp_path: Path, plan: Plan, server: StatusServer
) -> None:
    Store(str(tmp_path / "out"), tmp_path / "claim", UID).claim(plan.job, 2)
    code, _, err = prepared(tmp_path, plan, server, attempt=1)
    assert code == 4
    failure = last_words(err).failure
    assert (failure and failure.reason) == "StaleAttempt"
    assert not (tmp_path / "out/stages").exists()


def test_a_pod_that_is_deleted_ends_as_an_interruption(
    tmp_path: Path, plan: Plan, server: StatusServer
) -> None:
    process = started(tmp_path, plan, server)
    server.wait_for(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert pictures(server)[-1]["outcome"]["failure"]["reason"] == "Preempted"


def test_an_option_that_a_driver_does_not_know_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """The operator tells an image of an earlier release by it."""
    arguments: list[Any] = ["--plan", str(tmp_path / "plan.json"), "--of-a-newer-release"]
    with pytest.raises(SystemExit) as ended:
        driver.main(arguments)
    assert ended.value.code == UNKNOWN_OPTION
    own = (driver.SUCCEEDED, driver.FAILED, driver.INTERRUPTED, driver.STALE)
    assert UNKNOWN_OPTION not in own


def test_the_run_of_a_tracker_begins_here_and_goes_on_with_the_workers(
    tmp_path: Path, tiny_model_dir: Path, server: StatusServer
) -> None:
    write_data(tmp_path)
    plan = cluster_plan(tmp_path, tiny_model_dir, tracking={"tensorboard": {}})
    code, out, err = prepared(tmp_path, plan, server)
    assert code == 0, err
    said = [line for line in out.splitlines() if "tracking" in line]
    assert len(said) == 1
    assert f"{tmp_path}/out/tensorboard" in said[0]
    state = json.loads((tmp_path / "out/tracking/tensorboard.json").read_text())
    assert list(state["identities"]) == ["prepare"]
    assert state["ended"] is False
