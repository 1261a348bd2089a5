"""The preStop hook asks the processes of its pod to end and waits for them, and for no others."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tuneyard.api.pods import DRAIN_SECONDS, GRACE_SECONDS
from tuneyard_trainer import drain


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "LOOK_SECONDS", 0.05)


def test_a_pod_without_processes_ends_at_once(tmp_path: Path) -> None:
    assert drain.drain(tmp_path / "drain", seconds=0)


def test_the_hook_asks_and_waits_until_the_work_has_ended(tmp_path: Path) -> None:
    asked, done, order = threading.Event(), threading.Event(), []

    def work() -> None:
        with drain.present(tmp_path, asked.set):
            done.set()
            asked.wait(20)
            order.append("checkpoint")

    thread = threading.Thread(target=work)
    thread.start()
    done.wait(20)
    assert drain.drain(tmp_path, seconds=20)
    order.append("drained")
    thread.join()
    assert order == ["checkpoint", "drained"]


def test_the_hook_gives_up_before_the_pods_grace_is_over(tmp_path: Path) -> None:
    with drain.present(tmp_path, lambda: None):
        assert not drain.drain(tmp_path, seconds=0.2)
    assert DRAIN_SECONDS < GRACE_SECONDS


def test_a_killed_process_is_not_waited_for(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    (tmp_path / str(gone.pid)).touch()
    assert drain.drain(tmp_path, seconds=0)


def test_a_process_is_asked_once_and_only_if_the_hook_runs(tmp_path: Path) -> None:
    calls: list[int] = []
    with drain.present(tmp_path, lambda: calls.append(1)):
        assert not drain.drain(tmp_path, seconds=0.4)
    assert calls == [1]
    (tmp_path / "asked").unlink()
    with drain.present(tmp_path, lambda: calls.append(2)):
        threading.Event().wait(0.2)
    assert calls == [1]
