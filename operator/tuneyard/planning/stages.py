"""From a job to its plan."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob, FineTuneSpec
from tuneyard.api.meta import API_VERSION
from tuneyard.api.methods import Evaluate, Gate, Metric, Training
from tuneyard.api.plan import (
    DatasetSettings,
    EvaluateSettings,
    ExportSettings,
    Input,
    JobRef,
    Plan,
    PlannedStage,
    PrepareSettings,
    Settings,
    SourceInput,
    StageInput,
    TrainRuntime,
    TrainSettings,
)
from tuneyard.api.sources import Dataset, ModelSource
from tuneyard.errors import Fault, PlanError
from tuneyard.planning import defaults
from tuneyard.planning.fingerprint import fingerprint


def plan(job: FineTuneJob | AlignmentJob) -> Plan:
    """A job's stages, in order. Raises PlanError with every part that cannot be carried out."""
    if isinstance(job, AlignmentJob):
        message = "this version validates AlignmentJobs but does not run them yet"
        raise PlanError([Fault("kind", message)])
    faults = _unsupported(job.spec)
    if faults:
        raise PlanError(faults)
    rule = defaults.rule(job.spec.method, job.spec.adapter.kind if job.spec.adapter else "full")
    return Plan(
        api_version=API_VERSION,
        job=JobRef(kind=job.kind, name=job.metadata.name, namespace=job.metadata.namespace),
        stages=_fingerprinted(_drafts(job.spec, rule)),
        output=job.spec.output,
        compute=job.spec.compute,
        manifest=_manifest(job),
        notes=_notes(job.spec, rule),
    )


# ---- stages -----------------------------------------------------------------------------------


class _Draft(NamedTuple):
    """A stage before its fingerprint."""

    name: str
    settings: Settings
    inputs: Mapping[str, Input]
    runtime: TrainRuntime = TrainRuntime()


def _drafts(spec: FineTuneSpec, rule: defaults.Rule) -> list[_Draft]:
    """prepare, the training stage, evaluate (where rows are held out) and export."""
    model = _model_input(spec.model)
    data, tuned = StageInput(stage="prepare"), StageInput(stage=spec.method)
    inputs: dict[str, Input] = {"model": model, "data": data, "tuned": tuned}
    drafts = [
        _Draft("prepare", _prepare(spec), {"model": model, **_data_inputs(spec)}),
        _Draft(
            spec.method,
            _train(spec, rule),
            {"model": model, "data": data},
            _runtime(spec.training),
        ),
    ]
    if spec.data.validation is not None:
        drafts.append(_Draft("evaluate", _evaluate(spec.evaluate), inputs))
        inputs = {**inputs, "evaluation": StageInput(stage="evaluate")}
    return [*drafts, _Draft("export", ExportSettings(merge=spec.output.merge), inputs)]


def _fingerprinted(drafts: Sequence[_Draft]) -> list[PlannedStage]:
    kinds = {draft.name: draft.settings.kind for draft in drafts}
    return [
        PlannedStage(
            name=draft.name,
            settings=draft.settings,
            inputs=dict(draft.inputs),
            runtime=draft.runtime,
            fingerprint=fingerprint(draft.settings, draft.inputs, kinds),
        )
        for draft in drafts
    ]


def _model_input(model: ModelSource) -> SourceInput:
    return SourceInput(
        uri=model.uri,
        revision=model.revision,
        token_secret=model.token_secret,
        credentials=model.credentials,
        path="spec.model.uri",
    )


def _data_inputs(spec: FineTuneSpec) -> dict[str, SourceInput]:
    held_out = spec.data.validation and spec.data.validation.data
    return {
        **_dataset_inputs("train", "spec.data.train", spec.data.train),
        **_dataset_inputs("validation", "spec.data.validation.data", held_out or []),
    }


def _dataset_inputs(role: str, path: str, datasets: Sequence[Dataset]) -> dict[str, SourceInput]:
    return {
        f"{role}.{index}": SourceInput(
            uri=dataset.uri,
            token_secret=dataset.token_secret,
            credentials=dataset.credentials,
            path=f"{path}[{index}].uri",
        )
        for index, dataset in enumerate(datasets)
    }


def _dataset_settings(datasets: Sequence[Dataset]) -> list[DatasetSettings]:
    return [
        DatasetSettings(
            format=dataset.format,
            fields=dataset.fields,
            weight=dataset.weight,
            limit=dataset.limit,
        )
        for dataset in datasets
    ]


def _prepare(spec: FineTuneSpec) -> PrepareSettings:
    data, validation = spec.data, spec.data.validation
    return PrepareSettings(
        method=spec.method,
        train=_dataset_settings(data.train),
        validation=_dataset_settings((validation and validation.data) or []),
        validation_fraction=validation.fraction if validation else None,
        max_length=data.max_length,
        on_overlength=data.on_overlength,
        on_invalid_row=data.on_invalid_row,
        train_on=data.train_on,
        system_prompt=data.system_prompt,
        chat_template=data.chat_template,
        seed=defaults.SPLIT_SEED,
    )


def _train(spec: FineTuneSpec, rule: defaults.Rule) -> TrainSettings:
    training = spec.training
    return TrainSettings(
        kind=spec.method,
        adapter=spec.adapter,
        freeze=training.freeze,
        dropout=training.dropout,
        epochs=_epochs(training),
        max_steps=training.max_steps,
        batch_size=rule.batch_size if training.batch_size == "auto" else training.batch_size,
        learning_rate=(
            rule.learning_rate if training.learning_rate == "auto" else training.learning_rate
        ),
        schedule=training.schedule,
        optimizer=training.optimizer,
        packing=spec.data.packing,
        evaluation_steps=training.evaluation_steps,
        early_stopping=training.early_stopping,
        keep_best=training.keep_best,
        precision=training.precision,
        seed=training.seed,
    )


def _epochs(training: Training) -> float | None:
    if training.epochs is None and training.max_steps is None:
        return defaults.EPOCHS
    return training.epochs


def _runtime(training: Training) -> TrainRuntime:
    return TrainRuntime(
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_checkpointing=training.gradient_checkpointing,
        checkpoint_steps=training.checkpoint_steps,
    )


def _evaluate(evaluate: Evaluate) -> EvaluateSettings:
    return EvaluateSettings(
        compare_with_base=evaluate.compare_with_base,
        samples=evaluate.samples,
        max_new_tokens=evaluate.max_new_tokens,
        gates=evaluate.gates,
    )


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


def _manifest(job: FineTuneJob) -> dict[str, Any]:
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


# ---- what cannot be carried out ---------------------------------------------------------------


def _unsupported(spec: FineTuneSpec) -> list[Fault]:
    """Every part of a valid spec that this version cannot carry out, in the order of the fields."""
    evaluate, faults = spec.evaluate, []
    if evaluate.few_shot:
        message = (
            f"{evaluate.few_shot} worked examples belong to benchmark suites, which this version "
            "does not run yet: remove fewShot"
        )
        faults.append(Fault("spec.evaluate.fewShot", message))
    if evaluate.suites:
        message = (
            f"this version does not run benchmark suites ({', '.join(evaluate.suites)}) yet: "
            "remove suites, and judge the model by the held-out rows"
        )
        faults.append(Fault("spec.evaluate.suites", message))
    for index, gate in enumerate(evaluate.gates):
        problem = _gate_problem(gate, spec)
        if problem:
            faults.append(Fault(f"spec.evaluate.gates[{index}].metric", problem))
    return faults


def _gate_problem(gate: Gate, spec: FineTuneSpec) -> str | None:
    """Why a gate cannot be decided; None where it can."""
    known = get_args(Metric)
    if "/" in gate.metric:
        return (
            f"{gate.metric} is a metric of a benchmark suite, and this version does not run suites "
            f"yet: use one of {', '.join(known)}"
        )
    if gate.metric not in known:
        close = difflib.get_close_matches(gate.metric, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
        return f"there is no metric {gate.metric}: {hint}"
    if (
        gate.metric in ("lossReduction", "answerAccuracyGain")
        and not spec.evaluate.compare_with_base
    ):
        return (
            f"{gate.metric} is measured against the base model: set evaluate.compareWithBase: true"
        )
    if gate.metric.startswith("answerAccuracy") and spec.method == "pretrain":
        return (
            f"{gate.metric} needs rows with a prompt and an expected answer, and method is "
            "pretrain: use validationLoss, validationPerplexity or lossReduction"
        )
    return None
