"""The driver as a head pod starts it, on a Ray cluster of this machine."""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.planning.models import facts
from tests.trainer.jobs import manifest, planned, write_data
from tests.trainer.status_server import SUPERSEDED, Reply, StatusServer, serving
from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard.api.plan import JobRef, Plan
from tuneyard.api.pods import OUTCOME_PREFIX, WORKERS_VARIABLE
from tuneyard.api.progress import Outcome, PostResponse
from tuneyard.api.status import Failure
from tuneyard.errors import StageError
from tuneyard_trainer import drain, erase
from tuneyard_trainer.pod import driver as driver_module
from tuneyard_trainer.pod.driver import Driver, located, outcome_of
from tuneyard_trainer.pod.log import Log
from tuneyard_trainer.running import processes, torchrun
from tuneyard_trainer.running.distributed import pods_resources
from tuneyard_trainer.running.group import Places, Resources
from tuneyard_trainer.storage import sources
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted

UID = "5a1c-uid"


# ---- without Ray ------------------------------------------------------------------------------


def launched(
    folder: Path, plan: Plan, environment: dict[str, str] | None = None, attempt: int = 1
) -> subprocess.Popen[str]:
    """`python -m tuneyard_trainer` with the arguments of KubeRay's entrypoint."""
    (folder / "plan.json").write_text(plan.to_json())
    command = [sys.executable, "-m", "tuneyard_trainer", "--plan", str(folder / "plan.json")]
    return subprocess.Popen(
        [*command, "--attempt", str(attempt), "--job-uid", UID],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_words(err: str) -> Outcome:
    line = err.rstrip("\n").splitlines()[-1]
    assert line.startswith(OUTCOME_PREFIX), err
    return Outcome.model_validate_json(line.removeprefix(OUTCOME_PREFIX))


def cluster_plan(folder: Path, model: Path, workers: int = 1, **spec: Any) -> Plan:
    """The plan of a job with absolute paths and one CPU per worker."""
    output = spec.pop("output", None) or str(folder / "out")
    value = manifest(model, output, compute={"workers": workers, "cpusPerWorker": "900m"}, **spec)
    data = value["spec"]["data"]
    data["train"][0]["uri"] = f"file://{folder}/train.jsonl"
    data["validation"]["data"][0]["uri"] = f"file://{folder}/validation.jsonl"
    return planned(value)


def test_an_output_of_another_job_ends_the_attempt_before_ray_starts(tmp_path: Path) -> None:
    Store(str(tmp_path / "out"), tmp_path, "x").claim(JobRef(kind="FineTuneJob", name="other"), 1)
    process = launched(tmp_path, cluster_plan(tmp_path, tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    outcome = last_words(err)
    assert outcome.failure
    assert outcome.failure.reason == "OutputOwned"
    assert "output.uri" in outcome.failure.advice
    assert not outcome.retryable
    assert "event=failed reason=OutputOwned" in out
    assert "ray" not in out


def test_an_older_attempt_is_stale(tmp_path: Path) -> None:
    plan = cluster_plan(tmp_path, tmp_path)
    Store(str(tmp_path / "out"), tmp_path, UID).claim(plan.job, 2)
    process = launched(tmp_path, plan, attempt=1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4
    outcome = last_words(err)
    assert outcome.failure
    assert outcome.failure.reason == "StaleAttempt"


FAILING = """
import sys
from tuneyard.errors import StageError
from tuneyard_trainer.pod.driver import main
from tuneyard_trainer.running import distributed
def fail(*_):
    raise StageError("WorkerDied", "no worker has hf_0123456789abcdefghij0123", retryable=True)
distributed.pods_resources = fail
sys.exit(main(sys.argv[1:]))
"""


def test_the_driver_s_log_is_kept_with_the_outcome_as_its_last_line(tmp_path: Path) -> None:
    """Ray gives a driver one file as standard output and standard error."""
    plan = cluster_plan(tmp_path, tmp_path)
    (tmp_path / "plan.json").write_text(plan.to_json())
    arguments = ["--plan", str(tmp_path / "plan.json"), "--attempt", "3", "--job-uid", UID]
    log = tmp_path / "job-driver.log"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", FAILING, *arguments],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
    assert done.returncode == 1, log.read_text()
    kept = (tmp_path / "out/logs/attempt-3/driver.log").read_text()
    assert kept == log.read_text().replace("hf_0123456789abcdefghij0123", "[redacted]")
    assert "event=driver job=lamps attempt=3" in kept
    assert "event=output-claimed" in kept
    failure = last_words(log.read_text()).failure
    assert (failure and failure.reason) == "WorkerDied"
    assert last_words(kept).state == "Failed"


class Exited(BaseException):
    """Raised in place of an end of the process."""


def superseded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, claim: tuple[str, int] | None
) -> Driver:
    """Return attempt 1 of a driver after the operator's answer that it is superseded. `claim`: the
    output's last claim; None: the driver has not claimed it yet. Raises Exited."""

    def exit_(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", exit_)
    monkeypatch.setattr(driver_module, "GRACE_SECONDS", 1e6)
    plan = cluster_plan(folder, folder)
    driver = Driver(plan, 1, UID, Log(sys.stdout))
    if claim is not None:
        driver._store = Store(str(folder / "out"), folder, UID)
        driver._store.claim(plan.job, 1)
        Store(str(folder / "out"), folder, claim[0]).claim(plan.job, claim[1])
    driver._superseded()
    return driver


def test_a_superseded_attempt_lets_its_workers_save_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = superseded(tmp_path, monkeypatch, claim=(UID, 1))
    assert driver._stop.is_set()


def test_a_superseded_attempt_whose_workers_hang_ends_after_the_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", codes.put)
    monkeypatch.setattr(driver_module, "GRACE_SECONDS", 0.2)
    plan = cluster_plan(tmp_path, tmp_path)
    driver = Driver(plan, 1, UID, Log(sys.stdout))
    driver._store = Store(str(tmp_path / "out"), tmp_path, UID)
    driver._store.claim(plan.job, 1)
    driver._superseded()
    assert codes.empty()
    assert codes.get(timeout=10) == 4


@pytest.mark.parametrize("claim", [(UID, 2), ("of-a-new-job", 1), None])
def test_a_superseded_attempt_without_the_output_ends_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    claim: tuple[str, int] | None,
) -> None:
    with pytest.raises(Exited) as exited:
        superseded(tmp_path, monkeypatch, claim=claim)
    assert exited.value.args == (4,)
    outcome = last_words(capsys.readouterr().err)
    assert (outcome.failure and outcome.failure.reason) == "StaleAttempt"


def test_a_superseded_attempt_whose_output_cannot_be_read_lets_its_workers_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They check the claim again before each write."""

    def unreadable(*_: object) -> None:
        raise OSError(errno.EIO, "the disk does not answer")

    monkeypatch.setattr(Store, "refuse_stale", unreadable)
    assert superseded(tmp_path, monkeypatch, claim=(UID, 1))._stop.is_set()


# ---- whether the job fits -----------------------------------------------------------------------

FACTS = JobFacts(model=facts("8B"), done=["prepare"])
REFUSAL = Failure(reason="DoesNotFit", message="it does not", advice="Set this; or that.")


@pytest.fixture
def operated(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[StatusServer, Driver]]:
    """A driver whose posts a server receives; it waits half a second for an answer."""
    monkeypatch.setattr(driver_module, "FIT_SECONDS", 0.5)
    with serving(tmp_path_factory.mktemp("tls")) as server:
        (tmp_path / "token").write_text("secret")
        monkeypatch.setenv("TUNEYARD_PROGRESS_URL", server.url)
        monkeypatch.setenv("TUNEYARD_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("TUNEYARD_CA", server.ca)
        yield server, Driver(cluster_plan(tmp_path, tmp_path), 1, UID, Log(sys.stdout))
        server.reply = SUPERSEDED


def fit_reply(answer: FitAnswer) -> Reply:
    return Reply(body=PostResponse(stop=False, fit=answer).model_dump_json(by_alias=True).encode())


def test_the_operators_decision_is_the_answer_and_later_posts_ask_nothing(
    operated: tuple[StatusServer, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "FIT_SECONDS", 60.0)
    server, driver = operated
    server.reply = fit_reply(FitAnswer(refusal=REFUSAL))
    assert driver._review(FACTS).refusal == REFUSAL
    assert JobFacts.model_validate_json(json.dumps(server.posts[-1]["tuneyard"]["facts"])) == FACTS
    for later in (driver._progress.post(), driver._reporter and driver._reporter._newest):
        assert later
        assert later.tuneyard
        assert later.tuneyard.facts is None


@pytest.mark.parametrize(
    "reply",
    [Reply(), Reply(503), Reply(400), Reply(500, body=b"nonsense"), Reply(body=b"{")],
    ids=["an older operator", "busy", "refused", "broken", "malformed"],
)
def test_without_a_decision_the_job_trains_as_planned(
    operated: tuple[StatusServer, Driver], reply: Reply
) -> None:
    server, driver = operated
    server.reply = reply
    assert driver._review(FACTS) == FitAnswer()


def test_facts_that_an_operator_does_not_accept_are_not_posted_again(
    operated: tuple[StatusServer, Driver],
) -> None:
    """It would refuse every later post too, also that of the outcome."""
    server, driver = operated
    server.reply = Reply(400)
    driver._review(FACTS)
    later = driver._progress.post().tuneyard
    assert later is not None
    assert later.facts is None


def test_a_driver_that_posts_nothing_asks_nobody(tmp_path: Path) -> None:
    driver = Driver(cluster_plan(tmp_path, tmp_path), 1, UID, Log(sys.stdout))
    assert driver._review(FACTS) == FitAnswer()


def test_a_plan_of_another_version_ends_in_one_line(tmp_path: Path) -> None:
    plan = cluster_plan(tmp_path, tmp_path).model_copy(update={"kind": "Recipe"})
    process = launched(tmp_path, plan)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    outcome = last_words(err)
    assert outcome.failure
    assert outcome.failure.reason == "DriverError"
    assert "\n" not in outcome.failure.message
    assert "Traceback" not in err


@pytest.mark.parametrize("claim", [None, "cache"])
def test_the_cache_is_on_the_claim_that_the_job_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: str | None
) -> None:
    used: list[Places] = []

    def run(plan: Plan, *, places: Places, **_: Any) -> None:
        used.append(places)
        raise StageError("WorkerDied", "it has seen the places")

    monkeypatch.setattr(processes, "run", run)
    plan = cluster_plan(tmp_path, tmp_path)
    compute = plan.compute.model_copy(update={"cache_claim": claim})
    Driver(
        plan.model_copy(update={"compute": compute}), 1, UID, Log(sys.stdout), preparing=True
    ).run()
    (cache,) = [Path(places.cache_dir) for places in used]
    assert sources.on_claim(cache) == (claim is not None)
    assert (claim is None) or cache.is_relative_to(sources.PVC_ROOT / claim)
    assert [places.results is not None for places in used] == [claim is not None], (
        "prepared data is shared only where the cache outlives the pod"
    )


@pytest.mark.parametrize(
    ("error", "state", "reason", "retryable"),
    [
        (StageError("DiskFull", "full"), "Failed", "DiskFull", False),
        (StageError("WorkerDied", "gone", retryable=True), "Failed", "WorkerDied", True),
        (Interrupted("sft", 7), "Interrupted", "Preempted", True),
        (KeyError("text"), "Failed", "DriverError", False),
        (ConnectionError("no head"), "Failed", "DriverError", True),
    ],
)
def test_every_error_has_a_reason_and_says_whether_to_try_again(
    error: Exception, state: str, reason: str, retryable: bool
) -> None:
    outcome = outcome_of(error, ("Preempted", "a pod went"))
    assert outcome.failure
    assert (outcome.state, outcome.failure.reason, outcome.retryable) == (state, reason, retryable)
    assert outcome.result is None


def test_a_long_python_error_is_cut_to_its_last_line() -> None:
    outcome = outcome_of(ValueError("first\n" * 300 + "the cause" + "!" * 5000))
    assert outcome.failure
    assert outcome.failure.message.startswith("the driver failed: ValueError: the cause!")
    assert len(outcome.failure.message) < 1200


def test_a_claim_is_a_mounted_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PVC_ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    assert located("pvc://models/team/bot") == str(tmp_path / "models" / "team" / "bot")
    assert located("s3://bucket/x") == "s3://bucket/x"
    for uri in (
        "pvc://absent/x",
        "pvc://models/../etc",
        "pvc://../etc",
        "pvc://models/.tuneyard-cache/results/key",
    ):
        with pytest.raises(StageError) as failure:
            located(uri)
        assert failure.value.reason == "OutputUnavailable"


def test_erasing_takes_this_jobs_output_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = cluster_plan(tmp_path, tmp_path, output=str(tmp_path / "out"))
    (tmp_path / "plan.json").write_text(plan.to_json())
    Store(str(tmp_path / "out"), tmp_path, UID).claim(plan.job, 1)
    arguments = ["--plan", str(tmp_path / "plan.json"), "--job-uid"]
    assert erase.main([*arguments, "another"]) == 0
    assert (tmp_path / "out" / "owner.json").exists()
    assert "event=nothing-of-this-job" in capsys.readouterr().out
    assert erase.main([*arguments, UID]) == 0
    assert not (tmp_path / "out").exists()
    assert "event=erased" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("compute", "resources"),
    [
        ({}, Resources(1, 1, 0, 4.0)),
        ({"workers": 4, "minWorkers": 2, "cpusPerWorker": "1500m"}, Resources(4, 2, 0, 2.0)),
        ({"workers": 2, "gpusPerWorker": 4, "cpusPerWorker": "8"}, Resources(8, 8, 1, 2.0)),
        ({"gpusPerWorker": 3, "cpusPerWorker": "4"}, Resources(3, 3, 1, 1.3333)),
    ],
)
def test_pods_hold_one_process_for_each_gpu(
    compute: dict[str, Any], resources: Resources, tmp_path: Path
) -> None:
    plan = planned(manifest(tmp_path, compute=compute))
    assert pods_resources(plan.compute, {}) == resources


def test_an_attempt_with_fewer_workers_waits_for_no_others(tmp_path: Path) -> None:
    compute = {"workers": 4, "minWorkers": 2, "cpusPerWorker": "2"}
    plan = planned(manifest(tmp_path, compute=compute))
    assert pods_resources(plan.compute, {WORKERS_VARIABLE: "3"}) == Resources(3, 2, 0, 2.0)


# ---- on Ray -----------------------------------------------------------------------------------


OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
"""Without these settings other processes cannot connect to the cluster of ray.init."""


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster in a process of its own, like the head pod's; it ends with the test."""
    script = (
        "import ray, sys\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **OPEN},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdin
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StatusServer]:
    (tmp_path / "tls").mkdir()
    with serving(tmp_path / "tls") as server:
        yield server


def environment(folder: Path, server: StatusServer, address: str) -> dict[str, str]:
    (folder / "token").write_text("secret")
    return {
        **OPEN,
        "RAY_ADDRESS": address,
        "TUNEYARD_PROGRESS_URL": server.url,
        "TUNEYARD_TOKEN_FILE": str(folder / "token"),
        "TUNEYARD_CA": server.ca,
        "TMPDIR": str(folder),
    }


def pictures(server: StatusServer) -> list[dict[str, Any]]:
    return [value["tuneyard"] for value in server.posts]


def wait_until(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.1)


def steps_told(server: StatusServer) -> int:
    return max((p.get("step", 0) for p in pictures(server) if p.get("stage") == "sft"), default=0)


LONG = {"maxSteps": 50_000, "batchSize": 2, "learningRate": 1e-4, "checkpointSteps": 20}
"""Minutes of training: fast cores do 2,000 such steps between two posts."""


@pytest.mark.slow
def test_sigterm_while_the_workers_start_is_an_interruption_with_an_outcome(
    tmp_path: Path, tiny_model_dir: Path, server: StatusServer, ray_address: str
) -> None:
    write_data(tmp_path)
    env = environment(tmp_path, server, ray_address)
    process = launched(tmp_path, cluster_plan(tmp_path, tiny_model_dir, training=LONG), env)
    assert process.stdout
    for line in process.stdout:
        if "event=ray-connected" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 3, err
    found = last_words(err)
    assert (found.failure and found.failure.reason) == "Preempted"
    assert pictures(server)[-1]["outcome"]["failure"]["reason"] == "Preempted"
    wait_for_no_workers()


@pytest.mark.slow
def test_an_attempt_is_stopped_superseded_drained_and_in_the_end_succeeds(
    tmp_path: Path, tiny_model_dir: Path, server: StatusServer, ray_address: str
) -> None:
    """One job through five attempts on one cluster, which costs a minute to start."""
    write_data(tmp_path)
    env = environment(tmp_path, server, ray_address)
    long = cluster_plan(tmp_path, tiny_model_dir, training=LONG | {"evaluationSteps": 25_000})

    # The operator's answer stops it: a checkpoint, exit 3.
    process = launched(tmp_path, long, env, attempt=1)
    wait_until(process, lambda: steps_told(server) > 0)
    server.reply = Reply(stop=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err
    assert last_words(err).state == "Interrupted"
    ended = pictures(server)[-1]["outcome"]["failure"]
    assert ended["reason"] == "Stopped"
    reached = int(ended["message"].rpartition(" ")[2])
    assert 0 < reached < LONG["maxSteps"]
    assert "event=stage-running stage=sft" in out
    assert (tmp_path / "out/stages/sft/checkpoints").is_dir()

    # The next attempt says where it took up. A 409 that is not the operator's own changes nothing;
    # then it is superseded, and its output is still its own: a checkpoint, exit 4.
    server.reply, server.posts = Reply(), []
    process = launched(tmp_path, long, env, attempt=2)
    wait_until(process, lambda: any("resumedStep" in p for p in pictures(server)))
    resumed = next(p["resumedStep"] for p in pictures(server) if "resumedStep" in p)
    assert resumed == reached
    server.reply, refused = Reply(409), len(server.posts) + 2
    wait_until(process, lambda: len(server.posts) >= refused)
    server.reply = SUPERSEDED
    out, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    outcome = last_words(err)
    assert outcome.failure
    assert (outcome.state, outcome.failure.reason) == ("Interrupted", "StaleAttempt")
    assert not [p for p in pictures(server) if p.get("outcome")]
    wait_for_no_workers()
    stopped = int(outcome.failure.message.rpartition(" ")[2])
    assert (tmp_path / f"out/stages/sft/checkpoints/step-{stopped:08d}").is_dir()

    # A pod's preStop hook: everybody checkpoints and leaves, and the hook returns after that. The
    # attempt goes on from the checkpoint that its killed predecessor left.
    steps = (tmp_path / "out/stages/sft/checkpoints").glob("step-????????")
    latest = max(int(folder.name.removeprefix("step-")) for folder in steps)
    server.reply, server.posts = Reply(), []
    process = launched(tmp_path, long, env, attempt=3)
    wait_until(process, lambda: steps_told(server) > latest)
    assert {p["resumedStep"] for p in pictures(server) if "resumedStep" in p} == {latest}
    assert drain.drain(tmp_path / "tuneyard-drain", seconds=60)
    out, err = process.communicate(timeout=300)
    (tmp_path / "tuneyard-drain" / drain.REQUEST).unlink()
    assert process.returncode == 3, err
    assert pictures(server)[-1]["outcome"]["failure"]["reason"] == "Preempted"

    # Another plan of the same job begins anew with two workers, which train what one process does,
    # and succeeds; its result is told.
    server.posts = []
    short = cluster_plan(tmp_path, tiny_model_dir, workers=2, adapter={"lora": {}})
    process = launched(tmp_path, short, env, attempt=4)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert OUTCOME_PREFIX not in err
    last = pictures(server)[-1]
    assert server.posts[-1]["trainerStatus"]["progressPercentage"] == 100
    record = json.loads((tmp_path / "out/result/record.json").read_text())
    assert last["outcome"]["result"]["digest"] == record["digest"]
    assert last["outcome"]["result"]["metrics"]["validationLoss"] > 0
    states = {stage["name"]: stage["state"] for stage in last["stages"]}
    assert states == {
        "prepare": "Skipped",
        "sft": "Succeeded",
        "evaluate": "Succeeded",
        "export": "Succeeded",
    }
    trained = json.loads((tmp_path / "out/stages/sft/record.json").read_text())
    assert (trained["attempt"], trained["metrics"]["steps"]) == (4, 9)
    assert json.loads((tmp_path / "out/owner.json").read_text())["attempt"] == 4
    for rank in (0, 1):
        log = (tmp_path / f"out/logs/attempt-4/worker-{rank}.log").read_text()
        assert f"worker {rank} of 2" in log
    one, cache = tmp_path / "one", tmp_path / "cache"
    torchrun.run(short, str(one), base_dir=tmp_path, cache_dir=cache, emit=lambda _: None)
    weights = "result/adapter/adapter_model.safetensors"
    two_workers = load_file(tmp_path / "out" / weights)
    for name, tensor in load_file(one / weights).items():
        torch.testing.assert_close(two_workers[name], tensor, atol=1e-5, rtol=1e-4)

    # Broken data: the row and the field to change, in the post and in the last line.
    server.posts = []
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"messages": [\n')
    process = launched(tmp_path, short, env, attempt=5)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    outcome = last_words(err)
    assert outcome.failure
    assert outcome.failure.reason == "InvalidData"
    assert "row 11" in outcome.failure.message
    assert not outcome.retryable
    last = pictures(server)[-1]
    assert last["outcome"]["failure"]["reason"] == "InvalidData"
    assert {s["state"] for s in last["stages"] if s["name"] == "prepare"} == {"Failed"}
    assert "Traceback" not in out
    assert "row 11: not JSON" in (tmp_path / "out/logs/attempt-5/worker-0.log").read_text()


def wait_for_no_workers() -> None:
    """Ray ends the workers of a driver that has exited."""
    deadline = time.monotonic() + 60
    while any("RayTrainWorker" in name for name in names()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def names() -> Iterator[str]:
    ours = psutil.Process().children(recursive=True)
    for process in ours:
        try:
            yield " ".join(process.cmdline())
        except psutil.Error:
            continue
