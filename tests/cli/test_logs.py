"""Logs: followed over attempts and broken connections, each line once; of a real pod too."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.played import CRDS, FAILED, RUNNING, SUCCEEDED, Played, attempt, item
from tuneyard.cli import jobs, logs, main
from tuneyard.cli.errors import RemoteError, UnreachableError
from tuneyard.cli.jobs import KINDS, Found, Pod
from tuneyard.cli.logs import Reader

if TYPE_CHECKING:
    from rig.plugin import Cluster


def job(status: dict[str, Any]) -> Found:
    return jobs.found(KINDS["finetune"], item("FineTuneJob", "one", status))


def pod(name: str, number: int = 1, role: str = "driver", *, running: bool = False) -> Pod:
    return Pod(name, name, number, role, "c", name, started=True, running=running, obstacle="")


def lines(first: int, last: int) -> list[tuple[str, str]]:
    return [(f"2026-11-21T00:00:{n:02}.000000000Z", f"line {n}") for n in range(first, last + 1)]


class Moment:
    """What a cluster says until somebody has waited."""

    def __init__(
        self, status: dict[str, Any], pods: Sequence[Pod], log: dict[str, Any] | None = None
    ) -> None:
        self.job, self.pods, self.log = job(status), list(pods), log or {}


class Story:
    """A cluster in moments; each `refresh` begins the next one, the last one stays."""

    def __init__(self, *moments: Moment) -> None:
        self.moments = list(moments)
        self.asked: list[tuple[str, str | None]] = []

    @property
    def now(self) -> Moment:
        return self.moments[0]

    def refresh(self, _: Found) -> Found | None:
        if len(self.moments) > 1:
            self.moments.pop(0)
        return self.now.job

    def pods(self, _: Found) -> list[Pod]:
        return self.now.pods

    def log(
        self, _: Found, pod: Pod, *, follow: bool, since: str | None
    ) -> Iterator[tuple[str, str]]:
        self.asked.append((pod.name, since if follow else "once"))
        parts = self.now.log[pod.name]
        part = parts.pop(0) if parts and isinstance(parts[0], list | Exception) else parts
        if isinstance(part, Exception):
            raise part
        yield from part


def reader(
    story: Story, role: str = "driver", number: int | None = None
) -> tuple[Reader, list[str], list[str]]:
    written: list[str] = []
    notes: list[str] = []
    cluster: Any = story
    return Reader(cluster, role, number, write=written.append, note=notes.append), written, notes


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.02)


def test_the_newest_attempt_s_last_driver_is_shown() -> None:
    pods = [pod("a", 1), pod("b", 2), pod("c", 2), pod("w", 3, "worker")]
    story = Story(Moment(RUNNING, pods, {"c": lines(1, 2)}))
    shown, written, _ = reader(story)
    shown.show(story.now.job)
    assert written == ["line 1", "line 2"]


def test_several_workers_lines_carry_their_pods_names() -> None:
    pods = [pod("w1", 1, "worker"), pod("w2", 1, "worker"), pod("d")]
    story = Story(Moment(RUNNING, pods, {"w1": lines(1, 1), "w2": lines(2, 2)}))
    shown, written, _ = reader(story, "worker")
    shown.show(story.now.job)
    assert written == ["w1: line 1", "w2: line 2"]


def test_following_goes_on_with_the_next_attempt_and_ends_with_the_job() -> None:
    first = Moment(RUNNING, [pod("a", 1)], {"a": lines(1, 2)})
    second = Moment(RUNNING, [pod("b", 2)], {"b": lines(3, 3)})
    story = Story(first, Moment(RUNNING, []), second, Moment(SUCCEEDED, []))
    shown, written, notes = reader(story)
    shown.follow(story.now.job)
    assert written == ["line 1", "line 2", "line 3"]
    assert [note for note in notes if note.startswith("attempt")] == [
        "attempt 1, pod a",
        "attempt 2, pod b",
    ]


def test_a_broken_connection_is_taken_up_without_a_line_twice_or_missing() -> None:
    running = pod("a", running=True)
    parts = [lines(1, 3), UnreachableError("gone"), lines(3, 5)]
    story = Story(Moment(RUNNING, [running], {"a": parts}), Moment(FAILED, [pod("a")], {"a": []}))
    story.refresh = lambda _: story.now.job  # type: ignore[method-assign]
    shown, written, _ = reader(story)

    def end(text: str) -> None:
        written.append(text)
        if text == "line 5":
            story.moments.pop(0)

    shown._write = end
    shown.follow(story.now.job)
    assert written == [f"line {number}" for number in range(1, 6)]
    assert story.asked[1] == ("a", lines(3, 3)[0][0])


def test_an_api_server_that_is_away_for_a_while_ends_no_following() -> None:
    story = Story(
        Moment(RUNNING, [pod("a", 1)], {"a": lines(1, 1)}),
        Moment(RUNNING, []),
        Moment(RUNNING, [pod("b", 2)], {"b": lines(2, 2)}),
        Moment(SUCCEEDED, []),
    )
    refresh, away = story.refresh, iter([False, True, True, False, False])

    def sometimes(job: Found) -> Found | None:
        if next(away, False):
            raise UnreachableError("gone")
        return refresh(job)

    story.refresh = sometimes  # type: ignore[method-assign]
    shown, written, _ = reader(story)
    shown.follow(story.now.job)
    assert written == ["line 1", "line 2"]


def test_one_attempt_is_followed_to_its_own_end_only() -> None:
    ended = {**RUNNING, "attempts": [attempt(1, 9, 8, reason="WorkerDied"), attempt(2, 7)]}
    story = Story(Moment(ended, [pod("a", 1), pod("b", 2)], {"a": lines(1, 1)}))
    shown, written, _ = reader(story, number=1)
    shown.follow(story.now.job)
    assert written == ["line 1"]


def test_following_a_job_whose_pods_are_gone_says_why_it_ended() -> None:
    story = Story(Moment(FAILED, []))
    shown, written, _ = reader(story)
    with pytest.raises(RemoteError, match="attempt 1: OutOfMemory"):
        shown.follow(story.now.job)
    assert written == []


def test_a_refusal_while_reading_ends_the_following() -> None:
    log = {"a": [RemoteError("you may not do that")]}
    story = Story(Moment(RUNNING, [pod("a")], log))
    shown, _, _ = reader(story)
    with pytest.raises(RemoteError, match="you may not"):
        shown.follow(story.now.job)


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
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.5)
    played = Played(cluster, "default")
    played.create("logged", {**RUNNING, "attempts": [attempt(1, 2)]})
    cluster.kubectl("create", "-f", "-", input=json.dumps(driver_pod(cluster)))

    def look(pods: list[Pod]) -> list[Pod]:
        """The operator sees the end a little later than the log's reader."""
        if pods and pods[0].started and not pods[0].running:
            played.set_status("logged", SUCCEEDED)
        return pods

    pods = Reader._pods
    monkeypatch.setattr(Reader, "_pods", lambda self, job: look(pods(self, job)))
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
