"""The stages of a FineTuneJob."""

from __future__ import annotations

from tuneyard.api.finetunejob import FineTuneSpec
from tuneyard.api.plan import Input, SourceInput, StageInput
from tuneyard.api.stage_settings import ExportSettings
from tuneyard.errors import PlanError
from tuneyard.planning import defaults
from tuneyard.planning.drafts import (
    Draft,
    dataset_inputs,
    evaluate,
    model_input,
    prepare,
    runtime,
    train,
)
from tuneyard.planning.limits import fine_tuning_faults


def fine_tuning_stages(spec: FineTuneSpec) -> tuple[list[Draft], list[str]]:
    """A FineTuneJob's stages, and what the user is told of them."""
    faults = fine_tuning_faults(spec)
    if faults:
        raise PlanError(faults)
    rule = defaults.rule(spec.method, spec.adapter.kind if spec.adapter else "full")
    return _drafts(spec, rule), fine_tuning_notes(spec, rule)


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


def fine_tuning_notes(spec: FineTuneSpec, rule: defaults.Rule) -> list[str]:
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
