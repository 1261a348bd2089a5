"""Compare finished jobs: read their outputs, and return the comparison as a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tuneyard.api.comparison import (
    MAX_JOBS,
    ComparedCurves,
    ComparedJob,
    Comparison,
)
from tuneyard.errors import Fault, ManifestError
from tuneyard_trainer.comparison.answers import compared_answers
from tuneyard_trainer.comparison.costs import costs
from tuneyard_trainer.comparison.files import OutputError
from tuneyard_trainer.comparison.job_result import JobResult, Named, read_job
from tuneyard_trainer.comparison.metrics import metric_rows
from tuneyard_trainer.comparison.notes import notes
from tuneyard_trainer.comparison.sentences import sentences
from tuneyard_trainer.comparison.settings import different
from tuneyard_trainer.reporting.summary import without_secrets


def compare(outputs: Sequence[Named], found: Sequence[Fault] = ()) -> Comparison:
    """Return the comparison of jobs. Raises ManifestError with the faults of all outputs.

    `found`: faults of jobs without an output, which are raised with the others.
    """
    faults = [*found]
    jobs: list[JobResult] = []
    seen: dict[tuple[str, str], str] = {}
    for named in outputs:
        try:
            job = read_job(named)
        except OutputError as error:
            faults.append(Fault("", str(error), None, named.argument))
            continue
        first = seen.setdefault(job.files.identity, named.argument)
        if first != named.argument or any(job.files.identity == j.files.identity for j in jobs):
            message = f"is the same output as {first}: name each job once"
            faults.append(Fault("", message, None, named.argument))
        jobs.append(job)
    if not found:
        faults += _number_fault(len(outputs))
    if faults:
        raise ManifestError(faults)
    return compared(jobs)


def _number_fault(number: int) -> Iterator[Fault]:
    if number < 2:
        yield Fault("", "one job is not a comparison: name at least two jobs")
    if number > MAX_JOBS:
        yield Fault("", f"{number} jobs are more than {MAX_JOBS}: compare fewer at a time")


def compared(jobs: Sequence[JobResult]) -> Comparison:
    """Return the comparison of at least two jobs."""
    labels = _labels(jobs)
    rows, spent = metric_rows(jobs), costs(jobs)
    return Comparison(
        jobs=[_job(label, job) for label, job in zip(labels, jobs, strict=True)],
        sentences=sentences(labels, rows, spent),
        notes=notes(labels, jobs, rows),
        metrics=rows,
        settings=different([job.manifest for job in jobs]),
        costs=spent,
        answers=compared_answers(jobs),
        curves=[
            ComparedCurves(job=number, curves=job.report.curves) for number, job in enumerate(jobs)
        ],
    )


def _labels(jobs: Sequence[JobResult]) -> list[str]:
    """Return the names of the jobs, with the last part of the output where two have one name."""
    names = Counter(job.name for job in jobs)
    short = [
        job.name if names[job.name] == 1 else f"{job.name} ({job.files.place.rpartition('/')[2]})"
        for job in jobs
    ]
    again = Counter(short)
    return [
        label if again[label] == 1 else f"{job.name} ({job.files.place})"
        for label, job in zip(short, jobs, strict=True)
    ]


def _job(label: str, job: JobResult) -> ComparedJob:
    reported = job.report.job
    return ComparedJob(
        label=label,
        name=job.name,
        output=without_secrets(job.files.uri),
        sentence=reported.sentence,
        base_model=reported.base_model,
        method=reported.method,
        adapter=reported.adapter,
        evaluated=job.evaluated,
    )
