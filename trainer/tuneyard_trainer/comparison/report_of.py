"""The report of a job: the one in its output, or a new one from the records of its stages.

A job that missed a gate has exported no report, and an earlier version wrote none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from tuneyard.api.plan import StageRecord
from tuneyard.api.report import REPORT, VERSION, JobReport, ReportedJob
from tuneyard.api.stage_settings import EVALUATION_KINDS
from tuneyard_trainer.comparison.files import OutputError, OutputFiles
from tuneyard_trainer.reporting.document import EVALUATION, document
from tuneyard_trainer.reporting.plots import Curves
from tuneyard_trainer.reporting.results import Results, last_trained
from tuneyard_trainer.reporting.summary import RunSummary
from tuneyard_trainer.training.history import METRICS

NEWER = "use the version of tuneyard that wrote it, or a newer one"


def report_of(
    files: OutputFiles,
    stored: Mapping[str, Any] | None,
    records: Sequence[StageRecord],
    manifest: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> JobReport:
    """Return the report of a job. Raises OutputError. `manifest`: without `spec` if the settings
    are not known.

    `stored`: the report in the output, as JSON; None: there is none. `evaluation`: the contents of
    `evaluation.json`; {}: there is none.
    """
    found = None if stored is None else _read(stored)
    digests = {record.digest for record in records}
    if found is not None and (
        not records or all(stage.digest in digests for stage in found.stages)
    ):
        return found
    try:
        return _written_anew(files, records, manifest, evaluation)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise OutputError(
            f"the files of its stages cannot be read ({type(error).__name__}: {error}): use the "
            "version of tuneyard that wrote them"
        ) from error


def _read(stored: Mapping[str, Any]) -> JobReport:
    version = stored.get("version")
    if isinstance(version, int) and version > VERSION:
        raise OutputError(
            f"{REPORT} has version {version}, and this version of tuneyard reads up to {VERSION}: "
            f"{NEWER}"
        )
    try:
        return JobReport.model_validate(stored)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise OutputError(f"{REPORT} cannot be read: {place}: {fault['msg']}: {NEWER}") from error


def _written_anew(
    files: OutputFiles,
    records: Sequence[StageRecord],
    manifest: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> JobReport:
    kept = [record for record in records if record.kind not in EVALUATION_KINDS]
    evaluated = [record for record in records if record.kind in EVALUATION_KINDS]
    if not evaluated and evaluation and kept:
        evaluated = [_without_export(kept[-1], evaluation)]
    by_stage = {record.stage: record for record in (*kept, *evaluated)}
    trained = last_trained(kept)
    with TemporaryDirectory() as scratch:
        copy = Path(scratch)
        if trained:
            _copy(files, f"stages/{trained.stage}/{METRICS}", copy / METRICS)
        if evaluated:
            _copy(files, f"stages/{evaluated[-1].stage}/{EVALUATION}", copy / EVALUATION)
        summary = RunSummary(
            manifest=manifest,
            records=by_stage,
            stages=[*by_stage.values()],
            results=Results.of(by_stage),
            curves=Curves.read(copy / METRICS, trained.kind if trained else "sft"),
            measured={},
            base_license=None,
            has_adapter=False,
            has_model=False,
            has_chat_template=False,
        )
        found = document(summary, {"evaluation": copy} if evaluated else {}, [], [])
    return found if "spec" in manifest else _without_settings(found)


def _copy(files: OutputFiles, name: str, target: Path) -> None:
    """Copy a file of the output, if there is one."""
    content = files.read(name)
    if content is not None:
        target.write_bytes(content)


def _without_settings(report: JobReport) -> JobReport:
    """Return a report that says nothing of settings that are not known."""
    job = report.job
    known = ReportedJob(
        name=job.name, kind=job.kind, base_model="", method="", versions=job.versions
    )
    return report.model_copy(update={"job": known})


def _without_export(before: StageRecord, evaluation: Mapping[str, Any]) -> StageRecord:
    """Return a record of an evaluation that missed a gate, which has none. `before`: the record of
    the stage before it."""
    found = {name: evaluation.get(name) or [] for name in ("samples", "gates")}
    metrics = evaluation.get("metrics") or {}
    return StageRecord(
        stage="evaluate",
        kind="evaluate",
        identity="",
        input_digests={},
        digest="",
        attempt=before.attempt,
        started_at=before.finished_at,
        finished_at=before.finished_at,
        metrics={name: value for name, value in metrics.items() if isinstance(value, float)},
        details={**found, "evidence": evaluation.get("evidence") or {}},
    )
