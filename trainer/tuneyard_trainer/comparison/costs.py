"""The cost of each job: time, tokens and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuneyard.api.comparison import Cost
from tuneyard.api.plan import StageRecord
from tuneyard_trainer.comparison.job_result import JobResult
from tuneyard_trainer.reporting.results import last_trained

LABELS = {
    "trainingSeconds": "Training time",
    "seconds": "Time of all stages",
    "steps": "Steps",
    "tokens": "Tokens trained on",
    "tokensPerSecond": "Tokens per second",
    "peakMemoryBytes": "Peak memory",
    "trainedParameters": "Trained parameters",
}
"""The costs in the order of the table, and their labels."""


def costs(jobs: Sequence[JobResult]) -> list[Cost]:
    """Return the costs that are known of at least one job."""
    found = [_of(job) for job in jobs]
    rows = [
        Cost.model_validate(
            {"name": name, "label": label, "values": [each.get(name) for each in found]}
        )
        for name, label in LABELS.items()
    ]
    return [row for row in rows if any(value is not None for value in row.values)]


def trained(job: JobResult) -> StageRecord | None:
    """Return the record of the stage that trained a job's model. None: it is not in the output."""
    return last_trained(job.records.values())


def _of(job: JobResult) -> Mapping[str, float | None]:
    report, record = job.report, trained(job)
    metrics = record.metrics if record else {}
    memory = [stage.measured_bytes for stage in report.memory if stage.measured_bytes is not None]
    known = {
        "seconds": report.seconds or None,
        "tokens": report.tokens.trained,
        "tokensPerSecond": report.tokens.per_second,
        "peakMemoryBytes": max(memory, default=None),
    }
    return {**known, **{name: metrics[name] for name in LABELS if name in metrics}}
