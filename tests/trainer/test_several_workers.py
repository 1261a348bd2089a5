"""The workers of tests: a test fails if one of them does, and none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from tests.trainer.several_workers import Notes, spawn

ENOUGH = 60.0
"""Seconds within which processes start on a busy machine."""


def _fail(rank: int, notes: Notes, how: str) -> None:
    notes[rank] = os.getpid()
    dist.barrier()
    if how == "exit":
        sys.exit(0)
    if how == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise" and rank == 1:
        raise ValueError("a worker's own error")


def _sleep(rank: int, notes: Notes, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()), encoding="utf-8")
    while True:
        time.sleep(1)


def test_workers_that_end_without_an_error_before_their_work_is_done_fail_a_test() -> None:
    with pytest.raises(RuntimeError, match=r"workers \[0, 1\] ended before their work was done"):
        spawn(2, _fail, "exit")


def test_a_test_fails_with_the_error_of_its_worker() -> None:
    with pytest.raises(ProcessRaisedException, match="a worker's own error"):
        spawn(2, _fail, "raise")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(2, _fail, "kill")
    assert set(spawn(2, _fail, "not at all")) == {0, 1}


def test_a_test_that_is_interrupted_leaves_no_worker(tmp_path: Path) -> None:
    class TookTooLongError(Exception):
        pass

    def interrupt(*_: object) -> NoReturn:
        raise TookTooLongError

    before = signal.signal(signal.SIGUSR1, interrupt)
    script = (
        "import os, pathlib, signal, sys, time\n"
        "while len(list(pathlib.Path(sys.argv[1]).iterdir())) < 2: time.sleep(0.1)\n"
        "os.kill(int(sys.argv[2]), signal.SIGUSR1)\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path), str(os.getpid())]
    try:
        with subprocess.Popen(arguments), pytest.raises(TookTooLongError):
            spawn(2, _sleep, tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    pids = [int((tmp_path / str(rank)).read_text(encoding="utf-8")) for rank in range(2)]
    assert not any(map(_runs, pids))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_tests_that_are_killed_leave_no_process(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from tests.trainer import several_workers, test_several_workers\n"
        "several_workers.multiprocessing.set_forkserver_preload([])\n"  # saves 10 s
        "several_workers.spawn(2, test_several_workers._sleep, pathlib.Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    tests = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=environment)
    until = time.monotonic() + ENOUGH
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < until
        assert tests.poll() is None
        time.sleep(0.1)
    left = psutil.Process(tests.pid).children(recursive=True)
    assert len(left) >= 4, "two workers, their server and the notes"
    tests.kill()
    tests.wait()
    _, unreaped = psutil.wait_procs(left, timeout=20)  # not every container's init reaps
    alive = [process for process in unreaped if _runs(process.pid)]
    for process in alive:
        process.kill()
    assert not alive
