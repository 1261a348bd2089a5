"""Manifests as arguments of commands: the jobs of a file, and their plans."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import click

from tuneyard.errors import Fault, ManifestError, PlanError
from tuneyard.manifests import documents, manifest
from tuneyard.manifests.manifest import Job

Planned = TypeVar("Planned")

FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
STDIN = Path("-")


def folder_of(file: Path) -> Path:
    """Return the folder that a manifest's relative paths start from."""
    return Path.cwd() if file == STDIN else file.resolve().parent


class Manifest(NamedTuple):
    """A file with jobs."""

    source: str
    """Name of the file in messages."""
    text: str
    jobs: list[Job]


def read_jobs(file: Path) -> Manifest:
    """Read a manifest. Raises ManifestError with every fault of every document."""
    source = "stdin" if file == STDIN else str(file)
    try:
        data = sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        message = f"cannot be read ({error.strerror}): correct the path or its permissions"
        raise ManifestError([Fault("", message, None, source)]) from error
    except UnicodeDecodeError as error:
        message = f"byte {error.start} is not UTF-8: save the manifest as UTF-8 text"
        raise ManifestError([Fault("", message, None, source)]) from error
    return Manifest(source, text, manifest.read(text, source))


def each_job(given: Manifest, plan: Callable[[Job], Planned]) -> list[Planned]:
    """Return the result for each job. Raises PlanError with the faults of all jobs."""
    results: list[Planned] = []
    faults: list[Fault] = []
    for index, job in enumerate(given.jobs):
        try:
            results.append(plan(job))
        except PlanError as error:
            faults += [_located(fault, given, index) for fault in error.faults]
    if faults:
        raise PlanError(faults)
    return results


def _located(fault: Fault, given: Manifest, index: int) -> Fault:
    """Return a fault of the manifest's job number `index` with its line."""
    document = documents.load(given.text, given.source)[0][index]
    steps = re.findall(r"\[(\d+)\]|([^.\[\]]+)", fault.path)
    line = document.line_of(tuple(int(number) if number else name for number, name in steps))
    return Fault(fault.path, fault.message, line, given.source)
