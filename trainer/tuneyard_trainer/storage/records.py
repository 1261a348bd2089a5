"""A job's output location, with the files and the record of each stage. Any fsspec location.

Layout: `owner.json`, `stages/NAME/` with each stage's files and its `record.json`, and `result/`,
which is the export stage's folder. A record is written last and atomically (rename on a file
system, one put on an object store), so a readable record means that the stage's files are complete.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from pydantic import ValidationError

from tuneyard.api.plan import JobRef, PlannedStage, StageRecord
from tuneyard.api.pods import STALE_ATTEMPT, stage_folder
from tuneyard.errors import StageError
from tuneyard_trainer.storage.files import disk_error, write_atomically

LAST = ("state.json", "record.json")
"""Files whose presence means that the others are complete; they are copied last."""


class Store:
    """A job's output location. On a file system, stages work in place; for an object store, they
    work in a scratch folder, which `persist` uploads."""

    def __init__(self, uri: str, scratch: Path, job_uid: str | None = None) -> None:
        """`uri`: `/a/path`, `file:///a/path` or any fsspec URL. `scratch`: a local folder.
        `job_uid`: the uid of the Kubernetes object; None outside a cluster."""
        self.uri, self._job_uid = uri, job_uid
        self._fs, self._root = fsspec.core.url_to_fs(uri)
        self.is_local = "file" in _protocols(self._fs)
        self._scratch = Path(self._root) if self.is_local else scratch

    # ---- ownership ----------------------------------------------------------------------------

    def claim(self, job: JobRef, attempt: int) -> None:
        """Record this job and attempt as the location's owner. A job that was deleted and created
        again has another uid: it takes over, and the former job cannot claim the location again.

        Raises StageError OutputOwned if the location belongs to another job or holds files of
        unknown origin, StaleAttempt if a newer attempt already works there.
        """
        owner = self._read_json("owner.json")
        former: list[str] = []
        if owner is None:
            self._refuse_foreign_files()
        else:
            self._refuse_other_job(job, JobRef.model_validate(owner["job"]))
            former = owner.get("formerUids", [])
            if owner.get("uid") == self._job_uid:
                self._refuse_older(owner, attempt)
            elif self._job_uid in former:
                raise _stale(f"another job named {job.name} has taken over")
            elif owner.get("uid"):
                former = [*former, owner["uid"]]
        self._write_json(
            "owner.json",
            {
                "job": job.model_dump(mode="json"),
                "uid": self._job_uid,
                "attempt": attempt,
                "formerUids": former,
            },
        )

    def refuse_stale(self, attempt: int) -> None:
        """Raise StageError StaleAttempt unless this job, in this attempt or an older one, made the
        last claim."""
        owner = self._read_json("owner.json")
        if owner is None:
            raise _stale(f"{self.uri} was erased")
        if owner.get("uid") != self._job_uid:
            raise _stale(f"another job named {owner['job']['name']} has taken over {self.uri}")
        self._refuse_older(owner, attempt)

    def erase(self, job: JobRef) -> bool:
        """Remove the files that this job wrote. Return False, and change nothing, if the location
        does not belong to this job.

        Other files stay. `owner.json` is removed last, so an interrupted call can be repeated.
        """
        owner = self._read_json("owner.json")
        if owner is None or owner.get("uid") != self._job_uid or self._job_uid is None:
            return False
        if JobRef.model_validate(owner["job"]) != job:
            return False
        for name in ("stages", stage_folder("export"), ".lock", "owner.json"):
            self._remove(name)
        with suppress(OSError):  # not empty, or the root of a volume
            if self.is_local:
                self._scratch.rmdir()
        return True

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
        if foreign:
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
        folder = self._make(self._scratch)
        with (folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StageError(
                    "OutputBusy",
                    f"another process is running a job in {self.uri}.",
                    advice="Wait until that process ends, or stop it.",
                ) from None
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

    def write_record(self, record: StageRecord) -> None:
        """Persist the stage's files, then write the record, which completes the stage.

        Raises StageError StaleAttempt if a newer attempt or job has taken over.
        """
        self.refuse_stale(record.attempt)
        folder = self.workdir(record.stage)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.persist(folder)
        self._write_json(
            f"{stage_folder(record.stage)}/record.json",
            record.model_dump(mode="json", by_alias=True),
        )
        self._remove(f"stages/{record.stage}.begun.json")

    def begin(self, stage: str, identity: str) -> None:
        """Prepare the stage's folder for a run.

        Files of an unfinished run with the same identity stay, so the stage can resume from them.
        Files of another identity belong to other settings or data and are removed, the record
        first.
        """
        begun = f"stages/{stage}.begun.json"
        self._remove(f"{stage_folder(stage)}/record.json")
        if self._read_json(begun) == {"identity": identity}:
            return
        self._remove(stage_folder(stage))
        shutil.rmtree(self._scratch / stage_folder(stage), ignore_errors=True)
        self._write_json(begun, {"identity": identity})

    def _remove(self, relative: str) -> None:
        path = self._at(relative)
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    # ---- files ----------------------------------------------------------------------------------

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
            if not target.exists() or target.stat().st_size != self._fs.size(path):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(path, str(target))

    def persist(self, folder: Path) -> None:
        """Make the store hold exactly the files of a local folder inside the root."""
        if self.is_local:
            return
        remote = self._at(str(folder.relative_to(self._scratch)))
        files = [path for path in folder.rglob("*") if path.is_file()]
        wanted = {f"{remote}/{path.relative_to(folder).as_posix()}": path for path in files}
        for target, path in sorted(wanted.items(), key=lambda item: item[1].name in LAST):
            if path.name in LAST or self._size(target) != path.stat().st_size:
                self._fs.put_file(str(path), target)
        stale = [
            path
            for path in (self._fs.find(remote) if self._fs.exists(remote) else [])
            if path not in wanted and not path.endswith("/record.json")
        ]
        for path in stale:
            self._fs.rm_file(path)

    def _size(self, path: str) -> int | None:
        return self._fs.size(path) if self._fs.exists(path) else None

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
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def _write_json(self, relative: str, value: Any) -> None:
        data = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
        if self.is_local:
            write_atomically(self._scratch / relative, data)
        else:
            self._fs.pipe_file(self._at(relative), data)


def _stale(why: str) -> StageError:
    return StageError(STALE_ATTEMPT, f"{why}.")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
