"""The stages of a FineTuneJob."""

from __future__ import annotations

from tuneyard.api.finetunejob import FineTuneSpec
from tuneyard.api.plan import Input, StageInput, TrainRuntime
from tuneyard.api.stage_settings import ExportSettings
from tuneyard.errors import PlanError
from tuneyard.planning import defaults
from tuneyard.planning.augmentation import augmentation
from tuneyard.planning.drafts import (
    Draft,
    Sharding,
    data_inputs,
    default_notes,
    evaluate,
    general_inputs,
    prepare,
    runtime,
    source_input,
    train,
)
from tuneyard.planning.limits import can_shard, fine_tuning_faults


def fine_tuning_stages(spec: FineTuneSpec) -> tuple[list[Draft], list[str]]:
    """Return the stages of a FineTuneJob and the notes for the user. Raises PlanError."""
    faults = fine_tuning_faults(spec)
    if faults:
        raise PlanError(faults)
    rule = defaults.rule(spec.method, spec.adapter.kind if spec.adapter else "full")
    return _drafts(spec, rule), _notes(spec, rule)


def _drafts(spec: FineTuneSpec, rule: defaults.Rule) -> list[Draft]:
    """Return augment (if rows are added), prepare, the training stage, evaluate (if rows are held
    out) and export."""
    model = source_input(spec.model, "spec.model")
    data, tuned = StageInput(stage="prepare"), StageInput(stage=spec.method)
    inputs: dict[str, Input] = {"model": model, "data": data, "tuned": tuned}
    augmented, rows = augmentation(spec.data, "spec.data", model)
    drafts = [
        *augmented,
        Draft(
            "prepare",
            prepare(spec.data, spec.method, spec.training),
            {
                "model": model,
                **data_inputs(spec.data, "spec.data"),
                **rows,
                **general_inputs(spec.training, "spec.training"),
            },
        ),
        Draft(
            spec.method,
            train(spec.method, spec.adapter, spec.data.packing, spec.training, rule),
            {"model": model, "data": data},
            runtime(spec.training, _sharding(spec)),
        ),
    ]
    if spec.data.validation is not None:
        measured = TrainRuntime(sharding=_sharding(spec))
        drafts.append(Draft("evaluate", evaluate(spec.evaluate), inputs, measured))
        inputs = {**inputs, "evaluation": StageInput(stage="evaluate")}
    return [*drafts, Draft("export", ExportSettings(merge=spec.output.merge), inputs)]


def _sharding(spec: FineTuneSpec) -> Sharding:
    """Return the sharding of the stages that run the model. The native loop shards nothing."""
    if spec.training.engine == "native" or not can_shard(spec.adapter):
        return "none"
    return spec.compute.sharding


def _notes(spec: FineTuneSpec, rule: defaults.Rule) -> list[str]:
    notes = default_notes("training", spec.training, rule, defaults.EPOCHS)
    return notes if spec.data.validation else [*notes, _nothing_held_out(spec)]


def _nothing_held_out(spec: FineTuneSpec) -> str:
    steps, samples = spec.training.evaluation_steps, spec.evaluate.samples
    unused = [f"training.evaluationSteps ({steps})"] if steps else []
    unused += [f"evaluate.samples ({samples})"] if samples else []
    ending = f"; without effect: {', '.join(unused)}." if unused else "."
    return (
        "No held-out rows (data.validation is not set): there is no evaluate stage and no held-out "
        f"loss, and the last weights are kept{ending}"
    )
