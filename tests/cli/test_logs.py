"""`tuneyard logs`: attempts, lost connections and kept logs; a real pod's log too."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.cli.cluster_jobs import CRDS, FAILED, RUNNING, SUCCEEDED, JobNamespace, attempt, item
from tuneyard.cli import jobs, kept_logs, logs, main
from tuneyard.cli.errors import RemoteError, UnreachableError
from tuneyard.cli.jobs import KINDS, JobView, Pod
from tuneyard.cli.logs import Reader

if TYPE_CHECKING:
    from rig.plugin import Cluster


def job(status: dict[str, Any], output: str = "pvc://models/team/one") -> JobView:
    changes = {"spec__output": {"uri": output}}
    return jobs.read_job(KINDS["finetune"], item("FineTuneJob", "one", status, **changes))


def pod(name: str, number: int = 1, role: str = "driver", *, running: bool = False) -> Pod:
    return Pod(name, name, number, role, "c", name, started=True, running=running, start_problem="")


def lines(first: int, last: int) -> list[tuple[str, str]]:
    return [(f"2026-11-21T00:00:{n:02}.000000000Z", f"line {n}") for n in range(first, last + 1)]


class Snapshot:
    """The state of a cluster between two polls."""

    def __init__(
        self,
        status: dict[str, Any],
        pods: Sequence[Pod],
        log: dict[str, Any] | None = None,
        output: str = "pvc://models/team/one",
    ) -> None:
        self.job, self.pods, self.log = job(status, output), list(pods), log or {}


class FakeCluster:
    """A cluster that moves to the next snapshot with each `refresh`; the last one stays."""

    def __init__(self, *snapshots: Snapshot) -> None:
        self.snapshots = list(snapshots)
        self.requests: list[tuple[str, str | None]] = []

    @property
    def now(self) -> Snapshot:
        return self.snapshots[0]

    def refresh(self, _: JobView) -> JobView | None:
        if len(self.snapshots) > 1:
            self.snapshots.pop(0)
        return self.now.job

    def pods(self, _: JobView) -> list[Pod]:
        return self.now.pods

    def log(
        self, _: JobView, pod: Pod, *, follow: bool, since: str | None
    ) -> Iterator[tuple[str, str]]:
        self.requests.append((pod.name, since if follow else "once"))
        parts = self.now.log[pod.name]
        part = parts.pop(0) if parts and isinstance(parts[0], list | Exception) else parts
        if isinstance(part, Exception):
            raise part
        yield from part


def reader(
    cluster: FakeCluster, role: str = "driver", number: int | None = None
) -> tuple[Reader, list[str], list[str]]:
    written: list[str] = []
    notes: list[str] = []
    return (
        Reader(cast("Any", cluster), role, number, write=written.append, note=notes.append),
        written,
        notes,
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.02)


def test_the_log_of_the_newest_driver_is_shown() -> None:
    pods = [pod("a", 1), pod("b", 2), pod("c", 2), pod("w", 3, "worker")]
    cluster = FakeCluster(Snapshot(RUNNING, pods, {"c": lines(1, 2)}))
    shown, written, _ = reader(cluster)
    shown.show(cluster.now.job)
    assert written == ["line 1", "line 2"]


def test_lines_of_workers_begin_with_the_names_of_their_pods() -> None:
    pods = [pod("w1", 1, "worker"), pod("w2", 1, "worker"), pod("d")]
    cluster = FakeCluster(Snapshot(RUNNING, pods, {"w1": lines(1, 1), "w2": lines(2, 2)}))
    shown, written, _ = reader(cluster, "worker")
    shown.show(cluster.now.job)
    assert written == ["w1: line 1", "w2: line 2"]


def test_following_continues_with_the_next_attempt_and_ends_with_the_job() -> None:
    first = Snapshot(RUNNING, [pod("a", 1)], {"a": lines(1, 2)})
    second = Snapshot(RUNNING, [pod("b", 2)], {"b": lines(3, 3)})
    cluster = FakeCluster(first, Snapshot(RUNNING, []), second, Snapshot(SUCCEEDED, []))
    shown, written, notes = reader(cluster)
    shown.follow(cluster.now.job)
    assert written == ["line 1", "line 2", "line 3"]
    assert [note for note in notes if note.startswith("attempt")] == [
        "attempt 1, pod a",
        "attempt 2, pod b",
    ]


def test_after_a_lost_connection_no_line_is_missing_or_repeated() -> None:
    running = pod("a", running=True)
    parts = [lines(1, 3), UnreachableError("gone"), lines(3, 5)]
    cluster = FakeCluster(
        Snapshot(RUNNING, [running], {"a": parts}), Snapshot(FAILED, [pod("a")], {"a": []})
    )
    cluster.refresh = lambda _: cluster.now.job  # type: ignore[method-assign]
    shown, written, _ = reader(cluster)

    def end(text: str) -> None:
        written.append(text)
        if text == "line 5":
            cluster.snapshots.pop(0)

    shown._write = end
    shown.follow(cluster.now.job)
    assert written == [f"line {number}" for number in range(1, 6)]
    assert cluster.requests[1] == ("a", lines(3, 3)[0][0])


def test_an_unreachable_api_server_does_not_end_following() -> None:
    cluster = FakeCluster(
        Snapshot(RUNNING, [pod("a", 1)], {"a": lines(1, 1)}),
        Snapshot(RUNNING, []),
        Snapshot(RUNNING, [pod("b", 2)], {"b": lines(2, 2)}),
        Snapshot(SUCCEEDED, []),
    )
    refresh, unreachable = cluster.refresh, iter([False, True, True, False, False])

    def sometimes(job: JobView) -> JobView | None:
        if next(unreachable, False):
            raise UnreachableError("gone")
        return refresh(job)

    cluster.refresh = sometimes  # type: ignore[method-assign]
    shown, written, _ = reader(cluster)
    shown.follow(cluster.now.job)
    assert written == ["line 1", "line 2"]


def test_one_attempt_is_followed_until_it_ends() -> None:
    ended = {**RUNNING, "attempts": [attempt(1, 9, 8, reason="WorkerDied"), attempt(2, 7)]}
    cluster = FakeCluster(Snapshot(ended, [pod("a", 1), pod("b", 2)], {"a": lines(1, 1)}))
    shown, written, _ = reader(cluster, number=1)
    shown.follow(cluster.now.job)
    assert written == ["line 1"]


def test_following_a_job_without_pods_prints_why_it_ended() -> None:
    cluster = FakeCluster(Snapshot(FAILED, []))
    shown, written, _ = reader(cluster)
    with pytest.raises(RemoteError, match="attempt 1: OutOfMemory"):
        shown.follow(cluster.now.job)
    assert written == []


def test_an_error_while_reading_ends_following() -> None:
    log = {"a": [RemoteError("permission denied")]}
    cluster = FakeCluster(Snapshot(RUNNING, [pod("a")], log))
    shown, _, _ = reader(cluster)
    with pytest.raises(RemoteError, match="permission denied"):
        shown.follow(cluster.now.job)


# ---- kept logs ----------------------------------------------------------------------------------

ENDED = {**SUCCEEDED, "attempts": [attempt(1, 9, 8, reason="WorkerDied"), attempt(2, 7, 5)]}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output with logs of two attempts, the second of which had eleven workers."""
    for number, name, text in (
        (1, "driver", "d1"),
        (1, "worker-0", "w1"),
        (2, "driver", "d2\nend"),
        *((2, f"worker-{rank}", f"of {rank}") for rank in range(11)),
    ):
        file = tmp_path / f"out/logs/attempt-{number}/{name}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return tmp_path / "out"


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize(
    ("role", "number", "folder", "expected"),
    [
        ("driver", None, 2, ["d2", "end"]),
        ("driver", 1, 1, ["d1"]),
        ("worker", None, 2, [f"worker-{rank}: of {rank}" for rank in range(11)]),
        ("worker", 1, 1, ["worker-0: w1"]),
    ],
)
def test_after_the_pods_are_gone_the_log_comes_from_the_output(
    output: Path, role: str, number: int | None, folder: int, expected: list[str], *, follow: bool
) -> None:
    cluster = FakeCluster(Snapshot(ENDED, [], output=f"file://{output}"))
    shown, written, notes = reader(cluster, role, number)
    if follow:
        shown.follow(cluster.now.job)
    else:
        shown.show(cluster.now.job)
    assert written == expected
    assert notes == [f"from file://{output}/logs/attempt-{folder}"]


def test_an_earlier_attempt_is_read_while_the_pods_of_the_newest_run(output: Path) -> None:
    running = {**RUNNING, "attempts": [attempt(1, 9, 8, reason="WorkerDied"), attempt(2, 7)]}
    pods = [pod("b", 2, running=True)]
    cluster = FakeCluster(Snapshot(running, pods, {"b": lines(1, 1)}, f"file://{output}"))
    for number, expected in ((1, ["d1"]), (2, ["line 1"])):
        shown, written, _ = reader(cluster, number=number)
        shown.show(cluster.now.job)
        assert written == expected
    shown, written, _ = reader(cluster)
    shown.show_kept(cluster.now.job)
    assert written == ["d2", "end"]


def test_a_log_that_was_not_kept_names_the_attempts_with_logs_and_the_outcomes(
    output: Path,
) -> None:
    status = {**ENDED, "attempts": [*ENDED["attempts"], attempt(3, 4, 3, reason="WorkerDied")]}
    cluster = FakeCluster(Snapshot(status, [], output=f"file://{output}"))
    with pytest.raises(RemoteError) as failure:
        reader(cluster, number=3)[0].show(cluster.now.job)
    assert "holds no log of the driver of attempt 3 of one" in failure.value.message
    assert "choose --attempt 1 or 2" in failure.value.message
    assert "attempt 3: WorkerDied" in failure.value.message


@pytest.mark.parametrize(
    ("uri", "words"),
    [("nosuch://bucket/out", "Protocol not known"), ("file:///absent/out", "holds no log")],
)
def test_an_output_that_cannot_be_read_is_an_error_with_the_location(uri: str, words: str) -> None:
    cluster = FakeCluster(Snapshot(ENDED, [], output=uri))
    with pytest.raises(RemoteError) as failure:
        reader(cluster)[0].show(cluster.now.job)
    assert words in failure.value.message
    assert f"{uri}/logs" in failure.value.message


def test_logs_are_read_one_after_the_other_and_one_that_is_gone_is_an_error(output: Path) -> None:
    """All logs of a job with hundreds of workers would be hundreds of MiB."""
    cluster = FakeCluster(Snapshot(ENDED, [], output=f"file://{output}"))
    _, read = kept_logs.read(cluster.now.job, "worker", None)
    assert next(read) == "worker-0: of 0"
    (output / "logs/attempt-2/worker-1.log").unlink()
    with pytest.raises(RemoteError, match=f"{output}/logs/attempt-2 cannot be read"):
        next(read)


DROPPED = {**SUCCEEDED, "attempts": [attempt(1, 9, 8, reason="WorkerDied"), attempt(7, 7, 5)]}
"""The status of a job whose attempts 2 to 6 were dropped, since a status lists a hundred."""


def test_an_attempt_is_found_by_its_number_after_others_were_dropped(output: Path) -> None:
    (output / "logs/attempt-2").rename(output / "logs/attempt-7")
    cluster = FakeCluster(Snapshot(DROPPED, [], output=f"file://{output}"))
    shown, written, _ = reader(cluster, number=7)
    shown.show(cluster.now.job)
    assert written == ["d2", "end"]
    with pytest.raises(RemoteError, match="no attempt 8: the last one is 7"):
        reader(cluster, number=8)[0].show(cluster.now.job)
    in_volume = FakeCluster(Snapshot(DROPPED, []))
    with pytest.raises(RemoteError, match=r"logs/attempt-7/driver\.log"):
        reader(in_volume)[0].show(in_volume.now.job)


@pytest.mark.parametrize("role", ["driver", "worker"])
def test_the_logs_in_a_volume_come_with_the_command_that_reads_them(
    output: Path, role: str
) -> None:
    cluster = FakeCluster(Snapshot(ENDED, [], output="pvc://models/team/one"))
    with pytest.raises(RemoteError) as failure:
        reader(cluster, role)[0].show(cluster.now.job)
    message = failure.value.message
    assert "pvc://models/team/one/logs/attempt-2/" in message
    words = shlex.split(next(line for line in message.splitlines() if line.startswith("kubectl")))
    assert words[:5] == ["kubectl", "run", "one-logs", "-n", "team-a"]
    overrides = words[-1].removeprefix("--overrides=")
    spec = json.loads(overrides)["spec"]
    assert spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    (container,) = spec["containers"]
    assert container["name"] == "one-logs"
    script = container["command"][2].replace("/output/team/one", str(output))
    printed = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True)
    assert ("d2\nend\n" if role == "driver" else "of 10\n") in printed.stdout


# ---- a real pod ---------------------------------------------------------------------------------

SCRIPT = """
import time
for number in range(5):
    print("line", number, flush=True)
    time.sleep(1)
print("x" * 40000)
"""


@pytest.mark.cluster
def test_a_real_pod_s_log_is_followed_to_its_end(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.define(CRDS)
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.5)
    namespace = JobNamespace(cluster, "default")
    namespace.create("logged", {**RUNNING, "attempts": [attempt(1, 2)]})
    cluster.kubectl("create", "-f", "-", input=json.dumps(driver_pod(cluster)))

    def end_job_after(pods: list[Pod]) -> list[Pod]:
        """Write the status a little later than the log ends, as the operator does."""
        if pods and pods[0].started and not pods[0].running:
            namespace.set_status("logged", SUCCEEDED)
        return pods

    pods = Reader._pods
    monkeypatch.setattr(Reader, "_pods", lambda self, job: end_job_after(pods(self, job)))
    try:
        assert main.call(["logs", "logged", "-f", "-n", "default"]) == 0
        followed = capsys.readouterr().out.splitlines()
        assert main.call(["logs", "logged", "-n", "default"]) == 0
        shown = capsys.readouterr().out.splitlines()
    finally:
        cluster.kubectl("delete", "pod/logged-1-x", "ftj/logged", "--grace-period=0", "--force")
    assert followed == shown == [*(f"line {number}" for number in range(5)), "x" * 40000]


def driver_pod(cluster: Cluster) -> dict[str, Any]:
    labels = {
        "tuneyard.io/kind": "FineTuneJob",
        "tuneyard.io/job": "logged",
        "tuneyard.io/attempt": "1",
    }
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "command": [sys.executable if cluster.rig else "python", "-c", SCRIPT],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "logged-1-x", "labels": labels},
        "spec": {"restartPolicy": "Never", "containers": [container]},
    }
