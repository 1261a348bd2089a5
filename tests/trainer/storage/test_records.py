"""Stage records on a file system and on an object store: written last, atomic, one owner."""

from __future__ import annotations

import json
import multiprocessing
import uuid
from pathlib import Path

import fsspec
import pytest

from tests.trainer.rows import train_stage
from tuneyard.api.plan import JobRef, StageRecord
from tuneyard.errors import StageError
from tuneyard_trainer.storage.files import write_atomically
from tuneyard_trainer.storage.records import Store

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


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
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


def test_another_machine_gets_the_files_of_a_finished_stage(store: Store, tmp_path: Path) -> None:
    store.claim(JOB, 1)
    write(store, "weights/a.bin", "first")
    write(store, "stale.txt", "old")
    store.persist(store.workdir("sft"))
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
    store.persist(folder)
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
    store.begin("sft", "sha256:one")
    write(store, "checkpoints/step-00000001/state.json", "{}")
    store.persist(store.workdir("sft"))
    store.begin("sft", "sha256:one")
    assert names(store, tmp_path) == {"state.json"}
    store.begin("sft", "sha256:two")
    assert names(store, tmp_path / "again") == set()
    assert not list(store.workdir("sft").iterdir())


def test_a_finished_stage_that_must_run_again_starts_with_an_empty_folder(
    store: Store, tmp_path: Path
) -> None:
    store.claim(JOB, 1)
    store.begin("sft", STAGE.identity(DIGESTS))
    write(store, "weights/a.bin", "first")
    store.write_record(record())
    assert store.done(STAGE, DIGESTS) == record()
    store.begin("sft", "sha256:changed")
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


def test_an_erased_folder_is_removed_if_it_holds_no_other_files(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), tmp_path, "ours")
    store.claim(JOB, 1)
    store.write_record(record())
    assert store.erase(JOB)
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_version_is_ignored(store: Store) -> None:
    store.claim(JOB, 1)
    store._write_json("stages/sft/record.json", {"schema": "unknown"})
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
