"""The helper process: what a process wrote is in the output, whatever ended it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.s3 import S3Server

from tuneyard.api.plan import JobRef
from tuneyard.errors import StageError
from tuneyard_trainer.logs import keeper as keeper_module
from tuneyard_trainer.logs.keep import LogPlace, kept
from tuneyard_trainer.logs.keeper import Keeper
from tuneyard_trainer.logs.redaction import Redactor
from tuneyard_trainer.storage.records import KEPT_ATTEMPTS, Store

JOB = JobRef(kind="FineTuneJob", name="support-bot")
UID = "uid-1"
SECRET = "s3cr3t-value"


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that attempt 1 has claimed."""
    uri = str(tmp_path / "out")
    if request.param == "memory":
        uri = f"memory://bucket-{uuid.uuid4().hex}/out"
    elif request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        uri = f"s3://{s3.bucket}/{uuid.uuid4().hex}/out"
    store = Store(uri, tmp_path / "scratch", UID)
    store.claim(JOB, 1)
    return store


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "process.log"
    path.touch()
    return path


def keeping(store: Store, file: Path, attempt: int = 1, name: str = "driver") -> Keeper:
    return Keeper(store, name, attempt, [file], Redactor({"MY_TOKEN": SECRET}))


def write(file: Path, text: str) -> None:
    with file.open("a") as stream:
        stream.write(text)


def test_the_log_is_kept_line_by_line_and_at_the_end_whole(store: Store, file: Path) -> None:
    keeper = keeping(store, file)
    write(file, "first\nsec")
    keeper.read()
    assert keeper.save()
    assert store.log("driver", 1) == b"first\n"
    write(file, "ond\nthird")
    keeper.end()
    assert store.log("driver", 1) == b"first\nsecond\nthird\n"


def test_a_secret_that_is_split_between_two_writes_is_never_kept(store: Store, file: Path) -> None:
    text = f"key {SECRET} \x1b[1m{SECRET[:4]}\x1b[0m{SECRET[4:]}.\n"
    keeper, contents = keeping(store, file), []
    for character in text:
        write(file, character)
        keeper.read()
        keeper.save()
        contents.append(store.log("driver", 1))
    write(file, f"last {SECRET[:-1]}")
    keeper.end()
    contents.append(store.log("driver", 1))
    assert set(contents[:-1]) == {b"", b"key [redacted] [redacted].\n"}
    assert contents[-1] == b"key [redacted] [redacted].\nlast [redacted]\n"


def test_control_characters_and_ray_s_own_marks_are_left_out(store: Store, file: Path) -> None:
    write(file, ":job_id:01\n:actor_name:RayTrainWorker\n\x1b[33mred\x1b[0m\x07\n")
    keeping(store, file).end()
    assert store.log("driver", 1) == b"red\n"


def test_an_attempt_writes_neither_the_log_of_a_newer_one_nor_its_own_any_more(
    store: Store, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(file, "of the old one\n")
    old = keeping(store, file)
    old.read()
    newer = Store(store.uri, tmp_path / "newer", UID)
    newer.claim(JOB, 2)
    new_file = tmp_path / "new.log"
    new_file.write_text("of the new one\n")
    keeping(newer, new_file, attempt=2).end()
    old.end()
    assert old.is_stale
    assert (store.log("driver", 1), store.log("driver", 2)) == (b"", b"of the new one\n")
    assert capsys.readouterr().out == ""  # the driver itself reports that it is stale


def test_no_log_comes_back_after_the_output_was_erased(store: Store, file: Path) -> None:
    keeper = keeping(store, file)
    write(file, "one\n")
    keeper.read()
    keeper.save()
    assert store.erase(JOB)
    write(file, "two\n")
    keeper.end()
    assert keeper.is_stale
    assert store.log("driver", 1) == b""
    if store.is_local:
        assert not Path(store.uri).exists()


def test_a_new_job_of_the_same_name_begins_without_the_logs_of_the_former(
    store: Store, file: Path, tmp_path: Path
) -> None:
    write(file, "of the former job\n")
    keeping(store, file).end()
    store.claim(JOB, 2)
    assert store.log("driver", 1)  # another attempt of the same job keeps them
    Store(store.uri, tmp_path / "other", "uid-2").claim(JOB, 1)
    assert store.log("driver", 1) == b""


def test_logs_of_the_newest_attempts_are_kept(store: Store) -> None:
    last = KEPT_ATTEMPTS + 3
    for attempt in range(1, last + 1):
        store.claim(JOB, attempt)
        store.write_log("driver", b"x\n", attempt)
    store.remove_old_logs(last)
    present = [attempt for attempt in range(1, last + 1) if store.log("driver", attempt)]
    assert present == list(range(4, last + 1))


def test_a_second_process_of_an_attempt_continues_the_log(store: Store, tmp_path: Path) -> None:
    for text in ("first run\n", "second run\n"):
        file = tmp_path / f"{text}.log"
        file.write_text(text)
        keeping(store, file).end()
    assert store.log("driver", 1) == b"first run\nsecond run\n"


def failing(store: Store, monkeypatch: pytest.MonkeyPatch, errors: list[Exception | None]) -> None:
    """Let the next writes of logs fail with these errors; None: the write works."""
    original = Store.write_log

    def write_log(self: Store, *arguments: Any) -> None:
        error = errors.pop(0) if errors else None
        if error is not None:
            raise error
        original(self, *arguments)

    monkeypatch.setattr(Store, "write_log", write_log)


def test_a_store_that_fails_for_a_while_is_reported_once_and_loses_nothing(
    store: Store,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(keeper_module, "END_SECONDS", 0.0)
    full = StageError("DiskFull", f"no space left for {SECRET}.")
    failing(store, monkeypatch, [full, OSError("cannot reach the store"), full, None])
    keeper = keeping(store, file)
    for line in ("one\n", "two\n"):
        write(file, line)
        keeper.read()
        assert not keeper.save()
    write(file, "three\n")
    keeper.end()
    assert store.log("driver", 1) == b"one\ntwo\nthree\n"
    out = capsys.readouterr().out
    assert out.count("the log cannot be kept") == 1
    assert f"{store.uri}/logs/attempt-1/driver.log" in out
    assert "training goes on" in out
    assert SECRET not in out


# ---- as a process -------------------------------------------------------------------------------

SCRIPT = """
import faulthandler, os, signal, sys, time
from pathlib import Path
from tuneyard_trainer.logs.keep import LogPlace, kept, own_files
faulthandler.enable()
how, output, marks = sys.argv[1:]
place = LogPlace(output, 1, "uid-1", drain=marks + "/drain")
with kept(place, "worker-0", own_files(), warn=print):
    print("on standard output", flush=True)
    print("on standard error", file=sys.stderr, flush=True)
    Path(marks, "ready").touch()
    if how == "error":
        raise ValueError("a defect")
    if how == "crash":
        faulthandler._sigsegv()
    if how == "hang":
        time.sleep(600)
    print("the secret is " + os.environ["MY_TOKEN"], flush=True)
"""


def launched(how: str, output: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to files, as Ray starts a worker."""
    with (folder / "out.log").open("w") as out, (folder / "err.log").open("w") as err:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, how, str(output), str(folder)],
            env={**os.environ, "MY_TOKEN": SECRET},
            stdout=out,
            stderr=err,
        )


@pytest.fixture
def output(tmp_path: Path) -> Path:
    Store(str(tmp_path / "out"), tmp_path, UID).claim(JOB, 1)
    return tmp_path / "out"


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_log_of_a_process_is_complete_when_it_ends(output: Path, tmp_path: Path) -> None:
    assert launched("well", output, tmp_path).wait(120) == 0
    text = (output / "logs/attempt-1/worker-0.log").read_text()
    assert sorted(text.splitlines()) == [
        "on standard error",
        "on standard output",
        "the secret is [redacted]",
    ]
    assert SECRET in (tmp_path / "out.log").read_text()  # the pod's own log is unchanged


@pytest.mark.parametrize(
    ("how", "last"),
    [("error", "on standard error"), ("crash", "Fatal Python error: Segmentation fault")],
)
def test_what_a_dying_process_wrote_last_is_kept(
    how: str, last: str, output: Path, tmp_path: Path
) -> None:
    assert launched(how, output, tmp_path).wait(120) != 0
    log = output / "logs/attempt-1/worker-0.log"
    wait_until(lambda: log.exists() and last in log.read_text())


def test_the_log_of_a_killed_process_is_kept_and_its_helper_ends(
    output: Path, tmp_path: Path
) -> None:
    process = launched("hang", output, tmp_path)
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    log = output / "logs/attempt-1/worker-0.log"
    wait_until(lambda: log.exists() and "on standard output" in log.read_text())
    wait_until(lambda: not _helpers(output))


def test_a_helper_that_is_asked_to_end_with_its_process_writes_the_rest_first(
    output: Path, tmp_path: Path
) -> None:
    process = launched("hang", output, tmp_path)
    wait_until(lambda: (tmp_path / "ready").exists() and any(tmp_path.glob("drain/*")))
    (marker,) = (tmp_path / "drain").iterdir()
    os.kill(int(marker.name), signal.SIGTERM)  # as Ray ends a job: every process of it
    time.sleep(2)
    process.kill()
    process.wait(60)
    wait_until(lambda: not marker.exists())
    assert "on standard output" in (output / "logs/attempt-1/worker-0.log").read_text()


def _helpers(output: Path) -> list[Path]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"tuneyard_trainer.logs.keeper" in words and str(output).encode() in words:
            found.append(entry)
    return found


def test_an_output_that_cannot_be_written_is_a_warning(output: Path, tmp_path: Path) -> None:
    (output / "logs").write_text("a file in place of the folder")
    warnings: list[str] = []
    file = tmp_path / "process.log"
    file.write_text("a line\n")
    done = threading.Event()

    def warn(text: str) -> None:
        warnings.append(text)
        done.set()

    with kept(LogPlace(str(output), 1, UID), "driver", [file], warn):
        pass
    assert done.wait(60)
    assert [text.partition(" (")[0] for text in warnings] == [
        f"the log cannot be kept in {output}/logs/attempt-1/driver.log"
    ]


def test_without_a_file_to_read_there_is_a_warning_and_no_helper(output: Path) -> None:
    warnings: list[str] = []
    with kept(LogPlace(str(output), 1, UID), "driver", [], warnings.append):
        assert not _helpers(output)
    assert "not files" in warnings[0]
