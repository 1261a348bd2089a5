"""Sentences on comparisons that are not possible or may mislead, with the names of the jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tuneyard.api.comparison import Difference, MetricRow
from tuneyard.api.evaluation import FEWEST_PAIRED_ITEMS
from tuneyard.api.stage_settings import TRAINING_KINDS
from tuneyard_trainer.comparison.costs import trained
from tuneyard_trainer.comparison.item_keys import digest_of_all
from tuneyard_trainer.comparison.job_result import JobResult
from tuneyard_trainer.comparison.sentences import listed
from tuneyard_trainer.reporting.formatting import count

SHORT = 12
"""Characters of a digest that are shown."""
_REASONS = {
    "otherUnit": "{metrics} of {jobs} {have} other units, or unknown ones, and {are} not compared: "
    "the loss is of another kind or counts other tokens, as with another tokenizer or chat "
    "template, or another reward, judge, start model or check measured the answers.",
    "otherRows": "{metrics} of {jobs} {are} of other rows: the difference may come from the rows, "
    "and no job is called better.",
    "unpaired": "{metrics} of {jobs} {are} compared by unpaired intervals, which are wider: it is "
    "not known that the items are the same, or not what their values are.",
    "noInterval": "{metrics} of {jobs} {have} no interval, so no job is called better.",
}


def notes(names: Sequence[str], jobs: Sequence[JobResult], rows: Sequence[MetricRow]) -> list[str]:
    """Return the notes. `names`: of the jobs, as in the other sentences."""
    found = [
        *_not_evaluated(names, jobs),
        *_other_bases(names, jobs),
        *_other_rows(names, jobs),
        *_only_one(names, jobs, rows),
        *_by_basis(names, rows),
        *_few_items(rows),
        *_other_devices(names, jobs),
    ]
    found += [
        f"{name}: its manifest is not in the output, so its settings are not compared."
        for name, job in zip(names, jobs, strict=True)
        if not job.manifest
    ]
    found += [
        f"{name}: {warning}"
        for name, job in zip(names, jobs, strict=True)
        for warning in job.report.warnings
    ]
    return found


def _grouped(names: Sequence[str], values: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the jobs by their value; those with "" are left out."""
    groups: dict[str, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        if value:
            groups.setdefault(value, []).append(name)
    return groups


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:SHORT]


def _not_evaluated(names: Sequence[str], jobs: Sequence[JobResult]) -> Iterator[str]:
    for name, job in zip(names, jobs, strict=True):
        if not any(stage.kind in TRAINING_KINDS for stage in job.report.stages):
            yield (
                f"{name} has not trained a model: it failed, was stopped, or still runs. Only what "
                "it has is compared: run it to its end."
            )
        elif not job.evaluated:
            yield (
                f"{name} has no evaluation, so only its training and its settings are compared: "
                "hold out rows (data.validation, or preferences.heldOut of an alignment) or set "
                "evaluate.suites, and run it to its end."
            )


def _other_bases(names: Sequence[str], jobs: Sequence[JobResult]) -> Iterator[str]:
    bases = [_base(job) for job in jobs]
    groups = _grouped(names, [digest or uri for digest, uri in bases])
    if len(groups) < 2:
        return
    by_digest = len({uri for _, uri in bases}) < len(groups)
    shown = {
        digest or uri: f"{uri} (digest {_short(digest)})" if by_digest and digest else uri or digest
        for digest, uri in bases
    }
    parts = [f"{listed(group)} from {shown[value]}" for value, group in groups.items()]
    yield (
        f"The jobs start from different base models: {listed(parts)}. A difference may come from "
        "the base model."
    )


def _base(job: JobResult) -> tuple[str, str]:
    """Return the digest of the base model and its URI; "": unknown."""
    record = trained(job)
    known = [source.digest for source in job.report.lineage.sources if source.role == "model"]
    digest = (record.input_digests.get("model") if record else None) or next(iter(known), "")
    return digest, job.report.job.base_model


def _other_rows(names: Sequence[str], jobs: Sequence[JobResult]) -> Iterator[str]:
    for what, held_out in (
        ("rows", [job.asked.rows for job in jobs]),
        ("preferences", [job.asked.preferences for job in jobs]),
    ):
        digests = [digest_of_all(sorted(rows)) if rows else "" for rows in held_out]
        groups = _grouped(names, digests)
        if len(groups) < 2:
            continue
        sizes = {digest: len(rows) for digest, rows in zip(digests, held_out, strict=True)}
        parts = [
            f"{listed(group)} {count(sizes[digest])} (digest {_short(digest)})"
            for digest, group in groups.items()
        ]
        shared = set.intersection(*(set(rows) for rows in held_out if rows))
        said = f"The jobs hold out different {what}: {listed(parts)}"
        if shared:
            yield (
                f"{said}; {count(len(shared))} of them are held out by all. Differences are of the "
                f"{what} that both jobs hold out, and the values of a job are of all of its own."
            )
        else:
            yield f"{said}; none are held out by all."


def _only_one(
    names: Sequence[str], jobs: Sequence[JobResult], rows: Sequence[MetricRow]
) -> Iterator[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        have = tuple(n for n, value in zip(names, row.values, strict=True) if value is not None)
        if len(have) < sum(job.evaluated for job in jobs):
            groups.setdefault(have, []).append(row.metric)
    for have, metrics in groups.items():
        if have:
            yield f"Only {listed(have)} {'has' if len(have) == 1 else 'have'} {listed(metrics)}."
        else:
            yield f"{listed(metrics)}: no job has a value that is a finite number."


def _by_basis(names: Sequence[str], rows: Sequence[MetricRow]) -> Iterator[str]:
    """Yield why some differences are not paired, with the metrics and the pairs of jobs."""
    for basis, reason in _REASONS.items():
        groups: dict[tuple[int, int], list[str]] = {}
        for row in rows:
            for each in row.differences:
                if _reason(each) == basis and row.higher_is_better is not None:
                    groups.setdefault((each.first, each.second), []).append(row.metric)
        pairs: dict[tuple[str, ...], set[int]] = {}
        for pair, names_of in groups.items():
            pairs.setdefault(tuple(names_of), set()).update(pair)
        for metrics, numbers in pairs.items():
            one = len(metrics) == 1
            yield reason.format(
                metrics=listed(metrics),
                jobs=listed([names[job] for job in sorted(numbers)]),
                have="has" if one else "have",
                are="is" if one else "are",
            )


def _reason(difference: Difference) -> str:
    """Return the key of _REASONS for a difference; "paired": there is nothing to say."""
    no_interval = difference.basis == "unpaired" and difference.interval is None
    return "noInterval" if no_interval else difference.basis


def _few_items(rows: Sequence[MetricRow]) -> Iterator[str]:
    few = [
        row.metric
        for row in rows
        if any(_excludes_zero(each) and each.better is None for each in row.differences)
        and row.higher_is_better is not None
        and any(each.basis in ("paired", "unpaired") for each in row.differences)
    ]
    if few:
        yield (
            f"{listed(few)}: the items are fewer than {FEWEST_PAIRED_ITEMS}, whose intervals are "
            "too narrow, so no job is called better. Hold out more rows."
        )


def _excludes_zero(difference: Difference) -> bool:
    found = difference.interval
    return (
        found is not None
        and difference.basis in ("paired", "unpaired")
        and (found[0] > 0 or found[1] < 0)
    )


def _device(details: Mapping[str, object]) -> str:
    """Return a device with the number of workers; "": it is unknown."""
    workers = details.get("workers", 1)
    device = details.get("device")
    return f"{device} ({workers} worker{'' if workers == 1 else 's'})" if device else ""


def _other_devices(names: Sequence[str], jobs: Sequence[JobResult]) -> Iterator[str]:
    details: list[Mapping[str, object]] = [
        record.details if (record := trained(job)) else {} for job in jobs
    ]
    devices = [_device(each) for each in details]
    groups = _grouped(names, devices)
    if len(groups) > 1:
        parts = [f"{listed(group)} on {device}" for device, group in groups.items()]
        yield f"The jobs trained on different devices: {listed(parts)}. Their times do not compare."
