"""`tuneyard logs`: attempts and lost connections, each line once; a real pod's log too."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.cli.cluster_jobs import CRDS, FAILED, RUNNING, SUCCEEDED, JobNamespace, attempt, item
from tuneyard.cli import jobs, logs, main
from tuneyard.cli.errors import RemoteError, UnreachableError
from tuneyard.cli.jobs import KINDS, JobView, Pod
from tuneyard.cli.logs import Reader

if TYPE_CHECKING:
    from rig.plugin import Cluster


def job(status: dict[str, Any]) -> JobView:
    return jobs.read_job(KINDS["finetune"], item("FineTuneJob", "one", status))


def pod(name: str, number: int = 1, role: str = "driver", *, running: bool = False) -> Pod:
    return Pod(name, name, number, role, "c", name, started=True, running=running, start_problem="")


def lines(first: int, last: int) -> list[tuple[str, str]]:
    return [(f"2026-11-21T00:00:{n:02}.000000000Z", f"line {n}") for n in range(first, last + 1)]


class Snapshot:
    """The state of a cluster between two polls."""

    def __init__(
        self, status: dict[str, Any], pods: Sequence[Pod], log: dict[str, Any] | None = None
    ) -> None:
        self.job, self.pods, self.log = job(status), list(pods), log or {}


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
