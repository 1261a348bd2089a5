"""Prepared data that the cache keeps for other jobs: a sweep of 20 jobs prepares its data once.

    CACHE/results/KEY/
      record.json   the record of the stage that wrote the data
      files/        its output

KEY is a digest of everything that decides the output (`result_key`). An entry is written beside its
place and renamed once it is complete, is copied and not linked, since the owner of an output may
change it, and its copy is compared with the digest in its record. The lock of an entry saves work
and guarantees nothing: other nodes may not see it. ADR 0013 says what the entries are for.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Final

import tuneyard_trainer
from tuneyard.api.plan import PlannedStage, SourceInput, StageRecord, digest
from tuneyard.api.quantity import QUANTITY_PATTERN, quantity_value
from tuneyard.api.stage_settings import StageKind
from tuneyard.errors import StageError
from tuneyard_trainer.storage.digests import digest_of
from tuneyard_trainer.storage.files import all_files, cache_lock, is_disk_full
from tuneyard_trainer.worker import Worker

REUSED_KINDS: Final[tuple[StageKind, ...]] = ("prepare", "pairs")
"""The kinds of stages whose output is kept for other jobs: equal inputs give the same bytes. Not
`augment`: one job pays for its requests, and a model answers another job differently."""
DECISIVE: Final = (
    "tuneyard",
    "bm25s",
    "ftfy",
    "gguf",
    "jinja2",
    "numpy",
    "py3langid",
    "pyarrow",
    "rensa",
    "tokenizers",
    "torch",
    "transformers",
)
"""The packages that decide prepared data: they read, clean, render, tokenize and search it."""
LIMIT_VARIABLE: Final = "TUNEYARD_CACHE_RESULTS"
LIMIT: Final = "20Gi"
FREE_SHARE: Final = 4
"""The entries take at most one part in 4 of the space that is free or theirs: the disk may also
hold the outputs of jobs."""

_RECORD = "record.json"
_FILES = "files"
_PARTIAL = ".partial"


def results_limit(environment: Mapping[str, str]) -> int:
    """Return the most bytes that the entries take; 0: no entry is kept or used. Raises StageError
    CacheUnusable if TUNEYARD_CACHE_RESULTS is no quantity."""
    text = environment.get(LIMIT_VARIABLE) or LIMIT
    if not re.fullmatch(QUANTITY_PATTERN, text):
        raise StageError(
            "CacheUnusable",
            f"{LIMIT_VARIABLE} is {text!r}, which is no quantity.",
            advice="Write a size as Kubernetes does, such as 20Gi, or 0 to keep no prepared data "
            "for other jobs.",
        )
    return int(min(quantity_value(text), sys.maxsize))


def is_reusable(stage: PlannedStage) -> bool:
    """Return whether a stage's output is kept for other jobs. Not if it reads what a stage of its
    job made, such as a judge's answers: another job makes its own."""
    sources = stage.inputs.values()
    return stage.kind in REUSED_KINDS and all(isinstance(each, SourceInput) for each in sources)


def result_key(stage: PlannedStage, identity: str, inputs: Mapping[str, Path]) -> str:
    """Return the name of the entry for a stage's output.

    It covers the stage's identity, which is its settings and the digests of its inputs; the names
    by which the record and its messages call the inputs; the versions of the packages, and the
    trainer's own files. `inputs`: the local path of each input.
    """
    names = {
        role: (source.path, inputs[role].name if inputs[role].is_file() else "")
        for role, source in stage.inputs.items()
    }
    return digest([identity, names, _software()])[7:39]


@cache
def _software() -> dict[str, str]:
    """Return what the output depends on besides its inputs. The digest of the trainer's files, 1.6
    MB in 10 ms, tells apart two states of a checkout that have one version."""
    found = {"python": platform.python_version()}
    for name in DECISIVE:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    folder = Path(tuneyard_trainer.__file__).parent
    found["trainer"] = digest_of(folder, counts=lambda name: "__pycache__" not in name.parts)
    return found


@dataclass(frozen=True)
class Results:
    """The entries of one cache folder."""

    folder: Path
    """The folder `results` of the cache."""
    most_bytes: int
    """The most bytes that the entries take."""

    @contextmanager
    def held(self, key: str, worker: Worker) -> Iterator[Entry | None]:
        """Hold the entry of this name, which may not exist yet, against all other processes. None:
        the cache cannot be used, and this job prepares its data alone.

        Of jobs that begin at the same time, one prepares the data and the others wait for it here.
        Raises Interrupted if a stop is requested meanwhile.
        """
        told = False

        def wait() -> None:
            nonlocal told
            worker.check_stop()
            if not told:
                worker.report(message="waiting for another job that prepares the same data")
                told = True

        entry: Entry | None = Entry(self, key, worker)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._lock(key, wait))
            except StageError as error:
                worker.report(message=f"no data is shared with other jobs: {error.message}")
                entry = None
            yield entry

    def make_room(self, size: int) -> bool:
        """Remove what killed processes left, and the entries that were not used for the longest
        time, until `size` more bytes may be stored. Return whether they may. An entry that is being
        copied or stored stays."""
        for partial in self.folder.glob(f".*{_PARTIAL}"):
            self._remove(partial.name.split(".")[1], partial)
        sizes = {path: _size(path) for path in self.folder.iterdir() if path.is_dir()}
        used = sum(sizes.values())
        limit = min(self.most_bytes, (shutil.disk_usage(self.folder).free + used) // FREE_SHARE)
        if size > limit:
            return False
        entries = [path for path in sizes if not path.name.endswith(_PARTIAL)]
        for path in sorted(entries, key=_last_used):
            if used + size <= limit:
                break
            if self._remove(path.name, path):
                used -= sizes[path]
        return used + size <= limit

    def _remove(self, key: str, path: Path) -> bool:
        """Remove a folder of an entry. Return False if a process holds the entry."""
        try:
            with self._lock(key, _refuse):
                remove_entry(path)
        except (_BusyError, StageError):
            return False
        return True

    @contextmanager
    def _lock(self, key: str, wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of an entry. Raises StageError CacheUnusable."""
        # Rows may be private: their copies must not be more readable than a source that is.
        with suppress(OSError):  # reported by the lock
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with cache_lock(self.folder / key, wait):
            yield


@dataclass(frozen=True)
class Entry:
    """A place in the cache, whose lock this process holds."""

    results: Results
    key: str
    worker: Worker
    """The worker of the stage: its stop ends a copy, and its report tells of problems."""

    @property
    def _folder(self) -> Path:
        return self.results.folder / self.key

    def copied_to(self, workdir: Path) -> StageRecord | None:
        """Copy the files into the stage's folder, in place of all files there, and return the
        record of the stage that wrote them. None: there is no undamaged entry.

        A damaged entry is removed. Raises OSError if `workdir` cannot be written to, or its disk is
        full, and Interrupted if a stop is requested.
        """
        if not self._folder.is_dir():
            return None
        _empty(workdir)
        try:
            record = StageRecord.model_validate(json.loads((self._folder / _RECORD).read_bytes()))
            files = self._folder / _FILES
            _copy(files.iterdir(), files, workdir, self.worker.check_stop)
            if digest_of(sorted(workdir.iterdir())) == record.digest:
                with suppress(OSError):
                    os.utime(self._folder / _RECORD)
                return record
        except (ValueError, RecursionError):  # a record that is cut short, or is none
            pass
        except OSError as error:
            if is_disk_full(error) or workdir in Path(error.filename or "").parents:
                raise
        self.worker.report(message="the data in the cache is damaged and is prepared again")
        remove_entry(self._folder)
        _empty(workdir)
        return None

    def keep(self, workdir: Path, record: StageRecord, names: Iterable[str]) -> None:
        """Store the output of a stage; report why it cannot be stored. `names`: of the output's
        files and folders in `workdir`. Raises Interrupted."""
        folder = self.results.folder
        partial = folder / f".{self.key}.{secrets.token_hex(4)}{_PARTIAL}"
        try:
            for left in folder.glob(f".{self.key}.*{_PARTIAL}"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            paths = [workdir / name for name in names]
            size = sum(map(_size, paths))
            if not self.results.make_room(size):
                self.worker.report(
                    message=f"{size / 2**30:.1f} GiB are not kept for other jobs: the cache has no "
                    f"room ({LIMIT_VARIABLE})"
                )
                return
            partial.mkdir(mode=0o700)  # others may read a `results` that was there
            _copy(paths, workdir, partial / _FILES, self.worker.check_stop)
            value = record.model_dump(mode="json", by_alias=True)
            (partial / _RECORD).write_text(json.dumps(value), encoding="utf-8")
            if not self._folder.exists():  # kept meanwhile by a process that does not see the lock
                partial.rename(self._folder)
        except OSError as error:
            self.worker.report(message=f"the data is not kept for other jobs: {error}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class _BusyError(Exception):
    """Another process holds the entry."""


def _refuse() -> None:
    raise _BusyError


def remove_entry(folder: Path) -> None:
    """Remove an entry. Its record goes first: what a kill leaves of it is no entry."""
    with suppress(OSError):
        (folder / _RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _copy(paths: Iterable[Path], source: Path, target: Path, check: Callable[[], None]) -> None:
    """Copy files and folders from inside one folder to another. `check`: called before each
    file."""
    for file in chain.from_iterable(map(all_files, paths)):
        check()
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _empty(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _size(path: Path) -> int:
    """Return the bytes of a file or of a folder's files; those that vanish meanwhile count 0."""
    size = 0
    with suppress(OSError):  # a folder vanished
        for file in all_files(path):
            with suppress(OSError):
                size += file.stat().st_size
    return size


def _last_used(folder: Path) -> float:
    """Return when an entry was last used; 0: it is incomplete."""
    try:
        return (folder / _RECORD).stat().st_mtime
    except OSError:
        return 0.0
