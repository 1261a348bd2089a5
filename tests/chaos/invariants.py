"""What must hold after every run, whatever struck it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.chaos.kubelet import Played
from tests.controller.scene import Job, Object


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of the same job."""

    digest: str
    """The digest of its result."""
    rows: tuple[int, ...]
    """The training rows in the order in which they were read; each occurs once."""


def rows_of(played: Played) -> list[int]:
    """Return the rows that an attempt read, in order. The last line may be incomplete."""
    if not played.pod.rows.exists():
        return []
    whole, _, _ = played.pod.rows.read_text().rpartition("\n")
    return [int(line) for line in whole.splitlines()]


def violations(
    status: Object, played: Sequence[Played], reference: Reference, *, redone_rows: int
) -> Iterator[str]:
    """Yield each broken invariant of a job that has ended.

    `redone_rows`: the most rows that an attempt may read again: one checkpoint interval, and two
    after a broken checkpoint.
    """
    if status.get("phase") != "Succeeded":
        yield f"it ended {status.get('phase')}: {status.get('failure')}"
        return
    digest = (status.get("result") or {}).get("digest")
    if digest != reference.digest:
        yield f"its result is {digest}, of an undisturbed run {reference.digest}"
    yield from _of_rows([rows_of(each) for each in played], reference.rows, redone_rows)
    if any(attempt.get("reason") is None for attempt in status.get("attempts", [])):
        yield "the status does not say why an attempt ended"


def _of_rows(
    logs: Sequence[Sequence[int]], reference: Sequence[int], redone_rows: int
) -> Iterator[str]:
    """Check that no training row was lost, and none repeated but after the last checkpoint."""
    position = {row: i for i, row in enumerate(reference)}
    done = 0
    for number, log in enumerate(logs):
        if not log:
            continue
        start = position[log[0]]
        if list(log) != list(reference[start : start + len(log)]):
            yield f"attempt {number + 1} read rows in another order from row {start}"
        if start > done:
            yield f"attempt {number + 1} lost {start - done} rows"
        if done - start > redone_rows:
            yield f"attempt {number + 1} repeated {done - start} rows of {redone_rows} allowed"
        done = max(done, start + len(log))
    if done != len(reference):
        yield f"{len(reference) - done} rows were never read"


def leftovers(job: Job) -> Iterator[str]:
    """Yield what is left in the namespace after the job was deleted."""
    base = f"namespaces/{job.scene.namespace}"
    for root, plural in (
        ("apis/ray.io/v1", "rayjobs"),
        ("api/v1", "pods"),
        ("api/v1", "configmaps"),
        ("apis/batch/v1", "jobs"),
    ):
        for item in job.scene.api.list(
            f"/{root}/{base}/{plural}", labelSelector=f"tuneyard.io/job={job.name}"
        ):
            yield f"{plural}/{item['metadata']['name']} is left"
