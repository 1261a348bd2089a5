"""The report of a job as a document, from its facts and the export stage's inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneyard.api.exports import JOB
from tuneyard.api.plan import StageRecord
from tuneyard.api.report import (
    Comparison,
    Curve,
    File,
    Forgetting,
    JobReport,
    LedgerLine,
    Lineage,
    MaskPart,
    Parent,
    Point,
    ReportedJob,
    Source,
    Stage,
    StageMemory,
    Suite,
    Tokens,
)
from tuneyard.api.stage_settings import EVALUATION_KINDS, TRAINING_KINDS
from tuneyard.api.suites import KINDS
from tuneyard_trainer.data.encoding.masks import Run
from tuneyard_trainer.reporting import plots, words
from tuneyard_trainer.reporting.answered import answers, suite_answers
from tuneyard_trainer.reporting.comparisons import finite, measured
from tuneyard_trainer.reporting.results import Sample, last_trained, seconds_of_attempts
from tuneyard_trainer.reporting.summary import RunSummary

EVALUATION = "evaluation.json"
MEASURING_KINDS = (*EVALUATION_KINDS, "leaks")
"""The kinds of stages that the result is not made by."""
MOST_POINTS = 1000
"""Points of a curve; longer ones are thinned."""


def document(
    summary: RunSummary,
    inputs: Mapping[str, Path],
    rows: Sequence[Sequence[Run]],
    files: Sequence[tuple[str, str]],
) -> JobReport:
    """Return the report. `inputs`: those of the export stage. `rows`: the first training rows.
    `files`: names and descriptions of what is beside the report."""
    evaluation = summary.record(*EVALUATION_KINDS)
    details = evaluation.details if evaluation else {}
    written = _evaluation(inputs.get("evaluation"))
    training = last_trained(summary.records.values())
    metrics = measured(training, evaluation)
    compared = list(summary.results.compared)
    samples = written.get("answers") or details.get("samples", [])
    forgetting = _forgetting(summary, training)
    examples = _examples(metrics)
    gates = summary.results.gates
    return JobReport(
        job=_job(summary, training),
        summary=words.summary(compared, gates, forgetting, examples),
        warnings=list(summary.results.warnings),
        comparisons=compared,
        gates=list(gates),
        metrics={name: finite(value) for name, value in metrics.items()},
        few_shot_examples=examples[0] if examples else None,
        few_shot_tokens=examples[1] if examples else None,
        curves=_curves(summary.curves),
        ledger=[
            LedgerLine(outcome=outcome, rows=number_of, tokens=tokens)
            for outcome, number_of, tokens in summary.ledger_counts
        ],
        mask_samples=[
            [MaskPart(text=part.text, trained=part.trained) for part in row] for row in rows
        ],
        answers=answers([Sample.of(each) for each in samples], written.get("items", {}), compared),
        answers_held_out=summary.results.held_out,
        answers_total=len(samples),
        suite_answers=suite_answers(
            written.get("suiteAnswers", {}), written.get("items", {}), compared
        ),
        suites=[*_suites(summary, compared, details.get("suites", {}))],
        forgetting=forgetting,
        memory=[
            StageMemory(
                stage=record.stage,
                measured_bytes=_whole(record.metrics.get("peakMemoryBytes")),
                planned_bytes=_whole(record.details.get("plannedMemoryBytes")),
            )
            for record in summary.stages
            if record.kind in TRAINING_KINDS
        ],
        stages=[_stage(record) for record in summary.stages],
        seconds=sum(map(seconds_of_attempts, summary.stages)),
        tokens=_tokens(summary, training),
        lineage=_lineage(summary),
        files=[File(name=name, description=what) for name, what in files],
    )


def _evaluation(folder: Path | None) -> dict[str, Any]:
    """Return the contents of `evaluation.json`; {}: the job measured nothing."""
    path = folder / EVALUATION if folder else None
    if path is None or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _examples(metrics: Mapping[str, float]) -> tuple[int, float] | None:
    if "fewShotExamples" not in metrics:
        return None
    return int(metrics["fewShotExamples"]), metrics["fewShotTokens"]


def _job(summary: RunSummary, training: StageRecord | None) -> ReportedJob:
    revision = summary.spec.get("model", {}).get("revision")
    return ReportedJob(
        name=summary.name,
        kind=str(summary.manifest.get("kind", "")),
        base_model=summary.base,
        base_revision=None if revision is None else str(revision),
        method=summary.method,
        adapter=summary.adapter,
        seed=_whole(summary.training_settings.get("seed")),
        versions=dict(training.versions) if training else {},
        sentence=summary.sentence,
    )


def _curves(curves: plots.Curves) -> list[Curve]:
    found = [
        Curve(
            metric=panel.metric,
            label=panel.label,
            training=_points(panel.training),
            held_out=_points(panel.held_out),
            base=finite(panel.base),
        )
        for panel in curves.panels
    ]
    rates = Curve(
        metric="learningRate", label="Learning rate", training=_points(curves.learning_rate)
    )
    return [*found, rates]


def _points(points: plots.Points) -> list[Point]:
    return [
        Point(step=step, value=finite(value)) for step, value in plots.thinned(points, MOST_POINTS)
    ]


def _suites(
    summary: RunSummary, compared: Sequence[Comparison], details: Mapping[str, Any]
) -> Iterator[Suite]:
    """Yield the suites in the order of the manifest, then others with metrics."""
    planned = (summary.spec.get("evaluate") or {}).get("suites") or []
    kinds = {
        str(suite.get("name") or (suite.get("task") or {}).get("name", "")): next(
            (kind for kind in KINDS if suite.get(kind)), ""
        )
        for suite in planned
    }
    metrics: dict[str, list[Comparison]] = {}
    for each in compared:
        if each.suite is not None:
            metrics.setdefault(each.suite, []).append(each)
    for name in dict.fromkeys((*kinds, *metrics)):
        items = (details.get(name) or {}).get("items")
        yield Suite(
            name=name,
            kind=kinds.get(name, kinds.get(name.partition("/")[0], "")),
            items=_whole(items),
            metrics=[each.metric for each in metrics.get(name, [])],
        )


def _forgetting(summary: RunSummary, training: StageRecord | None) -> Forgetting | None:
    metrics = training.metrics if training else {}
    if training is None or "generalLoss" not in metrics:
        return None
    loss, base = finite(metrics["generalLoss"]), finite(metrics.get("baseGeneralLoss"))
    increase = finite(metrics.get("generalLossIncrease"))
    if increase is None and loss is not None and base is not None:
        increase = loss - base
    guard = summary.training_settings.get("guard") or {}
    return Forgetting(
        base_loss=base,
        loss=loss,
        increase=increase,
        allowed=finite(guard.get("worsensBy")),
        stopped=training.details.get("stoppedByGuard"),
    )


def _stage(record: StageRecord) -> Stage:
    return Stage(
        name=record.stage,
        kind=record.kind,
        started_at=record.started_at,
        finished_at=record.finished_at,
        seconds=seconds_of_attempts(record),
        attempt=record.attempt,
        digest=record.digest,
        reused=record.reused,
    )


def _tokens(summary: RunSummary, training: StageRecord | None) -> Tokens:
    data = summary.record("prepare", "pairs")
    prepared, trained = data.metrics if data else {}, training.metrics if training else {}
    return Tokens(
        prepared=_whole(prepared.get("tokens")),
        targets=_whole(prepared.get("targetTokens")),
        trained=_whole(trained.get("tokens")),
        per_second=finite(trained.get("tokensPerSecond")),
    )


def _lineage(summary: RunSummary) -> Lineage:
    sources = [*_sources(summary)]
    parents = {
        (source.role, source.uri): Parent(role=source.role, uri=source.uri)
        for source in sources
        if source.uri.startswith(JOB)
    }
    return Lineage(sources=sources, parents=list(parents.values()))


def _sources(summary: RunSummary) -> Iterator[Source]:
    """Yield what the stages that made the result read and no stage wrote: the model, then others by
    role."""
    written = {record.digest for record in summary.stages}
    revision = summary.spec.get("model", {}).get("revision")
    found: dict[tuple[str, str], Source] = {}
    for record in summary.stages:
        for role, digest in record.input_digests.items():
            uri = summary.source_uri(record.kind, role)
            is_source = uri or record.kind in ("prepare", "pairs")
            if record.kind in MEASURING_KINDS or digest in written or not is_source:
                continue
            of_model = role == "model" and revision is not None
            found[role, digest] = Source(
                role=role, uri=uri, revision=str(revision) if of_model else None, digest=digest
            )
    yield from sorted(found.values(), key=lambda each: (each.role != "model", each.role))


def _whole(value: Any) -> int | None:
    """Return a number as a whole one. None: it is none, or not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    found = finite(value) if is_number else None
    return None if found is None else round(found)
