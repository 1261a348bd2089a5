"""The report of a job: the one in its output, or a new one from the records of its stages.

A job that missed a gate has exported no report, and an earlier version wrote none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuneyard.api.plan import StageRecord
from tuneyard.api.report import REPORT, VERSION, JobReport
from tuneyard.api.stage_settings import EVALUATION_KINDS
from tuneyard_trainer.comparison.files import OutputError, OutputFiles
from tuneyard_trainer.reporting.document import document
from tuneyard_trainer.reporting.plots import Curves
from tuneyard_trainer.reporting.results import Results, last_trained
from tuneyard_trainer.reporting.summary import RunSummary

NEWER = "use the version of tuneyard that wrote it, or a newer one"


def report_of(
    files: OutputFiles,
    stored: Mapping[str, Any] | None,
    records: Sequence[StageRecord],
    manifest: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> JobReport:
    """Return the report of a job. Raises OutputError.

    `stored`: the report in the output, as JSON; None: there is none. `evaluation`: the contents of
    `evaluation.json`; {}: there is none.
    """
    found = None if stored is None else _read(stored)
    digests = {record.digest for record in records}
    if found is not None and (
        not records or all(stage.digest in digests for stage in found.stages)
    ):
        return found
    if files.folder is None:
        raise OutputError(
            f"has no {REPORT} of its present stages: run the job again with this version of "
            "tuneyard, or copy the output to a folder of this machine and give the folder"
        )
    try:
        return _written_anew(files.folder, records, manifest, evaluation)
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
    folder: Path,
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
    stage = folder / "stages" / (trained.stage if trained else "")
    summary = RunSummary(
        manifest=manifest,
        records=by_stage,
        results=Results.of(by_stage),
        curves=Curves.read(stage / "metrics.jsonl", trained.kind if trained else "sft"),
        measured={},
        base_license=None,
        has_adapter=False,
        has_model=False,
        has_chat_template=False,
    )
    inputs = {}
    if evaluated:
        inputs["evaluation"] = folder / "stages" / evaluated[-1].stage
    return document(summary, inputs, [], [])


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
