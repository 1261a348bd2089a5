"""The ranks of one machine as processes: their GPUs, and the end of one that fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tuneyard_trainer.running import processes
from tuneyard_trainer.running.group import Resources


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [(None, 1, ["0", "1"]), ("2,5,7", 1, ["2", "5"]), (None, 0, ["", ""]), ("2,5", 0, ["", ""])],
)
def test_each_rank_sees_its_own_gpu_only(
    visible: str | None, gpus: int, expected: list[str]
) -> None:
    found = processes._gpus(visible, Resources(2, 2, gpus, 1.0))
    assert found == expected


def started(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "worker 1 was ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "worker 1 was ended by SIGKILL"),
    ],
)
def test_a_failed_rank_ends_the_others_and_is_named(
    code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOST_SECONDS", 0.1)
    ranks = [started("import time; time.sleep(600)"), started(code)]
    with pytest.raises(ChildProcessError, match=message):
        processes._wait(ranks)
    assert all(rank.poll() is not None for rank in ranks)


def test_ranks_that_end_well_are_waited_for() -> None:
    ranks = [started("import time; time.sleep(0.5)"), started("")]
    processes._wait(ranks)
    assert [rank.poll() for rank in ranks] == [0, 0]
