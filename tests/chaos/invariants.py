"""What must hold after every run, whatever struck it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.kubelet import Played
from tests.controller.scene import Job, Object, Scene

KEPT = ("events", "leases", "endpoints", "endpointslices")
"""Kinds whose objects outlive a job, or come and go by themselves."""


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of the same job."""

    digest: str
    """The digest of its result."""
    weights: str
    """The SHA-256 of its weights."""
    rows: tuple[int, ...]
    """The training rows in the order in which they were read; each occurs once."""
    steps: tuple[int, ...]
    """The steps of its training curve."""


def rows_of(played: Played) -> list[int]:
    """Return the rows that an attempt read, in order. The last line may be incomplete."""
    if not played.pod.rows.exists():
        return []
    whole, _, _ = played.pod.rows.read_text().rpartition("\n")
    return [int(line) for line in whole.splitlines()]


def reference_of(status: Object, played: Played, output: Path) -> Reference:
    """Return what an undisturbed run left behind."""
    digest = status["result"]["digest"]
    return Reference(digest, _weights(output), tuple(rows_of(played)), tuple(_steps(output)))


def _weights(output: Path) -> str:
    path = output / "result" / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _steps(output: Path) -> list[int]:
    """Return the steps of the training curve that have a loss."""
    lines = (output / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def of_output(
    status: Object,
    played: Sequence[Played],
    output: Path,
    reference: Reference,
    *,
    interval_rows: int,
    num_unwritten: int = 0,
) -> Iterator[str]:
    """Yield each broken invariant of the training of a job that has succeeded.

    `interval_rows`: the rows of a checkpoint interval. An attempt may read so many again, and as
    many for each of the `num_unwritten` checkpoints that were broken or could not be written.
    Training goes on while a checkpoint is written, so as many again may be repeated if an attempt
    was killed during a write.
    """
    digest = (status.get("result") or {}).get("digest")
    if digest != reference.digest:
        yield f"its result is {digest}, of an undisturbed run {reference.digest}"
    if _weights(output) != reference.weights:
        yield "its weights differ from those of an undisturbed run"
    if (steps := _steps(output)) != [*reference.steps]:
        yield f"its training curve has the steps {steps}"
    logs = [rows_of(each) for each in played]
    allowed = [(1 + num_unwritten + each.was_writing) * interval_rows for each in played]
    yield from _of_rows(logs, allowed, reference.rows)


def _of_rows(
    logs: Sequence[Sequence[int]], allowed: Sequence[int], reference: Sequence[int]
) -> Iterator[str]:
    """Check that no training row was lost, and none repeated but after the last checkpoint.

    `allowed`: the most rows of each attempt that the next one may read again.
    """
    position = {row: i for i, row in enumerate(reference)}
    done = redone = 0
    for number, log in enumerate(logs):
        if not log:
            continue
        start = position[log[0]]
        if list(log) != list(reference[start : start + len(log)]):
            yield f"attempt {number + 1} read rows in another order from row {start}"
        if start > done:
            yield f"attempt {number + 1} lost {start - done} rows"
        if done - start > redone:
            yield f"attempt {number + 1} repeated {done - start} rows of {redone} allowed"
        done, redone = max(done, start + len(log)), allowed[number]
    if done != len(reference):
        yield f"{len(reference) - done} rows were never read"


def of_status(
    status: Object, uid: str, played: Sequence[Played], ends: Collection[str]
) -> Iterator[str]:
    """Yield where the status of a job that has ended does not tell what happened.

    `ends`: the reasons for which its attempts may have ended, apart from success.
    """
    if status.get("phase") != "Succeeded":
        yield f"it ended {status.get('phase')}: {status.get('failure')}"
        return
    attempts = status.get("attempts", [])
    *others, last = [each.get("reason") for each in attempts]
    if last != "Succeeded" or not {*others} <= {*ends}:
        yield f"its attempts ended {others}, {last}; {sorted(ends)} struck them"
    if any(not each.get("message") or not each.get("finishedAt") for each in attempts):
        yield "the status does not say why or when an attempt ended"
    named = {each.get("rayJobUid") for each in attempts}
    if unnamed := {each.uid for each in played if each.job_uid == uid} - named:
        yield f"the status does not name {len(unnamed)} RayJobs of {len(attempts)} attempts"
    states = {stage["name"]: stage["state"] for stage in status.get("stages", [])}
    if not {*states.values()} <= {"Succeeded", "Skipped"}:
        yield f"its stages are {states}"


def leftovers(job: Job) -> Iterator[str]:
    """Yield what is left in the namespace after the job was deleted."""
    base = f"namespaces/{job.scene.namespace}"
    for root, plural in (
        ("apis/ray.io/v1", "rayjobs"),
        ("api/v1", "pods"),
        ("api/v1", "configmaps"),
        ("apis/batch/v1", "jobs"),
        ("apis/networking.k8s.io/v1", "networkpolicies"),
    ):
        for item in job.scene.api.list(
            f"/{root}/{base}/{plural}", labelSelector=f"tuneyard.io/job={job.name}"
        ):
            yield f"{plural}/{item['metadata']['name']} is left"


def inventory(scene: Scene) -> set[str]:
    """Return the names of all objects in the namespace, of every kind that outlives no job."""
    kinds = scene.cluster.kubectl(
        "api-resources", "--namespaced", "--verbs=list", "--output=name"
    ).stdout.split()
    kept = ",".join(kind for kind in kinds if kind.partition(".")[0] not in KEPT)
    listed = scene.cluster.kubectl(
        "get", kept, "--namespace", scene.namespace, "--output=name", "--ignore-not-found"
    )
    return set(listed.stdout.split())
