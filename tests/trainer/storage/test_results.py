"""The cache of prepared data: damage, locks, kills, a full disk, and its limit."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuneyard.api.plan import StageRecord
from tuneyard.errors import StageError
from tuneyard_trainer.storage import results as module
from tuneyard_trainer.storage.digests import digest_of
from tuneyard_trainer.storage.results import Results, results_limit
from tuneyard_trainer.worker import Interrupted, Worker

FORK = multiprocessing.get_context("fork")
PLENTY = 1 << 40


class Job:
    """A job with a stage that writes two files: the second one is `size` bytes."""

    def __init__(self, folder: Path, *, limit: int = PLENTY, key: str = "key") -> None:
        self.results = Results(folder / "cache/results", limit)
        self.workdir = folder / "out" / os.urandom(4).hex()
        self.workdir.mkdir(parents=True)
        self.key, self.runs = key, 0
        self.messages: list[str] = []
        self.stop: Callable[[], bool] = lambda: False
        self.during: Callable[[], object] = lambda: None

    def run(self, size: int = 100) -> StageRecord:
        """Copy the output of another job, or write it and keep it. Return its record."""

        def report(**values: Any) -> None:
            self.messages.append(values["message"])

        worker = Worker(0, 1, torch.device("cpu"), report=report, stop=self.stop, stage="prepare")
        with self.results.held(self.key, worker) as entry:
            found = entry.copied_to(self.workdir) if entry else None
            if found is not None:
                return found
            record = self._prepare(size)
            if entry:
                entry.keep(self.workdir, record, os.listdir(self.workdir))
            return record

    def _prepare(self, size: int) -> StageRecord:
        self.runs += 1
        self.during()
        (self.workdir / "tokenizer").mkdir(exist_ok=True)
        (self.workdir / "tokenizer/tokenizer.json").write_text("{}")
        (self.workdir / "train.bin").write_bytes(bytes(size))
        return StageRecord(
            stage="prepare",
            kind="prepare",
            identity="sha256:identity",
            input_digests={},
            digest=digest_of(sorted(self.workdir.iterdir())),
            attempt=1,
            started_at="2026-01-01T00:00:00Z",
            finished_at="2026-01-01T00:00:01Z",
            metrics={"loss": float("nan")},
        )


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """The folder of the entry that one job has left."""
    Job(tmp_path).run()
    return tmp_path / "cache/results/key"


def entries(folder: Path) -> set[str]:
    """Return the folders of the cache; the files of locks are left out."""
    return {path.name for path in (folder / "cache/results").iterdir() if path.is_dir()}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---- reuse --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("entry")
def test_the_second_job_copies_the_files_and_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    job = Job(tmp_path)
    (job.workdir / ".spool").mkdir()
    (job.workdir / ".spool/half").write_text("of a killed run")
    record = job.run()
    assert (job.runs, job.messages) == (0, [])
    assert {path.name for path in job.workdir.iterdir()} == {"tokenizer", "train.bin"}
    assert digest_of(sorted(job.workdir.iterdir())) == record.digest


def test_a_changed_output_changes_neither_the_cache_nor_other_outputs(
    tmp_path: Path, entry: Path
) -> None:
    job = Job(tmp_path)
    job.run()
    flip_a_byte(job.workdir / "train.bin")
    assert (entry / "files/train.bin").read_bytes() == bytes(100)
    assert Job(tmp_path).run().digest == json.loads((entry / "record.json").read_text())["digest"]


def test_only_the_user_may_read_the_cache(tmp_path: Path, entry: Path) -> None:
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700


def test_another_key_is_another_entry(tmp_path: Path, entry: Path) -> None:
    job = Job(tmp_path, key="other")
    job.run()
    assert job.runs == 1
    assert entries(tmp_path) == {"key", "other"}


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip_a_byte(entry / "files/train.bin"),
        lambda entry: (entry / "files/train.bin").unlink(),
        lambda entry: (entry / "files/added").write_text(""),
        lambda entry: shutil.rmtree(entry / "files"),
        lambda entry: (entry / "record.json").unlink(),
        lambda entry: (entry / "record.json").write_text("{"),
        lambda entry: (entry / "record.json").write_text("{}"),
        lambda entry: (entry / "record.json").write_bytes(b"\xff"),
    ],
)
def test_a_damaged_entry_is_not_used_and_is_replaced(
    damage: Callable[[Path], object], tmp_path: Path, entry: Path
) -> None:
    damage(entry)
    job = Job(tmp_path)
    job.run()
    assert job.runs == 1
    assert job.messages == ["the data in the cache is damaged and is prepared again"]
    assert {path.name for path in job.workdir.iterdir()} == {"tokenizer", "train.bin"}
    third = Job(tmp_path)
    third.run()
    assert (third.runs, third.messages) == (0, [])


def test_an_output_on_a_full_disk_is_no_damage_of_the_cache(
    tmp_path: Path, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        Job(tmp_path).run()
    assert (entry / "record.json").exists()


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- storing ------------------------------------------------------------------------------------


def test_a_full_disk_does_not_fail_the_job_that_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfile", full)
        job.run()
    assert job.runs == 1
    assert ["is not kept" in message for message in job.messages] == [True]
    assert entries(tmp_path) == set(), "half of an entry must not stay"
    assert Job(tmp_path).run().digest == digest_of(sorted(job.workdir.iterdir()))


def test_a_job_that_is_killed_while_it_stores_harms_no_later_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def store_half() -> None:
        copy, copied = shutil.copyfile, 0

        def killed(source: Any, target: Any) -> None:
            nonlocal copied
            copy(source, target)
            copied += 1
            if copied == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        module.shutil.copyfile = killed  # type: ignore[attr-defined,assignment]
        Job(tmp_path).run()

    process = FORK.Process(target=store_half)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert entries(tmp_path) == {".key.partial"}
    job = Job(tmp_path)
    job.run()
    assert (job.runs, job.messages) == (1, [])
    assert entries(tmp_path) == {"key"}


def test_what_a_killed_job_left_is_removed_by_a_job_with_other_data(tmp_path: Path) -> None:
    left = tmp_path / "cache/results/.key.partial/files"
    left.mkdir(parents=True)
    (left / "half").write_bytes(bytes(1000))
    Job(tmp_path, key="other").run()
    assert entries(tmp_path) == {"other"}


def test_a_stop_while_it_stores_leaves_no_half_of_an_entry(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.during = lambda: setattr(job, "stop", None)  # the stop comes once the data is prepared
    asked = iter([False, True])
    job.stop = lambda: next(asked)
    with pytest.raises(Interrupted):
        job.run()
    assert entries(tmp_path) == set()


# ---- several jobs at once -----------------------------------------------------------------------


def test_of_two_jobs_that_begin_at_once_one_prepares(tmp_path: Path) -> None:
    barrier, runs = FORK.Barrier(2), FORK.Queue()

    def work() -> None:
        job = Job(tmp_path)
        job.during = lambda: time.sleep(0.5)
        barrier.wait()
        job.run()
        runs.put((job.runs, job.messages))

    processes = [FORK.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    found = sorted(runs.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    waited = "waiting for another job that prepares the same data"
    assert found == [(0, [waited]), (1, [])]


def test_a_job_that_waits_for_another_can_be_stopped(tmp_path: Path) -> None:
    first, second = Job(tmp_path), Job(tmp_path)
    begun, asked = threading.Event(), threading.Event()
    second.stop = asked.is_set

    def during() -> None:
        begun.set()
        assert asked.wait(60)

    first.during = during
    thread = threading.Thread(target=first.run)
    thread.start()
    assert begun.wait(60)
    threading.Timer(0.3, asked.set).start()
    with pytest.raises(Interrupted):
        second.run()
    thread.join()
    assert second.runs == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_each_job_prepares_its_own_data(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        job = Job(tmp_path)
        job.run()
        assert job.runs == 1
        [message] = job.messages
        assert "its file system has no locks" in message
    assert entries(tmp_path) == set()


def test_a_cache_that_cannot_be_written_to_stops_no_job(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    job = Job(tmp_path)
    job.run()
    assert job.runs == 1
    assert ["no data is shared" in message for message in job.messages] == [True]


# ---- the limit ----------------------------------------------------------------------------------


def test_the_entries_that_were_not_used_for_the_longest_time_make_room(tmp_path: Path) -> None:
    limit = 3500
    for age, key in ((30, "old"), (20, "used"), (10, "new")):
        Job(tmp_path, key=key, limit=limit).run(1000)
        moment = time.time() - age
        record = tmp_path / "cache/results" / key / "record.json"
        assert record.stat().st_size < 400
        os.utime(record, (moment, moment))
    Job(tmp_path, key="old", limit=limit).run(1000)  # now the newest
    Job(tmp_path, key="latest", limit=limit).run(1000)
    assert entries(tmp_path) == {"old", "latest"} | ({"new"} & entries(tmp_path))
    assert "used" not in entries(tmp_path)
