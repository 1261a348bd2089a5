"""Test `tuneyard run` as a process: workers, killed processes, Ctrl-C and invalid input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainer.jobs import manifest, planned, write_data
from tuneyard.errors import PlanError
from tuneyard_trainer.local.run import localized, run
from tuneyard_trainer.running import torchrun

ROOT = Path(__file__).resolve().parents[3]
TUNEYARD = [str(Path(sys.executable).with_name("tuneyard"))]


# A worker has a thread for each core. Two threads wait for each other at the end of each operation,
# and beside other tests, on two cores, they wait for a core: a step of the tiny model took 0.29 s
# with two threads and 0.04 s with one.
ONE_THREAD = {"OMP_THREAD_LIMIT": "1"}
IDLE_WAITS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Two threads, which leave the core to other tests while they wait."""


def start(
    folder: Path, value: dict[str, Any], environment: dict[str, str] = ONE_THREAD
) -> subprocess.Popen[str]:
    """Write the manifest to `job.yaml` and start `tuneyard run job.yaml`."""
    (folder / "job.yaml").write_text(yaml.safe_dump(value))
    return subprocess.Popen(
        [*TUNEYARD, "run", "job.yaml"],
        cwd=folder,
        env={**os.environ, **environment, "TUNEYARD_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 540) -> tuple[int, str, str]:
    """Wait for the process; return its exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # else it would take the processor from all later tests
        raise
    return process.returncode, out, err


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    """Wait until the sft stage has logged `steps` steps; fail if the process ends earlier."""
    path = folder / "out" / "stages" / "sft" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(
                f"the run logged fewer than {steps} steps: {process.communicate()}"
            )
        time.sleep(0.05)


def long_job(model: Path) -> dict[str, Any]:
    """Return a job of 800 short steps, long enough to be interrupted; it saves every 20 steps."""
    training = {"maxSteps": 800, "batchSize": 2, "learningRate": 1e-4, "checkpointSteps": 20}
    return manifest(model, training=training | {"evaluationSteps": 400}, adapter={"lora": {}})


def record(folder: Path, stage: str = "sft") -> dict[str, Any]:
    """Return the record of a finished stage."""
    value: dict[str, Any] = json.loads(
        (folder / "out" / "stages" / stage / "record.json").read_text()
    )
    return value


def test_a_second_job_copies_prepared_data_unless_the_cache_keeps_none(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data(tmp_path)
    monkeypatch.setenv("TUNEYARD_CACHE", str(tmp_path / "cache"))

    def prepared(output: str, limit: str) -> tuple[int, str]:
        """Run the stage `prepare` alone; return the exit code and the log."""
        monkeypatch.setenv("TUNEYARD_CACHE_RESULTS", limit)
        plan = planned(manifest(tiny_model_dir, output=output))
        code = run([plan.model_copy(update={"stages": plan.stages[:1]})], tmp_path)
        return code, capsys.readouterr().err

    code, log = prepared("none", "0")
    assert code == 0, log
    assert not (tmp_path / "cache/results").exists()
    code, log = prepared("first", "1Gi")
    assert "reused" not in log
    code, log = prepared("second", "1Gi")
    assert "prepare state=Succeeded reused=true" in log
    code, log = prepared("third", "1 GB")
    assert code == 1
    assert "reason=CacheUnusable" in log
    assert "TUNEYARD_CACHE_RESULTS is '1 GB'" in log


@pytest.mark.slow
def test_two_workers_train_the_same_weights_as_one_process(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    value = manifest(tiny_model_dir, adapter={"lora": {}}, compute={"workers": 2})
    write_data(tmp_path)
    code, out, err = finish(start(tmp_path, value))
    assert code == 0, err
    assert "Held-out loss" in out
    assert record(tmp_path)["details"]["workers"] == 2
    torchrun.run(
        planned(value),
        str(tmp_path / "one"),
        base_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        emit=lambda _: None,
    )
    name = "result/adapter/adapter_model.safetensors"
    two_workers = load_file(tmp_path / "out" / name)
    for key, tensor in load_file(tmp_path / "one" / name).items():
        torch.testing.assert_close(two_workers[key], tensor, atol=1e-5, rtol=1e-4)

    logs = {path.stem: path.read_text() for path in tmp_path.glob("out/logs/attempt-1/*.log")}
    assert logs.keys() == {"driver", "worker-0", "worker-1"}
    assert "info run message=" in logs["driver"]
    assert "info export state=Succeeded" in logs["driver"]
    assert "worker 1 of 2 on" in logs["worker-1"]

    code, out, err = finish(start(tmp_path, value))
    assert code == 0, err
    assert "Nothing to do" in out + err
    assert (tmp_path / "out/logs/attempt-1/driver.log").read_text() == logs["driver"]


def _kill_worker(driver: psutil.Process) -> None:
    workers = [
        child
        for child in driver.children(recursive=True)
        if "tuneyard_trainer.running.processes" in child.cmdline()
    ]
    assert len(workers) == 1
    workers[0].kill()


def _terminate_all(driver: psutil.Process) -> None:
    for process in [*driver.children(recursive=True), driver]:
        process.terminate()


def _kill_driver(driver: psutil.Process) -> None:
    driver.kill()


def _interrupt(driver: psutil.Process) -> None:
    driver.send_signal(signal.SIGINT)


def _interrupt_twice(driver: psutil.Process) -> None:
    driver.send_signal(signal.SIGINT)
    time.sleep(0.1)
    driver.send_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interrupt", "code", "message"),
    [
        (_kill_worker, 1, "ChildProcessError: worker 0 was ended by SIGKILL"),
        (_kill_driver, -signal.SIGKILL, ""),
        (_interrupt, 130, "Run the same command to continue"),
        (_interrupt_twice, 130, "press Ctrl-C again to stop at once"),
        (_terminate_all, 130, "Run the same command to continue"),
    ],
    ids=["worker killed", "driver killed", "Ctrl-C", "Ctrl-C twice", "all get SIGTERM"],
)
def test_an_interrupted_run_reports_it_and_the_same_command_continues(
    interrupt: Callable[[psutil.Process], None],
    code: int,
    message: str,
    tmp_path: Path,
    tiny_model_dir: Path,
) -> None:
    write_data(tmp_path)
    value = long_job(tiny_model_dir)
    process = start(tmp_path, value)
    wait_for_steps(process, tmp_path, 60)
    children = psutil.Process(process.pid).children(recursive=True)
    interrupt(psutil.Process(process.pid))
    exit_code, _, err = finish(process)
    assert exit_code == code, err
    assert message in err
    assert "Traceback" not in err
    ended, alive = psutil.wait_procs(children, timeout=60)
    assert alive == [], f"{len(ended)} processes ended, these did not"
    assert not (tmp_path / "out" / "stages" / "sft" / "record.json").exists()

    exit_code, out, err = finish(start(tmp_path, value))
    assert exit_code == 0, err
    assert record(tmp_path)["details"]["resumedAtStep"] >= 40
    assert record(tmp_path)["metrics"]["steps"] == 800
    assert "Held-out loss" in out


@pytest.mark.slow
def test_sigterm_while_a_source_is_read_leaves_nothing_behind(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the workers start, the sources are read or fetched, which can take minutes."""
    write_data(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    os.truncate(model / "model.safetensors", 64 << 30)  # a file without content, read for a minute
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start(tmp_path, manifest(model))
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/owner.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.terminate()
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_module_in_the_working_directory_is_not_imported(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """`python -m` looks there first: a downloaded data set could bring its own `random.py`."""
    write_data(tmp_path)
    (tmp_path / "random.py").write_text("open('was-run', 'w').write('yes'); raise SystemExit(9)")
    code, _, err = finish(start(tmp_path, manifest(tiny_model_dir)))
    assert code == 0, err
    assert not (tmp_path / "was-run").exists()


@pytest.mark.slow
def test_a_stage_that_rejects_its_data_prints_one_message_and_leaves_no_result(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    write_data(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"messages": [\n')
    code, out, err = finish(start(tmp_path, manifest(tiny_model_dir)))
    assert code == 1
    assert out == ""
    assert "row 11" in err
    assert "onInvalidRow" in err
    assert "Traceback" not in err
    remaining = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert set(remaining) <= {
        *("owner.json", ".lock", ".claim.lock", "sources.json", "prepare.begun.json"),
        *("driver.log", "worker-0.log"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"uri": "file://absent"}}, "absent"),
        ({"data": {"train": [{"uri": "file://absent.jsonl"}]}}, "spec.data.train[0].uri"),
        ({"model": {"uri": "pvc://models/x"}}, "spec.model.uri: pvc://models/x exists on a"),
        ({"model": {"uri": "job://other"}}, "spec.model.uri"),
        ({"training": {"epoch": 1}}, "did you mean 'epochs'"),
    ],
    ids=["no model", "no data", "a claim", "an unknown job", "an unknown field"],
)
def test_an_invalid_manifest_or_absent_source_is_reported_before_a_stage_starts(
    changes: dict[str, Any], message: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    write_data(tmp_path)
    code, out, err = finish(start(tmp_path, manifest(tiny_model_dir, **changes)))
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out" / "stages").exists()


def test_an_output_folder_of_another_job_is_rejected(tmp_path: Path, tiny_model_dir: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "out").mkdir()
    owner = {"job": {"kind": "FineTuneJob", "name": "other", "namespace": None}, "attempt": 1}
    (tmp_path / "out" / "owner.json").write_text(json.dumps(owner))
    code, _, err = finish(start(tmp_path, manifest(tiny_model_dir)))
    assert code == 1
    assert "holds the output of FineTuneJob other" in err
    assert json.loads((tmp_path / "out" / "owner.json").read_text()) == owner


def test_a_job_uri_refers_to_a_job_of_the_same_manifest_by_name(tmp_path: Path) -> None:
    first = planned(manifest(tmp_path))
    value = manifest(tmp_path, output="second", model={"uri": "job://lamps"})
    second = planned(value | {"metadata": {"name": "brighter"}})
    stages = localized([first, second])[1].stages
    assert {stage.inputs["model"].uri for stage in stages} == {"file://out/result/model"}  # type: ignore[union-attr]
    with pytest.raises(PlanError, match="which has no job 'lamps'"):
        localized([second])


def test_event_files_on_a_cluster_s_volume_are_refused_on_one_machine(tmp_path: Path) -> None:
    tracking = {"tensorboard": {"uri": "pvc://logs/lamps"}}
    with pytest.raises(PlanError) as caught:
        localized([planned(manifest(tmp_path, tracking=tracking))])
    (fault,) = caught.value.faults
    assert fault.path == "spec.tracking.tensorboard.uri"


def test_a_job_of_the_same_manifest_that_exports_only_an_adapter_is_refused(tmp_path: Path) -> None:
    value = manifest(tmp_path, model={"uri": "job://lamps"})
    second = planned(value | {"metadata": {"name": "brighter"}})
    value = manifest(tmp_path, output="first")
    value["spec"]["output"]["merge"] = False
    first = planned(value)
    with pytest.raises(PlanError, match=r"spec\.model\.uri: job://lamps: .*output\.merge: true"):
        localized([first, second])


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 3 minutes on two quiet cores, 10 beside three other processes
def test_the_quickstart_teaches_smollm2_product_facts_that_the_base_does_not_know(
    tmp_path: Path,
) -> None:
    """The tuned model answers rephrased product questions that the base answers wrongly, and the
    held-out loss falls by at least 30%."""
    value = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    (tmp_path / "data").symlink_to(ROOT / "examples" / "data")
    value["spec"]["output"]["uri"] = "file://out"
    code, out, err = finish(start(tmp_path, value, IDLE_WAITS), seconds=1100)
    assert code == 0, err
    metrics = record(tmp_path, "evaluate")["metrics"]
    assert metrics["lossReduction"] >= 0.3
    assert metrics["baseAnswerAccuracy"] <= 0.1
    assert metrics["answerAccuracy"] >= 0.7
    assert "Answers right" in out
