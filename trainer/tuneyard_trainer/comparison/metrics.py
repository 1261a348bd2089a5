"""The metrics of several jobs: values, differences with intervals, and the best job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import isclose

from tuneyard.api.comparison import Difference, MetricRow
from tuneyard.api.evaluation import FEWEST_PAIRED_ITEMS
from tuneyard.api.report import Comparison as Reported
from tuneyard_trainer.comparison.differences import Found, Measured, difference
from tuneyard_trainer.comparison.job_result import JobResult

DERIVED = ("validationPerplexity",)
"""Metrics that say what another one says: a perplexity is the exponential of the loss."""
_SAME = 1e-4
"""Relative difference of two measurements of one base model, whose batches may differ."""


def metric_rows(jobs: Sequence[JobResult]) -> list[MetricRow]:
    """Return a row for each metric that a job's report compares, in the order of the reports."""
    reported = [{row.metric: row for row in job.reported} for job in jobs]
    names = dict.fromkeys(name for rows in reported for name in rows if name not in DERIVED)
    return [_row(name, jobs, [rows.get(name) for rows in reported]) for name in names]


def _row(name: str, jobs: Sequence[JobResult], rows: Sequence[Reported | None]) -> MetricRow:
    known = [row for row in rows if row is not None]
    measured = [job.measured(name) for job in jobs]
    counts = [
        None if row is None else job.num_items(name) or row.items
        for job, row in zip(jobs, rows, strict=True)
    ]
    direction = known[0].higher_is_better
    units = [
        None if row is None else (row.label, job.unit(name))
        for job, row in zip(jobs, rows, strict=True)
    ]
    differences = [*_differences(measured, counts, units, direction)]
    return MetricRow(
        metric=name,
        label=known[0].label,
        is_share=all(row.is_share for row in known),
        higher_is_better=direction,
        base=_agreed([None if row.base_is_chance else row.base for row in known]),
        values=[None if each is None else each.value for each in measured],
        intervals=[each.interval if each else None for each in measured],
        items=counts,
        best=_best(measured, differences),
        differences=differences,
    )


def _agreed(values: Sequence[float | None]) -> float | None:
    """Return the value that all have. None: they differ, or one is missing."""
    first = values[0]
    if first is None or any(value is None for value in values):
        return None
    same = all(value is not None and isclose(value, first, rel_tol=_SAME) for value in values)
    return first if same else None


def _differences(
    measured: Sequence[Measured | None],
    counts: Sequence[int | None],
    units: Sequence[tuple[str, str] | None],
    higher: bool | None,
) -> Iterator[Difference]:
    """Yield the difference of each two jobs. `units`: the label, which has the unit (a loss of
    preferences is not one in nats per token), and what it was measured by."""
    for (i, first), (j, second) in combinations(enumerate(measured), 2):
        if first is None or second is None:
            continue
        same_unit = units[i] == units[j]
        found = difference(first, second) if same_unit else Found("otherUnit", None, None, None)
        fewest = min((n for n in (found.items, counts[i], counts[j]) if n is not None), default=0)
        yield Difference(
            first=i,
            second=j,
            value=found.value,
            interval=found.interval,
            basis=found.basis,
            items=found.items,
            better=_better(found, fewest, higher, i, j),
        )


def _better(found: Found, items: int, higher: bool | None, first: int, second: int) -> int | None:
    """Return the job that is better. None: no clear difference. `items`: the fewest items of the
    difference or of a value; below FEWEST_PAIRED_ITEMS the intervals are too narrow."""
    if higher is None or found.interval is None or found.basis in ("otherRows", "otherUnit"):
        return None
    if found.interval.contains(0.0) or items < FEWEST_PAIRED_ITEMS:
        return None
    return second if (found.interval.low > 0) == higher else first


def _best(measured: Sequence[Measured | None], differences: Sequence[Difference]) -> int | None:
    """Return the job that is clearly better than each other one that has a value. None: there is
    none, or only one job has a value."""
    have = [job for job, each in enumerate(measured) if each is not None]
    wins = {job: sum(each.better == job for each in differences) for job in have}
    return next((job for job, won in wins.items() if won and won == len(have) - 1), None)
