"""From a job to its plan."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob, FineTuneSpec
from tuneyard.api.meta import API_VERSION
from tuneyard.api.plan import ExportSettings, Input, JobRef, Plan, SourceInput, StageInput
from tuneyard.errors import PlanError
from tuneyard.planning import alignment, defaults
from tuneyard.planning.drafts import (
    Draft,
    dataset_inputs,
    evaluate,
    fingerprinted,
    model_input,
    prepare,
    runtime,
    train,
)
from tuneyard.planning.limits import fine_tuning_faults


def plan_job(job: FineTuneJob | AlignmentJob) -> Plan:
    """A job's stages, in order. Raises PlanError with every part that cannot be carried out."""
    drafts, notes = (
        alignment.draft(job.spec) if isinstance(job, AlignmentJob) else _fine_tuning(job.spec)
    )
    return Plan(
        api_version=API_VERSION,
        job=JobRef(kind=job.kind, name=job.metadata.name, namespace=job.metadata.namespace),
        stages=fingerprinted(drafts),
        output=job.spec.output,
        compute=job.spec.compute,
        manifest=_manifest(job),
        notes=notes,
    )


def _fine_tuning(spec: FineTuneSpec) -> tuple[list[Draft], list[str]]:
    """A FineTuneJob's stages, and what the user is told of them."""
    faults = fine_tuning_faults(spec)
    if faults:
        raise PlanError(faults)
    rule = defaults.rule(spec.method, spec.adapter.kind if spec.adapter else "full")
    return _drafts(spec, rule), _notes(spec, rule)


# ---- stages -----------------------------------------------------------------------------------


def _drafts(spec: FineTuneSpec, rule: defaults.Rule) -> list[Draft]:
    """prepare, the training stage, evaluate (where rows are held out) and export."""
    model = model_input(spec.model)
    data, tuned = StageInput(stage="prepare"), StageInput(stage=spec.method)
    inputs: dict[str, Input] = {"model": model, "data": data, "tuned": tuned}
    drafts = [
        Draft("prepare", prepare(spec.data, spec.method), {"model": model, **_data_inputs(spec)}),
        Draft(
            spec.method,
            train(spec.method, spec.adapter, spec.data.packing, spec.training, rule),
            {"model": model, "data": data},
            runtime(spec.training),
        ),
    ]
    if spec.data.validation is not None:
        drafts.append(Draft("evaluate", evaluate(spec.evaluate), inputs))
        inputs = {**inputs, "evaluation": StageInput(stage="evaluate")}
    return [*drafts, Draft("export", ExportSettings(merge=spec.output.merge), inputs)]


def _data_inputs(spec: FineTuneSpec) -> dict[str, SourceInput]:
    held_out = spec.data.validation and spec.data.validation.data
    return {
        **dataset_inputs("train", "spec.data.train", spec.data.train),
        **dataset_inputs("validation", "spec.data.validation.data", held_out or []),
    }


# ---- what the user is told --------------------------------------------------------------------


def _notes(spec: FineTuneSpec, rule: defaults.Rule) -> list[str]:
    """One sentence for each decision that the planner took in the user's stead."""
    training, source = spec.training, f"{rule.title} default (docs/defaults.md)"
    notes = []
    if training.learning_rate == "auto":
        notes.append(f"learningRate {rule.learning_rate:g}: {source}.")
    if training.batch_size == "auto":
        notes.append(f"batchSize {rule.batch_size}: {source}.")
    if training.epochs is None and training.max_steps is None:
        notes.append(
            f"epochs {defaults.EPOCHS:g}: the default, as neither epochs nor maxSteps is set."
        )
    if spec.data.validation is None:
        notes.append(_nothing_held_out(spec))
    return notes


def _nothing_held_out(spec: FineTuneSpec) -> str:
    idle = [
        f"training.evaluationSteps ({spec.training.evaluation_steps})"
        if spec.training.evaluation_steps
        else "",
        f"evaluate.samples ({spec.evaluate.samples})" if spec.evaluate.samples else "",
    ]
    lost = " and ".join(filter(None, idle))
    return (
        "No held-out rows (data.validation is not set): there is no evaluate stage, no held-out "
        "loss, and the last weights are kept" + (f"; {lost} comes to nothing." if lost else ".")
    )


def _manifest(job: FineTuneJob | AlignmentJob) -> dict[str, Any]:
    """The job as a manifest: no status, nothing that only a cluster knows, no empty fields."""
    metadata = {
        "name": job.metadata.name,
        "namespace": job.metadata.namespace,
        "labels": job.metadata.labels,
    }
    return {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "metadata": {key: value for key, value in metadata.items() if value},
        "spec": {key: value for key, value in _dump(job.spec).items() if key != "runPolicy"},
    }


def _dump(value: Any) -> Any:
    """`model_dump`, without the fields that are None by default: a None that overrides a default
    (`maxGradientNorm: null`) must survive."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            field.alias or name: _dump(getattr(value, name))
            for name, field in fields.items()
            if getattr(value, name) is not None or field.default is not None
        }
    if isinstance(value, list):
        return [_dump(item) for item in value]
    return value
