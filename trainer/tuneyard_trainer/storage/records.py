"""A job's output location, with the files and the record of each stage. Any fsspec location.

Layout: `owner.json`, `stages/NAME/` with each stage's files and its `record.json`, `result/`, which
is the export stage's folder, `logs/attempt-N/`, `tracking/` and `tensorboard/`. A record is written
last and atomically (rename on a file system, one put on an object store), so a readable record
means that the stage's files are complete.

Only the newest attempt writes. On a file system, the claim and each guarded change hold one lock,
so that no attempt claims the location between the check of the claim and the change. On an object
store, each write checks the claim first, and replaces only the object that it was checked for
(`storage.objects`).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from pydantic import ValidationError

from tuneyard.api.plan import JobRef, PlannedStage, StageRecord
from tuneyard.api.pods import LOGS_FOLDER, STALE_ATTEMPT, log_file, log_folder, stage_folder
from tuneyard.errors import StageError
from tuneyard_trainer.storage.files import NO_LOCKS, all_files, disk_error, write_atomically
from tuneyard_trainer.storage.objects import Objects, protocols

LAST = ("state.json", "record.json")
"""Files whose presence means that the others are complete; they are copied last."""
SOURCES = "stages/sources.json"
OWNER_FILE, CLAIM_LOCK = "owner.json", ".claim.lock"
REUSED_FOLDER = "measured"
"""A folder in that of a stage. Its files are named by their content and stay when the stage begins
with another identity: the stage itself removes those that it cannot use."""
LOCK_SECONDS = 60.0
"""The longest wait for the lock of the claim. Its holder removes old checkpoints meanwhile, which
takes seconds."""
TRACKING_FOLDER, EVENTS_FOLDER = "tracking", "tensorboard"
"""The states of trackers, and TensorBoard's event files."""
_OWN_FILES = (
    *("stages", stage_folder("export"), LOGS_FOLDER, TRACKING_FOLDER, EVENTS_FOLDER),
    *(".lock", OWNER_FILE, CLAIM_LOCK),
)
"""Everything that a job writes, in the order of its erasure. The lock is last: a claim that waits
for it must not be erased."""
EARLIER_FILE = "EARLIER_RUN.md"
"""The file in the folder of the result that says that it is of an earlier run."""
EARLIER_TEXT = """# The model of an earlier run

This model was exported at {finished}. A later run of the job has other settings or data, and has
exported no model: its gates are not met, it failed, or it still runs.

To keep this model, copy the folder: the next run that exports a model replaces it.
"""
KEPT_ATTEMPTS = 20
"""The newest attempts whose logs are kept: preemption does not bound the attempts of a job."""


class Store:
    """A job's output location. On a file system, stages work in place; for an object store, they
    work in a scratch folder, which `persist` uploads."""

    def __init__(self, uri: str, scratch: Path, job_uid: str | None = None) -> None:
        """`uri`: `/a/path`, `file:///a/path` or any fsspec URL. `scratch`: a local folder.
        `job_uid`: the uid of the Kubernetes object; None outside a cluster."""
        self.uri, self._job_uid = uri, job_uid
        # Cached listings would hide what another attempt writes.
        self._fs, self._root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        self._objects = Objects(self._fs)
        self.is_local = "file" in protocols(self._fs)
        self._scratch = Path(self._root) if self.is_local else scratch

    # ---- ownership ----------------------------------------------------------------------------

    def claim(self, job: JobRef, attempt: int) -> None:
        """Record this job and attempt as the location's owner. A job that was deleted and created
        again has another uid: it takes over, and the former job cannot claim the location again.

        Raises StageError OutputOwned if the location belongs to another job or holds files of
        unknown origin, StaleAttempt if a newer attempt already works there.
        """
        if self._read_owner() is None:
            self._refuse_foreign_files()
        claimed = partial(self._claimed, job, attempt)
        if self.is_local:
            with self._locked(os.O_CREAT):
                write_atomically(self._scratch / OWNER_FILE, claimed())
        else:
            self._objects.replace(self._at(OWNER_FILE), claimed)

    def _claimed(self, job: JobRef, attempt: int) -> bytes:
        """Return the next content of `owner.json`. Raises StageError as `claim` does."""
        owner = self._read_owner()
        former: list[str] = []
        if owner is not None:
            self._refuse_other_job(job, JobRef.model_validate(owner["job"]))
            former = owner.get("formerUids", [])
            if owner.get("uid") == self._job_uid:
                self._refuse_older(owner, attempt)
            elif self._job_uid in former:
                raise _stale(f"another job named {job.name} has taken over")
            elif owner.get("uid"):
                former = [*former, owner["uid"]]
                self._remove(LOGS_FOLDER)  # attempts of the former job, whose numbers come again
                self._remove(TRACKING_FOLDER)  # the runs of the former job
        return _json(
            {
                "job": job.model_dump(mode="json"),
                "uid": self._job_uid,
                "attempt": attempt,
                "formerUids": former,
            }
        )

    @contextmanager
    def owned(self, attempt: int) -> Iterator[None]:
        """Raise StageError StaleAttempt unless this attempt owns the location. On a file system, no
        other attempt can claim it before the end."""
        if not self.is_local:
            self.refuse_stale(attempt)
            yield
            return
        with self._locked():
            self.refuse_stale(attempt)
            yield

    @contextmanager
    def _locked(self, flags: int = 0) -> Iterator[None]:
        """Hold the lock of the claim. `flags`: O_CREAT creates its file; without it, a missing file
        means that the location was erased."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            with self._opened(CLAIM_LOCK, flags) as lock:
                self._wait_for(lock, deadline)
                if self._is_present(lock):
                    yield
                    return

    def _wait_for(self, lock: int, deadline: float) -> None:
        while not self._try_lock(lock):
            if time.monotonic() >= deadline:
                raise StageError(
                    "OutputBusy",
                    f"another attempt has locked {self.uri} for {LOCK_SECONDS:.0f} s.",
                    advice="Stop the process that holds its .claim.lock.",
                    retryable=True,
                )
            time.sleep(0.05)

    def _is_present(self, lock: int) -> bool:
        """Return whether the lock's file is still in its place: an erasure removes it."""
        try:
            present = (self._scratch / CLAIM_LOCK).stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(lock), present)

    @contextmanager
    def _opened(self, name: str, flags: int) -> Iterator[int]:
        """Open a lock's file. Closing it releases the lock, as the end of a killed process does."""
        if flags:
            self._make(self._scratch)
        try:
            lock = os.open(self._scratch / name, os.O_RDWR | flags, 0o666)
        except FileNotFoundError:
            raise _stale(f"{self.uri} was erased") from None
        except OSError as error:
            raise disk_error(error, self._scratch) from error
        try:
            yield lock
        finally:
            os.close(lock)

    def _try_lock(self, lock: int) -> bool:
        """Lock a file. Return False if it is locked already. On a file system without locks, the
        check of the claim alone protects the files."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise disk_error(error, self._scratch) from error
        return True

    def refuse_stale(self, attempt: int) -> None:
        """Raise StageError StaleAttempt unless this job, in this attempt or an older one, made the
        last claim, and OutputOwned if the claim is damaged."""
        owner = self._read_owner()
        if owner is None:
            raise _stale(f"{self.uri} was erased")
        if owner.get("uid") != self._job_uid:
            raise _stale(f"another job named {owner['job']['name']} has taken over {self.uri}")
        self._refuse_older(owner, attempt)

    def erase(self, job: JobRef) -> bool:
        """Remove the files that this job wrote. Return False, and change nothing, if the location
        does not belong to this job.

        Other files stay. `owner.json` is removed after them all but the lock, so an interrupted
        call can be repeated.
        """
        if not self._is_owner(job):
            return False
        with self._locked(os.O_CREAT) if self.is_local else nullcontext():
            if not self._is_owner(job):  # taken over meanwhile
                return False
            for name in _OWN_FILES:
                self._remove(name)
            if self.is_local:
                for partial in self._scratch.glob(".owner.json.*"):  # of a claim that was killed
                    partial.unlink(missing_ok=True)
                with suppress(OSError):  # not empty, or the root of a volume
                    self._scratch.rmdir()
        return True

    def _is_owner(self, job: JobRef) -> bool:
        """Return whether the last claim is this job's. A job outside a cluster has no uid."""
        owner = self._read_owner()
        return (
            owner is not None
            and self._job_uid is not None
            and owner.get("uid") == self._job_uid
            and JobRef.model_validate(owner["job"]) == job
        )

    def _refuse_other_job(self, job: JobRef, theirs: JobRef) -> None:
        if theirs != job:
            raise StageError(
                "OutputOwned",
                f"{self.uri} holds the output of {theirs.kind} {theirs.name}, and this is "
                f"{job.kind} {job.name}.",
                advice="Set output.uri to another location, or delete that folder.",
            )

    def _refuse_older(self, owner: Mapping[str, Any], attempt: int) -> None:
        if owner["attempt"] > attempt:
            raise _stale(f"attempt {owner['attempt']} has taken over; this is attempt {attempt}")

    def _refuse_foreign_files(self) -> None:
        if not self._fs.exists(self._root):
            return
        names = [PurePosixPath(path).name for path in self._fs.ls(self._root, detail=False)]
        foreign = sorted(name for name in names if not name.startswith("."))
        if foreign and self._read_owner() is None:  # not claimed meanwhile
            raise StageError(
                "OutputOwned",
                f"{self.uri} holds files that Tuneyard did not write, such as {foreign[0]!r}.",
                advice="Set output.uri to an empty folder.",
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder against other processes of this machine. Object stores rely on the
        attempt number alone. Raises StageError OutputBusy."""
        if not self.is_local:
            yield
            return
        with self._opened(".lock", os.O_CREAT) as lock:
            if not self._try_lock(lock):
                raise StageError(
                    "OutputBusy",
                    f"another process is running a job in {self.uri}.",
                    advice="Wait until that process ends, or stop it.",
                )
            yield

    # ---- records --------------------------------------------------------------------------------

    def record(self, stage: str) -> StageRecord | None:
        """Return the stage's record; None if there is no readable one."""
        value = self._read_json(f"{stage_folder(stage)}/record.json")
        try:
            return StageRecord.model_validate(value) if value is not None else None
        except ValidationError:
            return None  # written by another version: the stage runs again

    def done(self, stage: PlannedStage, input_digests: Mapping[str, str]) -> StageRecord | None:
        """Return the stage's record if it is up to date; None: the stage must run."""
        record = self.record(stage.name)
        if record is not None and record.identity == stage.identity(input_digests):
            return record
        return None

    def source_digests(self) -> dict[str, str]:
        """Return the digest that identities in this output contain for a folder of a source, by the
        digest of its files that decide a result."""
        value = self._read_json(SOURCES)
        return dict(value) if isinstance(value, dict) else {}

    def keep_source_digests(self, digests: Mapping[str, str], attempt: int) -> None:
        """Store the digests of sources unless they are stored. Raises StageError StaleAttempt."""
        if digests != self.source_digests():
            with self.owned(attempt):
                self._write(SOURCES, dict(digests), attempt)

    def write_record(self, record: StageRecord) -> None:
        """Persist the stage's files, then write the record, which completes the stage, and delete
        its checkpoints.

        Raises StageError StaleAttempt if a newer attempt or job has taken over.
        """
        self.persist(self.workdir(record.stage), record.attempt)
        with self.owned(record.attempt):
            self._write(
                f"{stage_folder(record.stage)}/record.json",
                record.model_dump(mode="json", by_alias=True),
                record.attempt,
            )
            self._remove(f"stages/{record.stage}.begun.json")
        self.drop_checkpoints(record.stage, record.attempt)

    def drop_checkpoints(self, stage: str, attempt: int) -> None:
        """Delete the checkpoints of a stage that has its record: nothing resumes from them. Raises
        StageError StaleAttempt."""
        folder = self.workdir(stage) / "checkpoints"
        with self.owned(attempt):
            shutil.rmtree(folder, ignore_errors=True)
        self.persist(folder, attempt)

    def begin(self, stage: str, identity: str, attempt: int) -> None:
        """Prepare the stage's folder for a run.

        Files of an unfinished run with the same identity stay, so the stage can resume from them.
        Files of another identity belong to other settings or data and are removed, the record
        first, but for those in REUSED_FOLDER. Raises StageError StaleAttempt.
        """
        begun = f"stages/{stage}.begun.json"
        with self.owned(attempt):
            self._remove(f"{stage_folder(stage)}/record.json")
            if self._read_json(begun) == {"identity": identity}:
                return
            self._empty(stage_folder(stage))
            if not self.is_local:
                shutil.rmtree(self._scratch / stage_folder(stage), ignore_errors=True)
            self._write(begun, {"identity": identity}, attempt)

    def mark_result(self, attempt: int) -> bool:
        """Say in the folder of the result, if there is one, that it is of an earlier run. Return
        whether there is. Raises StageError StaleAttempt."""
        record = self.record("export")
        if record is None:
            return False
        text = EARLIER_TEXT.format(finished=record.finished_at)
        with self.owned(attempt):
            self._write_bytes(f"{stage_folder('export')}/{EARLIER_FILE}", text.encode(), attempt)
        return True

    def unmark_result(self, attempt: int) -> None:
        """Remove what `mark_result` wrote. Raises StageError StaleAttempt."""
        with self.owned(attempt):
            self._remove(f"{stage_folder('export')}/{EARLIER_FILE}")

    def _empty(self, folder: str) -> None:
        """Remove what is in a stage's folder, but for REUSED_FOLDER."""
        path = self._at(folder)
        for each in self._fs.ls(path, detail=False) if self._fs.exists(path) else ():
            if PurePosixPath(each).name != REUSED_FOLDER:
                self._fs.rm(each, recursive=True)

    def _remove(self, relative: str) -> None:
        path = self._at(relative)
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    # ---- logs -----------------------------------------------------------------------------------

    def log(self, name: str, attempt: int) -> bytes:
        """Return a kept log; b"": there is none. `name`: `driver` or `worker-RANK`."""
        try:
            data: bytes = self._fs.cat_file(self._at(log_file(attempt, name)))
        except FileNotFoundError:
            return b""
        return data

    def write_log(self, name: str, data: bytes, attempt: int) -> None:
        """Replace a kept log. Raises StageError StaleAttempt."""
        with self.owned(attempt):
            self._write_bytes(log_file(attempt, name), data, attempt)

    def remove_old_logs(self, attempt: int) -> None:
        """Remove the logs of all attempts before the KEPT_ATTEMPTS newest. Raises StageError
        StaleAttempt."""
        newest = {log_folder(number) for number in range(attempt - KEPT_ATTEMPTS + 1, attempt + 1)}
        with self.owned(attempt):
            for path in self._fs.ls(self._at(LOGS_FOLDER), detail=False):
                folder = f"{LOGS_FOLDER}/{PurePosixPath(path).name}"
                if folder not in newest:
                    self._remove(folder)

    # ---- trackers -------------------------------------------------------------------------------

    def tracker_state(self, name: str) -> dict[str, Any] | None:
        """Return the state that a tracker stored; None: there is none that can be read."""
        value = self._read_json(f"{TRACKING_FOLDER}/{name}.json")
        return value if isinstance(value, dict) else None

    def keep_tracker_state(self, name: str, value: Mapping[str, Any], attempt: int) -> None:
        """Store the state of a tracker. Raises StageError StaleAttempt."""
        with self.owned(attempt):
            self._write(f"{TRACKING_FOLDER}/{name}.json", dict(value), attempt)

    # ---- files ----------------------------------------------------------------------------------

    def read(self, relative: str, start: int = 0, end: int | None = None) -> bytes:
        """Return a file's bytes from `start` to before `end`, as far as there are any; b"": there
        is no such file. `end` None: the file's end."""
        path = self._at(relative)
        try:
            size = self._fs.size(path) or 0
            if size <= start:
                return b""
            data: bytes = self._fs.cat_file(path, start=start, end=min(size, end or size))
        except FileNotFoundError:
            return b""
        return data

    def workdir(self, stage: str) -> Path:
        """Return the local folder of a stage. `pull` fills it from the store."""
        return self._make(self._scratch / stage_folder(stage))

    @property
    def root(self) -> Path:
        """The local folder that corresponds to the output location."""
        return self._scratch

    def pull(self, stage: str) -> None:
        """Copy a stage's files from an object store to its local folder."""
        remote = self._at(stage_folder(stage))
        if self.is_local or not self._fs.exists(remote):
            return
        for path in self._fs.find(remote):
            target = self.workdir(stage) / PurePosixPath(path).relative_to(remote)
            self._objects.download(path, target)

    def persist(self, path: Path, attempt: int) -> None:
        """Make an object store hold exactly a local file, or the files of a folder, inside the
        root.

        Raises StageError StaleAttempt before the first object that a newer attempt or job owns.
        """
        if self.is_local:
            return
        allow = partial(self.refuse_stale, attempt)
        remote = self._remote(path)
        files = all_files(path)
        for file in sorted(files, key=lambda file: file.name in LAST):
            self._objects.upload(file, self._remote(file), allow)
        present = self._fs.find(remote) if self._fs.exists(remote) else []
        wanted = {self._remote(file) for file in files}
        for found in present:  # listed before the check: a newer attempt has not written these
            if found not in wanted and not found.endswith("/record.json"):
                allow()
                self._fs.rm_file(found)

    def _remote(self, path: Path) -> str:
        return self._at(path.relative_to(self._scratch).as_posix())

    def _at(self, relative: str) -> str:
        return f"{self._root.rstrip('/')}/{relative}"

    def _make(self, folder: Path) -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        return folder

    def _read_json(self, relative: str) -> Any:
        try:
            return json.loads(self._fs.cat_file(self._at(relative)))
        except (FileNotFoundError, ValueError):
            return None

    def _read_owner(self) -> dict[str, Any] | None:
        """Return the last claim; None: there is none. Raises StageError OutputOwned if it is
        damaged."""
        try:
            owner: dict[str, Any] = json.loads(self._fs.cat_file(self._at(OWNER_FILE)))
            JobRef.model_validate(owner["job"])
            int(owner["attempt"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise StageError(
                "OutputOwned",
                f"owner.json in {self.uri} is damaged and cannot be read, so the owner of the "
                "files is unknown.",
                advice="Restore owner.json, delete the folder, or set output.uri to another "
                "location.",
            ) from error
        return owner

    def _write(self, relative: str, value: Any, attempt: int) -> None:
        """Write a JSON file; the caller holds the claim (`owned`)."""
        self._write_bytes(relative, _json(value), attempt)

    def _write_bytes(self, relative: str, data: bytes, attempt: int) -> None:
        if self.is_local:
            write_atomically(self._scratch / relative, data)
            return

        def allowed() -> bytes:
            self.refuse_stale(attempt)
            return data

        self._objects.replace(self._at(relative), allowed)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _stale(why: str) -> StageError:
    return StageError(STALE_ATTEMPT, f"{why}.")
