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
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
        self.on_message: Callable[[], object] = lambda: None

    def run(self, size: int = 100) -> StageRecord:
        """Copy the output of another job, or write it and keep it. Return its record."""

        def report(**values: Any) -> None:
            self.messages.append(values["message"])
            self.on_message()

        worker = Worker(0, 1, torch.device("cpu"), report=report, stop=self.stop, stage="prepare")
        with self.results.held(self.key, worker) as entry:
            found = entry.copied_to(self.workdir) if entry else None
            if found is not None:
                return found
            record = self._prepare(size)
            if entry:
                entry.keep(self.workdir, record, ("tokenizer", "train.bin"))
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
            details={"mean": float("nan")},
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


def test_only_the_user_may_read_an_entry_of_a_folder_that_others_may_read(tmp_path: Path) -> None:
    folder = tmp_path / "cache/results"
    folder.mkdir(parents=True, mode=0o755)
    Job(tmp_path).run()
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o700


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
        lambda entry: (entry / "record.json").write_bytes(b"[" * 100_000),
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


def test_an_output_that_cannot_be_written_to_is_no_damage_of_the_cache(
    tmp_path: Path, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(module.shutil, "copyfile", refused)
    with pytest.raises(PermissionError):
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
    [left] = entries(tmp_path)
    assert left.endswith(".partial")
    job = Job(tmp_path)
    job.run()
    assert (job.runs, job.messages) == (1, [])
    assert entries(tmp_path) == {"key"}


def test_what_a_killed_job_left_is_removed_by_a_job_with_other_data(tmp_path: Path) -> None:
    left = tmp_path / "cache/results/.key.0123abcd.partial/files"
    left.mkdir(parents=True)
    (left / "half").write_bytes(bytes(1000))
    Job(tmp_path, key="other").run()
    assert entries(tmp_path) == {"other"}


def test_a_stop_while_it_stores_leaves_no_half_of_an_entry(tmp_path: Path) -> None:
    job = Job(tmp_path)
    asked = iter([False, True])  # before its second file
    job.stop = lambda: next(asked)
    with pytest.raises(Interrupted):
        job.run()
    assert entries(tmp_path) == set()


# ---- several jobs at once -----------------------------------------------------------------------


def test_of_two_jobs_that_begin_at_once_one_prepares(tmp_path: Path) -> None:
    waiting, runs = FORK.Event(), FORK.Queue()

    def work() -> None:
        job = Job(tmp_path)
        job.during, job.on_message = partial(waiting.wait, 60), waiting.set
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
    begun, asked, ended = threading.Event(), threading.Event(), threading.Event()
    second.stop = asked.is_set

    def during() -> None:
        begun.set()
        assert ended.wait(20), "the second job did not end"

    first.during = during
    thread = threading.Thread(target=first.run)
    thread.start()
    assert begun.wait(60)
    second.on_message = asked.set
    with pytest.raises(Interrupted):
        second.run()
    ended.set()
    thread.join()
    assert second.runs == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_each_job_gets_its_data(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        job = Job(tmp_path)
        assert job.run().digest == digest_of(sorted(job.workdir.iterdir()))


def test_jobs_that_do_not_see_each_others_locks_keep_one_whole_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cache_lock", lambda *_: nullcontext())
    first, second = Job(tmp_path), Job(tmp_path)
    first.during = second.run
    first.run()
    assert (first.runs, second.runs) == (1, 1)
    assert (first.messages, second.messages) == ([], [])
    assert entries(tmp_path) == {"key"}
    third = Job(tmp_path)
    third.run()
    assert (third.runs, third.messages) == (0, [])


def test_an_entry_that_vanishes_during_its_copy_is_prepared(tmp_path: Path, entry: Path) -> None:
    job = Job(tmp_path)

    def vanish() -> bool:
        shutil.rmtree(entry, ignore_errors=True)
        return False

    job.stop = vanish
    assert job.run().digest == digest_of(sorted(job.workdir.iterdir()))
    assert job.runs == 1


def test_a_cache_that_cannot_be_written_to_stops_no_job(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    job = Job(tmp_path)
    job.run()
    assert job.runs == 1
    assert ["no data is shared" in message for message in job.messages] == [True]


# ---- the limit ----------------------------------------------------------------------------------


SIZE = 10_000
"""Bytes of an entry's larger file; the others have fewer than 1,000."""
THREE = 3 * SIZE + 5_000


def store(folder: Path, key: str, limit: int = THREE, *, age: int = 0) -> Job:
    """Run a job whose entry was last used `age` seconds ago."""
    job = Job(folder, key=key, limit=limit)
    job.run(SIZE)
    record = folder / "cache/results" / key / "record.json"
    if record.exists():
        moment = time.time() - age
        os.utime(record, (moment, moment))
    return job


def test_the_entry_that_was_not_used_for_the_longest_time_makes_room(tmp_path: Path) -> None:
    for age, key in ((30, "first"), (20, "second"), (10, "third")):
        store(tmp_path, key, age=age)
    user = Job(tmp_path, key="first")
    user.run()
    assert user.runs == 0
    store(tmp_path, "fourth")
    assert entries(tmp_path) == {"first", "third", "fourth"}


def test_an_entry_that_another_job_holds_stays(tmp_path: Path) -> None:
    for age, key in ((30, "first"), (20, "second"), (10, "third")):
        store(tmp_path, key, age=age)
    with (tmp_path / "cache/results/.first.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store(tmp_path, "fourth")
    assert entries(tmp_path) == {"first", "third", "fourth"}


def test_an_entry_that_another_job_is_storing_stays(tmp_path: Path) -> None:
    store(tmp_path, "first")
    stored = tmp_path / "cache/results/.other.0123abcd.partial/files"
    stored.mkdir(parents=True)
    (stored / "half").write_bytes(bytes(2 * SIZE))
    with (tmp_path / "cache/results/.other.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store(tmp_path, "second")
    assert entries(tmp_path) == {".other.0123abcd.partial", "second"}


def test_an_entry_that_vanishes_while_it_is_measured_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job removes it to make room too."""
    store(tmp_path, "first", age=10)
    files = Path.rglob

    def vanished(path: Path, pattern: str) -> Any:
        if path.name == "first":
            shutil.rmtree(path, ignore_errors=True)
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return files(path, pattern)

    monkeypatch.setattr(Path, "rglob", vanished)
    job = store(tmp_path, "second")
    assert job.messages == []
    assert entries(tmp_path) == {"second"}


def test_an_incomplete_entry_goes_first(tmp_path: Path) -> None:
    for age, key in ((30, "first"), (20, "second"), (10, "third")):
        store(tmp_path, key, age=age)
    (tmp_path / "cache/results/third/record.json").unlink()
    store(tmp_path, "fourth")
    assert entries(tmp_path) == {"first", "second", "fourth"}


def test_data_larger_than_the_limit_is_not_kept_and_removes_nothing(tmp_path: Path) -> None:
    store(tmp_path, "small")
    job = store(tmp_path, "large", limit=SIZE)
    assert job.runs == 1
    assert ["TUNEYARD_CACHE_RESULTS" in message for message in job.messages] == [True]
    assert entries(tmp_path) == {"small"}


def test_the_entries_take_a_quarter_of_the_free_space_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free space and entries are 100,000 bytes, and two entries fit into 25,000."""

    def usage(folder: Path) -> SimpleNamespace:
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return SimpleNamespace(free=100_000 - held)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    for age, key in ((30, "first"), (20, "second"), (10, "third")):
        store(tmp_path, key, PLENTY, age=age)
    assert entries(tmp_path) == {"second", "third"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, 20 << 30),
        ("", 20 << 30),
        ("0", 0),
        ("500M", 500_000_000),
        ("1.5Gi", 3 << 29),
        ("9" * 400, sys.maxsize),
    ],  # more than a float holds
)
def test_the_limit_is_a_quantity(text: str | None, size: int) -> None:
    assert results_limit({} if text is None else {"TUNEYARD_CACHE_RESULTS": text}) == size


@pytest.mark.parametrize("text", ["20GB", "-1", "all", "20Gi\n", "1e9"])
def test_a_limit_that_is_no_quantity_is_named_with_a_remedy(text: str) -> None:
    with pytest.raises(StageError) as caught:
        results_limit({"TUNEYARD_CACHE_RESULTS": text})
    assert caught.value.reason == "CacheUnusable"
    assert repr(text) in caught.value.message
    assert "20Gi" in caught.value.advice
