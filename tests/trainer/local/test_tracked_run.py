"""A tracked run as a process: killed, resumed, without its server, and brought to it later."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from rig.mlflow import MlflowServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.jobs import manifest, write_data
from tests.trainer.local.test_run import ONE_THREAD, finish, start

TOKEN = "a-secret-token-for-mlflow"
STEPS = 2000


def run_of(client: MlflowClient) -> Run | None:
    """Return the only run; None: there is none yet."""
    experiment = client.get_experiment_by_name("tracked-lamps")
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    assert len(found) <= 1
    return found[0] if found else None


def tracked_steps(client: MlflowClient) -> list[tuple[int, float]]:
    run = run_of(client)
    found = client.get_metric_history(run.info.run_id, "sft/loss") if run else []
    return [(each.step, each.value) for each in found]


def wait_until(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not true():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the run ended, or took too long: {process.communicate()}")
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_run_whose_server_dies_too_becomes_one_whole_run(
    tmp_path: Path, tiny_model_dir: Path, mlflow: MlflowServer
) -> None:
    write_data(tmp_path)
    secret = {"name": "mlflow", "key": "token"}
    training = {"maxSteps": STEPS, "batchSize": 2, "learningRate": 1e-4, "checkpointSteps": 50}
    value = manifest(
        tiny_model_dir,
        training=training | {"evaluationSteps": 500},
        adapter={"lora": {}},
        tracking={
            "mlflow": {
                "uri": mlflow.url,
                "experiment": "tracked-lamps",
                "tokenSecret": secret,
            },
            "tensorboard": {},
        },
    )
    environment = ONE_THREAD | {"TUNEYARD_SECRET_MLFLOW_TOKEN": TOKEN}
    client = MlflowClient(mlflow.url)

    killed = start(tmp_path, value, environment)
    wait_until(killed, lambda: len(tracked_steps(client)) > 60)
    killed.send_signal(signal.SIGKILL)
    finish(killed)
    before = len(tracked_steps(client))
    run = run_of(client)
    assert run
    assert run.info.status == "RUNNING"

    resumed = start(tmp_path, value, environment)
    wait_until(resumed, lambda: len(tracked_steps(client)) > before)
    mlflow.stop()
    try:
        code, out, err = finish(resumed)
        assert code == 0, err
        # The stop may cut off a request, which then ends at its time limit.
        told = re.findall(r"(cannot be reached|does not respond within 10 s); the job goes on", err)
        assert len(told) == 1, err
        assert "lines of metrics and its end are missing" in err
        assert "Traceback" not in err
    finally:
        mlflow.start()
    wait_for(client)
    assert len(tracked_steps(client)) < STEPS

    code, again, said = finish(start(tmp_path, value, environment))
    assert code == 0, said
    assert "Nothing to do" in again

    lines = [
        json.loads(line)
        for line in (tmp_path / "out/stages/sft/metrics.jsonl").read_text().splitlines()
    ]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [
        (line["step"], line["validationLoss"]) for line in lines if "validationLoss" in line
    ]
    assert [step for step, _ in losses] == [*range(1, STEPS + 1)]
    assert tracked_steps(client) == losses
    run = run_of(client)
    assert run
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "sft/validationLoss")
    assert [(each.step, each.value) for each in history] == held_out
    assert "evaluate/lossReduction" in run.data.metrics
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"README.md", "evaluate", "job.yaml", "loss.png", "report.html", "report.json"}

    events = EventAccumulator(str(tmp_path / "out/tensorboard/sft"), size_guidance={"scalars": 0})
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("sft/loss")]
    assert shown == [(step, pytest.approx(loss)) for step, loss in losses]

    kept = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    texts = [out, err, again, said, json.dumps(run.to_dictionary())]
    assert TOKEN.encode() not in b"".join([*(path.read_bytes() for path in kept)])
    assert not [text for text in texts if TOKEN in text]


def wait_for(client: MlflowClient) -> None:
    """Wait until the server answers: it accepts connections before."""
    deadline = time.monotonic() + 60
    while True:
        try:
            run_of(client)
        except MlflowException:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        else:
            return
