"""The preStop hook: it requests an end and waits for the registered processes only."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tuneyard.api.pods import DRAIN_SECONDS, GRACE_SECONDS
from tuneyard_trainer import drain


@pytest.fixture(autouse=True)
def _poll_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "POLL_SECONDS", 0.05)


def test_the_hook_returns_at_once_in_a_pod_without_work(tmp_path: Path) -> None:
    assert drain.drain(tmp_path / "drain", seconds=0)


def test_the_hook_requests_an_end_and_waits_until_the_work_has_ended(tmp_path: Path) -> None:
    requested, started, order = threading.Event(), threading.Event(), []

    def work() -> None:
        with drain.registered(tmp_path, requested.set):
            started.set()
            requested.wait(20)
            order.append("checkpoint")

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(20)
    assert drain.drain(tmp_path, seconds=20)
    order.append("drained")
    thread.join()
    assert order == ["checkpoint", "drained"]


def test_the_hook_gives_up_before_the_pods_grace_period_ends(tmp_path: Path) -> None:
    with drain.registered(tmp_path, lambda: None):
        assert not drain.drain(tmp_path, seconds=0.2)
    assert DRAIN_SECONDS < GRACE_SECONDS


def test_the_hook_does_not_wait_for_a_killed_process(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    (tmp_path / str(ended.pid)).touch()
    assert drain.drain(tmp_path, seconds=0)


def test_the_hook_does_not_wait_for_a_killed_process_that_its_parent_never_reaps(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    (tmp_path / str(ended.pid)).touch()
    assert drain.drain(tmp_path, seconds=0)
    ended.wait()


def test_a_process_gets_one_request_and_none_without_a_hook(tmp_path: Path) -> None:
    calls: list[int] = []
    with drain.registered(tmp_path, lambda: calls.append(1)):
        assert not drain.drain(tmp_path, seconds=0.4)
    assert calls == [1]
    (tmp_path / drain.REQUEST).unlink()
    with drain.registered(tmp_path, lambda: calls.append(2)):
        threading.Event().wait(0.2)
    assert calls == [1]
