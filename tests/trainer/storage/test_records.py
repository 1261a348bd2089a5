"""Stage records on a file system and on an object store: written last, atomic, one owner."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from rig.s3 import S3Server

from tests.trainer.rows import train_stage
from tuneyard.api.plan import JobRef, StageRecord
from tuneyard.errors import StageError
from tuneyard_trainer.storage.files import write_atomically
from tuneyard_trainer.storage.journal import Journal
from tuneyard_trainer.storage.objects import Objects
from tuneyard_trainer.storage.records import EARLIER_FILE, REUSED_FOLDER, Store

JOB = JobRef(kind="FineTuneJob", name="support-bot")
STAGE = train_stage()
DIGESTS = {"model": "sha256:m", "data": "sha256:d"}


def record(attempt: int = 1, **changes: object) -> StageRecord:
    values: dict[str, object] = {
        "stage": "sft",
        "kind": "sft",
        "identity": STAGE.identity(DIGESTS),
        "input_digests": DIGESTS,
        "digest": "sha256:out",
        "attempt": attempt,
        "started_at": "2026-01-01T00:00:00Z",
        "finished_at": "2026-01-01T00:01:00Z",
        "metrics": {"validationLoss": 1.5},
    }
    return StageRecord.model_validate(values | changes)


def test_a_record_with_a_field_of_a_newer_version_is_still_valid(tmp_path: Path) -> None:
    """After a rollback, a finished stage does not run again."""
    store = Store(str(tmp_path / "out"), tmp_path, "uid")
    store.claim(JOB, 1)
    store.write_record(record())
    path = tmp_path / "out/stages/sft/record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ofANewerVersion": 1}))
    assert store.done(STAGE, DIGESTS) == record()


@pytest.fixture
def s3_store(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store on a real S3 server."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return Store(f"s3://{s3.bucket}/{uuid.uuid4().hex}/out", tmp_path / "scratch")


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        found: Store = request.getfixturevalue("s3_store")
        return found
    if request.param == "file":
        return Store(str(tmp_path / "out"), tmp_path / "scratch")
    return Store(f"memory://bucket-{uuid.uuid4().hex}/out", tmp_path / "scratch")


def on_another_machine(store: Store, tmp_path: Path) -> Store:
    """Return a store of the same location with another scratch folder."""
    return Store(store.uri, tmp_path / "elsewhere")


def write(store: Store, relative: str, text: str) -> Path:
    path = store.workdir("sft") / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_record_is_found_only_by_the_identity_it_was_written_for(store: Store) -> None:
    store.claim(JOB, 1)
    assert store.done(STAGE, DIGESTS) is None
    store.write_record(record())
    assert store.done(STAGE, DIGESTS) == record()
    assert store.done(STAGE, DIGESTS | {"data": "sha256:changed"}) is None


def test_checkpoints_stay_until_the_record_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.claim(JOB, 1)
    path = write(store, "checkpoints/step-00000001/state.json", "{}")
    with monkeypatch.context() as killed:
        killed.setattr(Store, "_write", _kill)
        with pytest.raises(KeyboardInterrupt):
            store.write_record(record())
    assert path.exists()
    store.write_record(record())
    assert not path.exists()


def _kill(*_: object) -> None:
    raise KeyboardInterrupt


def test_another_machine_gets_the_files_of_a_finished_stage(store: Store, tmp_path: Path) -> None:
    store.claim(JOB, 1)
    write(store, "weights/a.bin", "first")
    write(store, "stale.txt", "old")
    store.persist(store.workdir("sft"), 1)
    write(store, "weights/a.bin", "other")
    (store.workdir("sft") / "stale.txt").unlink()
    write(store, "checkpoints/step-00000001/state.json", "{}")
    store.write_record(record())
    other = on_another_machine(store, tmp_path)
    other.pull("sft")
    names = {
        path.relative_to(other.workdir("sft")).as_posix()
        for path in other.workdir("sft").rglob("*")
        if path.is_file()
    }
    assert names == {"weights/a.bin", "record.json"}


def test_an_object_store_gets_the_file_that_completes_a_folder_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store("memory://ordered/out", tmp_path / "scratch")
    store.claim(JOB, 1)
    folder = write(store, "checkpoints/step-00000001/state.json", "{}").parent
    (folder / "weights.safetensors").write_text("w")
    (folder / "zz.safetensors").write_text("z")
    put: list[str] = []
    fs = fsspec.filesystem("memory")
    original = type(fs).put_file

    def recorded(self: object, lpath: str, rpath: str, **rest: object) -> None:
        put.append(Path(rpath).name)
        original(self, lpath, rpath, **rest)

    monkeypatch.setattr(type(fs), "put_file", recorded)
    store.persist(folder, 1)
    assert put[-1] == "state.json"
    assert len(put) == 3


def names(store: Store, tmp_path: Path) -> set[str]:
    """Return the names of the stage's files on another machine."""
    other = on_another_machine(store, tmp_path)
    other.pull("sft")
    return {path.name for path in other.workdir("sft").rglob("*") if path.is_file()}


def test_files_of_an_unfinished_run_are_kept_only_for_the_same_identity(
    store: Store, tmp_path: Path
) -> None:
    store.claim(JOB, 1)
    store.begin("sft", "sha256:one", 1)
    write(store, "checkpoints/step-00000001/state.json", "{}")
    store.persist(store.workdir("sft"), 1)
    store.begin("sft", "sha256:one", 1)
    assert names(store, tmp_path) == {"state.json"}
    store.begin("sft", "sha256:two", 1)
    assert names(store, tmp_path / "again") == set()
    assert not list(store.workdir("sft").iterdir())


def test_files_that_are_named_by_their_content_stay_for_another_identity(
    store: Store, tmp_path: Path
) -> None:
    store.claim(JOB, 1)
    store.begin("sft", "sha256:one", 1)
    write(store, f"{REUSED_FOLDER}/abc.json", "{}")
    write(store, "evaluation.json", "{}")
    store.persist(store.workdir("sft"), 1)
    store.begin("sft", "sha256:two", 1)
    assert names(store, tmp_path) == {"abc.json"}
    store.pull("sft")
    files = [path.name for path in store.workdir("sft").rglob("*") if path.is_file()]
    assert files == ["abc.json"]


def test_a_result_says_that_it_is_of_an_earlier_run(store: Store, tmp_path: Path) -> None:
    store.claim(JOB, 1)
    assert not store.mark_result(1), "there is no result yet"
    store.begin("export", "sha256:one", 1)
    (store.workdir("export") / "weights.bin").write_text("a")
    store.write_record(record().model_copy(update={"stage": "export", "kind": "export"}))
    assert store.mark_result(1)
    other = on_another_machine(store, tmp_path)
    other.pull("export")
    assert "earlier run" in (other.workdir("export") / EARLIER_FILE).read_text()
    assert (other.workdir("export") / "weights.bin").read_text() == "a"
    store.unmark_result(1)
    again = on_another_machine(store, tmp_path / "again")
    again.pull("export")
    assert not (again.workdir("export") / EARLIER_FILE).exists()


def test_a_finished_stage_that_must_run_again_starts_with_an_empty_folder(
    store: Store, tmp_path: Path
) -> None:
    store.claim(JOB, 1)
    store.begin("sft", STAGE.identity(DIGESTS), 1)
    write(store, "weights/a.bin", "first")
    store.write_record(record())
    assert store.done(STAGE, DIGESTS) == record()
    store.begin("sft", "sha256:changed", 1)
    assert store.record("sft") is None
    assert names(store, tmp_path) == set()


def test_another_jobs_folder_is_refused_and_does_not_change(store: Store) -> None:
    store.claim(JOB, 1)
    with pytest.raises(StageError, match="holds the output of FineTuneJob support-bot") as failure:
        store.claim(JobRef(kind="FineTuneJob", name="other"), 1)
    assert failure.value.reason == "OutputOwned"
    assert "output.uri" in failure.value.advice
    store.claim(JOB, 1)


def test_a_folder_with_unknown_files_is_refused_and_does_not_change(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(StageError, match=r"thesis\.tex"):
        Store(str(tmp_path), tmp_path).claim(JOB, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_older_attempt_can_neither_claim_nor_write_a_record(store: Store) -> None:
    store.claim(JOB, 2)
    with pytest.raises(StageError) as claimed:
        store.claim(JOB, 1)
    with pytest.raises(StageError) as written:
        store.write_record(record(attempt=1))
    assert {claimed.value.reason, written.value.reason} == {"StaleAttempt"}
    assert store.record("sft") is None


def of_job(store: Store, tmp_path: Path, uid: str) -> Store:
    """Return a store of the same location for the job with this uid."""
    return Store(store.uri, tmp_path / uid, uid)


def test_a_job_that_was_created_again_takes_over_for_good(store: Store, tmp_path: Path) -> None:
    old, new = of_job(store, tmp_path, "old"), of_job(store, tmp_path, "new")
    old.claim(JOB, 3)
    old.write_record(record(attempt=3))
    new.claim(JOB, 1)
    for refused in (
        lambda: old.write_record(record(attempt=3)),
        lambda: old.refuse_stale(9),
        lambda: old.claim(JOB, 4),
    ):
        with pytest.raises(StageError) as failure:
            refused()
        assert failure.value.reason == "StaleAttempt"
    new.write_record(record(attempt=1))
    assert new.done(STAGE, DIGESTS) == record(attempt=1)


def test_the_same_and_the_next_attempt_can_claim_the_location(store: Store, tmp_path: Path) -> None:
    ours = of_job(store, tmp_path, "ours")
    for attempt in (1, 1, 2):
        ours.claim(JOB, attempt)
    with pytest.raises(StageError, match="attempt 2 has taken over"):
        ours.refuse_stale(1)
    ours.refuse_stale(2)


def test_an_older_attempt_is_refused_with_both_numbers(store: Store) -> None:
    store.claim(JOB, 2)
    with pytest.raises(StageError, match="attempt 2 has taken over; this is attempt 1"):
        store.refuse_stale(1)


def test_a_job_erases_only_the_files_that_it_wrote(store: Store, tmp_path: Path) -> None:
    ours = of_job(store, tmp_path, "ours")
    ours.claim(JOB, 1)
    write(ours, "weights/a.bin", "a")
    ours.write_record(record())
    for other in (of_job(store, tmp_path, "theirs"), Store(store.uri, tmp_path / "local")):
        assert not other.erase(JOB)
    assert not ours.erase(JobRef(kind="AlignmentJob", name=JOB.name))
    assert ours.record("sft") == record()

    ours._fs.pipe_file(ours._at("notes.txt"), b"of another origin")
    assert ours.erase(JOB)
    assert not ours.erase(JOB)
    assert [Path(path).name for path in ours._fs.find(ours._root)] == ["notes.txt"]
    with pytest.raises(StageError, match="was erased"):
        ours.write_record(record())


def test_output_written_without_a_cluster_is_never_erased(store: Store) -> None:
    store.claim(JOB, 1)
    store.write_record(record())
    assert not store.erase(JOB)
    assert store.record("sft") == record()


def test_an_erasure_removes_what_a_killed_claim_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "out"), tmp_path / "scratch", "u")

    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            store.claim(JOB, 1)
    killed_file = next(tmp_path.glob("out/.owner.json.*"))
    killed_file.rename(killed_file.with_name(".owner.json.99999"))  # of another process
    store.claim(JOB, 2)
    assert store.erase(JOB)
    assert not (tmp_path / "out").exists()


def test_an_erased_folder_is_removed_if_it_holds_no_other_files(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), tmp_path, "ours")
    store.claim(JOB, 1)
    store.write_record(record())
    assert store.erase(JOB)
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_version_is_ignored(store: Store) -> None:
    store.claim(JOB, 1)
    store._write("stages/sft/record.json", {"schema": "unknown"}, 1)
    assert store.record("sft") is None


def test_a_file_is_replaced_entirely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, b"old")
    limited = multiprocessing.get_context("fork").Process(target=_write_beyond_limit, args=(path,))
    limited.start()
    limited.join()
    assert limited.exitcode == 0
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _write_beyond_limit(path: Path) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    try:
        write_atomically(path, b"x" * 4096)
    except StageError:
        return
    raise AssertionError("a write beyond the limit succeeded")


def test_two_processes_cannot_work_in_the_same_folder(tmp_path: Path) -> None:
    first, second = (Store(str(tmp_path / "out"), tmp_path) for _ in range(2))
    with first.lock(), pytest.raises(StageError, match="another process"), second.lock():
        pass
    with second.lock():
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_can_hold_an_output(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    store = Store(str(tmp_path / "out"), tmp_path)
    with store.lock():
        store.claim(JOB, 1)
        store.write_record(record())
    assert store.done(STAGE, DIGESTS) == record()


def test_a_lock_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), tmp_path)
    (tmp_path / "out/.lock").mkdir(parents=True)
    with pytest.raises(StageError, match="cannot write to") as failure, store.lock():
        pass
    assert failure.value.reason == "WriteFailed"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"job": {}}'])
def test_a_damaged_claim_is_named_with_its_remedy(store: Store, text: str) -> None:
    store.claim(JOB, 1)
    store._fs.pipe_file(store._at("owner.json"), text.encode())
    for refused in (lambda: store.claim(JOB, 1), lambda: store.refuse_stale(1)):
        with pytest.raises(StageError, match=r"owner\.json .*cannot be read") as failure:
            refused()
        assert failure.value.reason == "OutputOwned"
        assert "owner.json" in failure.value.advice


def erase_beside(store: Store, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Erase the output, while another thread does this work after the first removal."""
    late = threading.Thread(target=work)

    def start_late() -> None:
        late.start()
        late.join(timeout=0.3)

    at_the_first_call(monkeypatch, store, "_remove", start_late)
    assert store.erase(JOB)
    late.join(timeout=60)


def test_no_attempt_writes_while_its_output_is_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "out"), tmp_path, "ours")
    store.claim(JOB, 1)
    store.write_record(record())
    refused: list[str] = []

    def write_late() -> None:
        try:
            with Store(store.uri, tmp_path, "ours").owned(1):
                store.workdir("sft")
        except StageError as error:
            refused.append(error.reason)

    erase_beside(store, monkeypatch, write_late)
    assert refused == ["StaleAttempt"]
    assert not (tmp_path / "out").exists()


def test_a_claim_that_waits_for_an_erasure_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The erasure removes the file whose lock the new job waits for."""
    store = Store(str(tmp_path / "out"), tmp_path, "ours")
    store.claim(JOB, 1)
    store.write_record(record())
    theirs = Store(store.uri, tmp_path, "theirs")
    erase_beside(store, monkeypatch, lambda: theirs.claim(JOB, 1))
    with theirs.owned(1):
        pass


def test_two_first_claims_at_once_do_not_take_each_other_for_foreign_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claim_and_write() -> None:
        second = newer(store, tmp_path)
        second.claim(JOB, 2)
        second.write_record(record(attempt=2))

    at_the_first_call(monkeypatch, store, "_read_owner", claim_and_write)
    with pytest.raises(StageError) as failure:
        store.claim(JOB, 1)
    assert failure.value.reason == "StaleAttempt"


# ---- writes of two attempts at once -------------------------------------------------------------


def newer(store: Store, tmp_path: Path) -> Store:
    """Return a store of the same location for attempt 2, which has not claimed it yet."""
    return Store(store.uri, tmp_path / "newer")


def at_the_first_call(
    monkeypatch: pytest.MonkeyPatch, store: Store, method: str, act: Callable[[], None]
) -> None:
    """Call `act` after the first call of a method of the store has returned."""
    original = getattr(store, method)
    acted = []

    def watched(*arguments: object) -> object:
        value = original(*arguments)
        if not acted:
            acted.append(True)
            act()
        return value

    monkeypatch.setattr(store, method, watched)


def test_a_claim_on_s3_never_replaces_a_newer_attempts_claim(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = newer(s3_store, tmp_path)
    at_the_first_call(monkeypatch, s3_store, "_claimed", lambda: other.claim(JOB, 2))
    with pytest.raises(StageError, match="attempt 2 has taken over") as failure:
        s3_store.claim(JOB, 1)
    assert failure.value.reason == "StaleAttempt"
    other.refuse_stale(2)


def test_a_store_without_conditional_writes_is_refused_with_the_remedy() -> None:
    class RefusedError(Exception):
        response: ClassVar = {"ResponseMetadata": {"HTTPStatusCode": 501}}

    class Unconditional:
        protocol = "s3"

        def info(self, path: str) -> None:
            raise FileNotFoundError(path)

        def pipe_file(self, *_: object, **condition: str) -> None:
            assert condition
            raise OSError(errno.ENOSYS, "not implemented") from RefusedError()

    with pytest.raises(StageError, match="conditional writes") as failure:
        Objects(Unconditional()).replace("bucket/owner.json", lambda: b"{}")
    assert failure.value.reason == "WriteFailed"
    assert not failure.value.retryable
    assert "output.uri" in failure.value.advice


def test_a_record_on_s3_never_replaces_a_newer_attempts_record(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_store.claim(JOB, 1)
    other = newer(s3_store, tmp_path)

    def taken_over() -> None:
        other.claim(JOB, 2)
        other.write_record(record(attempt=2))

    at_the_last_check(monkeypatch, s3_store, taken_over)
    with pytest.raises(StageError) as failure:
        s3_store.write_record(record(attempt=1))
    assert failure.value.reason == "StaleAttempt"
    assert s3_store.record("sft") == record(attempt=2)


def at_the_last_check(
    monkeypatch: pytest.MonkeyPatch, store: Store, act: Callable[[], None]
) -> None:
    """Call `act` after the check of the claim that directly precedes the write of a record."""
    original, writing = store._objects.replace, []
    check = store.refuse_stale

    def replace(path: str, content: Callable[[], bytes | Path]) -> None:
        writing.append(path.endswith("/record.json"))
        original(path, content)

    def refuse_stale(attempt: int) -> None:
        check(attempt)
        if writing and writing.pop():
            act()

    monkeypatch.setattr(store._objects, "replace", replace)
    monkeypatch.setattr(store, "refuse_stale", refuse_stale)


def test_no_file_on_s3_replaces_one_that_a_newer_attempt_wrote(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_store.claim(JOB, 1)
    write(s3_store, "checkpoints/step-00000002/weights.safetensors", "stale")
    other = newer(s3_store, tmp_path)

    def taken_over() -> None:
        other.claim(JOB, 2)
        write(other, "checkpoints/step-00000002/weights.safetensors", "newer")
        other.persist(other.workdir("sft"), 2)

    at_the_first_call(monkeypatch, s3_store, "refuse_stale", taken_over)
    with pytest.raises(StageError, match="attempt 2 has taken over"):
        s3_store.persist(s3_store.workdir("sft"), 1)
    elsewhere = on_another_machine(s3_store, tmp_path)
    elsewhere.pull("sft")
    path = elsewhere.workdir("sft") / "checkpoints/step-00000002/weights.safetensors"
    assert path.read_text() == "newer"


def test_a_stale_attempt_neither_empties_a_stage_nor_removes_its_files(
    store: Store, tmp_path: Path
) -> None:
    store.claim(JOB, 1)
    store.begin("sft", "sha256:one", 1)
    write(store, "checkpoints/step-00000001/state.json", "{}")
    store.persist(store.workdir("sft"), 1)
    store.claim(JOB, 2)
    for refused in (
        lambda: store.begin("sft", "sha256:two", 1),
        lambda: store.write_record(record(attempt=1)),
    ):
        with pytest.raises(StageError) as failure:
            refused()
        assert failure.value.reason == "StaleAttempt"
    assert names(store, tmp_path) == {"state.json"}


def test_no_attempt_claims_a_folder_while_another_one_changes_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), tmp_path)
    store.claim(JOB, 1)
    claiming = threading.Thread(target=newer(store, tmp_path).claim, args=(JOB, 2))
    with store.owned(1):
        claiming.start()
        claiming.join(timeout=0.3)
        store.refuse_stale(1)
    claiming.join(timeout=60)
    with pytest.raises(StageError, match="attempt 2 has taken over"), store.owned(1):
        pass


# ---- content ------------------------------------------------------------------------------------


def test_a_rewritten_file_of_equal_size_is_copied_in_both_directions(
    store: Store, tmp_path: Path
) -> None:
    store.claim(JOB, 1)
    other = on_another_machine(store, tmp_path)
    for text in ("first", "other"):
        path = write(store, "weights/a.bin", text)
        os.utime(path, (0, 0))
        store.persist(store.workdir("sft"), 1)
        other.pull("sft")
        assert (other.workdir("sft") / "weights/a.bin").read_text() == text


def test_files_with_equal_content_are_not_copied_again(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_store.claim(JOB, 1)
    path = write(s3_store, "weights/a.bin", "first")
    s3_store.persist(s3_store.workdir("sft"), 1)
    path.unlink()
    write(s3_store, "weights/a.bin", "first")
    for method in ("_put_file", "_get_file"):
        monkeypatch.setattr(type(s3_store._fs), method, None)
    s3_store.persist(s3_store.workdir("sft"), 1)
    s3_store.pull("sft")


def test_one_file_can_be_copied_alone(store: Store, tmp_path: Path) -> None:
    store.claim(JOB, 1)
    write(store, "weights/a.bin", "a")
    store.persist(write(store, "metrics.jsonl", "{}"), 1)
    if not store.is_local:
        assert names(store, tmp_path) == {"metrics.jsonl"}


# ---- journals -----------------------------------------------------------------------------------


def test_a_stale_attempt_does_not_change_the_newer_attempts_journal(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), tmp_path)
    store.claim(JOB, 1)
    folder = store.workdir("judge") / "checkpoints"

    def journal(attempt: int) -> Journal:
        persist = partial(store.persist, attempt=attempt)
        return Journal(folder, "sha256:one", persist, partial(store.owned, attempt))

    stale = journal(1)
    stale.append([{"reply": 1}])
    store.claim(JOB, 2)
    with journal(2) as current:
        current.append([{"reply": 2}])
        for refused in (lambda: stale.append([{"reply": 3}]), lambda: journal(1)):
            with pytest.raises(StageError, match="attempt 2 has taken over"):
                refused()
        current.append([{"reply": 4}])
    assert journal(2).entries == [{"reply": 1}, {"reply": 2}, {"reply": 4}]


def test_a_part_of_a_file_is_read_up_to_its_present_end(store: Store) -> None:
    assert store.read("stages/sft/metrics.jsonl") == b""
    store.claim(JOB, 1)
    path = write(store, "metrics.jsonl", "0123456789")
    store.persist(path, 1)
    parts = [(0, 4, b"0123"), (4, 99, b"456789"), (10, 20, b""), (12, 20, b"")]
    for start, end, expected in parts:
        assert store.read("stages/sft/metrics.jsonl", start, end) == expected
    path.write_text("0123456789ab")
    store.persist(path, 1)
    assert store.read("stages/sft/metrics.jsonl", 10) == b"ab", "no listing is kept"


def test_the_state_of_a_tracker_is_the_newest_attempt_s_and_not_a_former_job_s(
    store: Store, tmp_path: Path
) -> None:
    of_job = Store(store.uri, tmp_path / "job", "one")
    of_job.claim(JOB, 1)
    assert of_job.tracker_state("mlflow") is None
    of_job.keep_tracker_state("mlflow", {"id": "a"}, 1)
    of_job.claim(JOB, 2)
    with pytest.raises(StageError, match="attempt 2 has taken over"):
        of_job.keep_tracker_state("mlflow", {"id": "b"}, 1)
    assert of_job.tracker_state("mlflow") == {"id": "a"}

    again = Store(store.uri, tmp_path / "again", "two")
    again.claim(JOB, 1)
    assert again.tracker_state("mlflow") is None
    again.keep_tracker_state("mlflow", {"id": "c"}, 1)
    assert again.erase(JOB)
    assert again.read("tracking/mlflow.json") == b""
