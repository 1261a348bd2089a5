"""One of the compared jobs: its report, its manifest, and the values of its metrics by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from tuneyard.api.currency import EVALUATED, PATTERNS, RECORD, changed_after_evaluation
from tuneyard.api.plan import StageRecord
from tuneyard.api.report import REPORT, Comparison, JobReport
from tuneyard.api.stage_settings import EVALUATION_KINDS
from tuneyard_trainer.comparison.differences import Measured
from tuneyard_trainer.comparison.files import OutputError, OutputFiles
from tuneyard_trainer.comparison.item_keys import AskedItems, line_digests, suite_sources
from tuneyard_trainer.comparison.measurements import Measurements, interval_of
from tuneyard_trainer.comparison.report_of import report_of
from tuneyard_trainer.comparison.units import unit_of
from tuneyard_trainer.reporting.summary import shareable
from tuneyard_trainer.storage.records import EARLIER_FILE, OWNER_FILE

HELD_OUT = "validation.jsonl"
_RESULT = "result"


@dataclass(frozen=True)
class Named:
    """An output to compare, as the command line found it."""

    argument: str
    """The argument of the user, for messages."""
    uri: str
    """Folder or URL of the output."""
    manifest: Mapping[str, Any] | None = None
    """The job's manifest with its defaults, which may have changed since the job ran: it stands in
    for that of an output without one. None: it is not known."""


@dataclass(frozen=True)
class JobResult:
    """One of the compared jobs."""

    files: OutputFiles
    report: JobReport
    manifest: Mapping[str, Any]
    """With its defaults, without secrets. {}: unknown."""
    records: Mapping[str, StageRecord]
    """By the kind of the stage; of several stages of one kind the last one."""
    asked: AskedItems
    measurements: Measurements
    evaluated: bool
    """Whether the job has an evaluation."""

    @property
    def name(self) -> str:
        """The job's name."""
        return self.report.job.name

    @property
    def reported(self) -> list[Comparison]:
        """The metrics that the report compares with the base model, and the loss on general
        data."""
        general = self.report.forgetting
        if general is None:
            return self.report.comparisons
        row = Comparison(
            metric="generalLoss",
            label="Loss on general data",
            scope="heldOut",
            higher_is_better=False,
            base=general.base_loss,
            tuned=general.loss,
        )
        return [*self.report.comparisons, row]

    def measured(self, metric: str) -> Measured | None:
        """Return a metric with its interval and its values by item. None: it was not measured, or
        it is not finite."""
        row = next((each for each in self.reported if each.metric == metric), None)
        value = row.tuned if row else self.report.metrics.get(metric)
        if value is None:
            return None
        interval = self.measurements.interval(metric)
        if interval is None and row is not None:
            interval = interval_of(row.tuned_interval)
        return Measured(value, interval, self.measurements.values(metric))

    def unit(self, metric: str) -> str:
        """Return a text that is equal for jobs whose values of a metric can be compared."""
        return unit_of(metric, self.manifest, self.asked.sources)

    def num_items(self, metric: str) -> int | None:
        """Return the items that a metric is the mean of. None: unknown."""
        return self.measurements.num_items(metric)


def read_job(named: Named) -> JobResult:
    """Return a job from its output. Raises OutputError."""
    files = OutputFiles.of(named.uri)
    stages = {path: files.json(path) or {} for each in PATTERNS for path in files.names(each)}
    records = _records({path: v for path, v in stages.items() if path.endswith(RECORD)})
    found = [value for path, value in stages.items() if path.endswith(EVALUATED)]
    evaluation = next(iter(found), {})
    stored = files.json(f"{_RESULT}/{REPORT}") or files.json(REPORT)
    if not records and not found and stored is None:
        raise OutputError(
            "is not the output of a job: it has no folder stages with records and no "
            f"{_RESULT}/{REPORT}. Give the folder that spec.output.uri names"
        )
    if found and (changed := changed_after_evaluation(stages)):
        raise OutputError(
            f"{', '.join(changed)} changed after the evaluation: run the job, which evaluates the "
            "new model"
        )
    manifest = _manifest(files) or shareable(named.manifest or {})
    known = manifest or {"metadata": {"name": _name(files)}}
    by_kind: dict[str, StageRecord] = {record.kind: record for record in records}
    evaluated = next((by_kind[kind] for kind in EVALUATION_KINDS if kind in by_kind), None)
    report = report_of(files, stored, records, known, evaluation)
    sources = evaluated.input_digests if evaluated else {}
    suites = evaluated.details.get("suites") if evaluated else None
    asked = AskedItems(
        rows=_held_out(files, records, "prepare", sources.get("data")),
        preferences=_held_out(files, records, "pairs", sources.get("pairs")),
        sources=sources,
        suites=suite_sources(manifest, suites if isinstance(suites, dict) else {}, sources),
    )
    return JobResult(
        files=files,
        report=report,
        manifest=manifest,
        records=by_kind,
        asked=asked,
        measurements=Measurements.of(evaluation, asked),
        evaluated=bool(found) or any(each.kind in EVALUATION_KINDS for each in report.stages),
    )


def _records(found: Mapping[str, Any]) -> list[StageRecord]:
    records = []
    for name, value in found.items():
        try:
            records.append(StageRecord.model_validate(value))
        except ValidationError as error:
            raise OutputError(
                f"{name} is no record of a stage ({error.errors()[0]['msg']}): use the version of "
                "tuneyard that wrote it"
            ) from error
    return sorted(records, key=lambda record: record.started_at)


def _manifest(files: OutputFiles) -> Mapping[str, Any]:
    """Return the manifest that the export stage wrote. {}: it has not run, or in an earlier run,
    whose settings are others."""
    if files.read(f"{_RESULT}/{EARLIER_FILE}") is not None:
        return {}
    text = files.read(f"{_RESULT}/job.yaml") or files.read("job.yaml")
    try:
        value = shareable(yaml.safe_load(text)) if text else {}
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise OutputError("job.yaml is damaged and cannot be read: copy it again") from error
    return value if isinstance(value, dict) else {}


def _name(files: OutputFiles) -> str:
    """Return the name of the job that owns the output, or else of the output's folder."""
    owner = (files.json(OWNER_FILE) or {}).get("job")
    name = owner.get("name") if isinstance(owner, dict) else None
    return str(name or files.place.rpartition("/")[2])


def _held_out(
    files: OutputFiles, records: Sequence[StageRecord], kind: str, digest: str | None
) -> list[str]:
    """Return the digests of the held-out rows that a stage of this kind wrote and the evaluation
    read. `digest`: that of the stage's output; None: unknown, so of the last such stage."""
    stages = [record for record in records if record.kind == kind]
    chosen = [record for record in stages if record.digest == digest] if digest else stages
    content = files.read(f"stages/{chosen[-1].stage}/{HELD_OUT}") if chosen else None
    return [] if content is None else line_digests(content)
