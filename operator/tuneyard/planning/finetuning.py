"""The stages of a FineTuneJob."""

from __future__ import annotations

from collections.abc import Mapping

from tuneyard.api.finetunejob import FineTuneSpec
from tuneyard.api.plan import Input, StageInput
from tuneyard.api.stage_settings import ChatSettings, ExportSettings
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
    judge_input,
    leaks,
    prepare,
    runtime,
    source_input,
    train,
    with_suites,
)
from tuneyard.planning.limits import can_shard, fine_tuning_faults
from tuneyard.planning.suites import suite_inputs


def fine_tuning_stages(spec: FineTuneSpec) -> tuple[list[Draft], list[str]]:
    """Return the stages of a FineTuneJob and the notes for the user. Raises PlanError."""
    faults = fine_tuning_faults(spec)
    if faults:
        raise PlanError(faults)
    rule = defaults.rule(spec.method, spec.adapter.kind if spec.adapter else "full")
    return _drafts(spec, rule), _notes(spec, rule)


def _drafts(spec: FineTuneSpec, rule: defaults.Rule) -> list[Draft]:
    """Return augment (if rows are added), prepare, leaks (if suites have files), the training
    stage, evaluate (if rows are held out or there are suites) and export."""
    model = source_input(spec.model, "spec.model")
    data, tuned = StageInput(stage="prepare"), StageInput(stage=spec.method)
    inputs: dict[str, Input] = {"model": model, "data": data, "tuned": tuned}
    augmented, rows = augmentation(spec.data, "spec.data", model)
    searched = leaks(spec.evaluate, spec.data.leaks, data=spec.data, data_path="spec.data")
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
        *searched,
        with_suites(
            Draft(
                spec.method,
                train(spec.method, spec.adapter, spec.data.packing, spec.training, rule),
                {"model": model, "data": data},
                runtime(spec.training, _sharding(spec)),
            ),
            spec.training,
            spec.evaluate,
            chat=None,
        ),
    ]
    if spec.data.validation is not None or spec.evaluate.suites:
        drafts.append(_evaluation(spec, inputs))
        inputs = {**inputs, "evaluation": StageInput(stage="evaluate")}
    if searched:
        inputs = {**inputs, "leaks": StageInput(stage="leaks")}
    return [*drafts, Draft("export", ExportSettings(merge=spec.output.merge), inputs)]


def _evaluation(spec: FineTuneSpec, inputs: Mapping[str, Input]) -> Draft:
    """Return the stage that measures the result on held-out rows and suites. Without held-out rows
    it does not read the prepared data."""
    win_rate, settings = spec.evaluate.win_rate, evaluate(spec.evaluate)
    judge, runtime = judge_input(
        win_rate.judge if win_rate else None, "spec.evaluate.winRate.judge"
    )
    measured = {**inputs, **judge, **suite_inputs(spec.evaluate)}
    if spec.data.validation is None:
        del measured["data"]
        chat = ChatSettings(system_prompt=None, chat_template=spec.data.chat_template)
        settings = settings.model_copy(update={"chat": chat})
    sharding = {"sharding": _sharding(spec)}
    return Draft("evaluate", settings, measured, runtime.model_copy(update=sharding))


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
    suites = bool(spec.training.suites)
    best = spec.training.best_by if spec.training.keep_best else None
    unused = [f"training.evaluationSteps ({steps})"] if steps and not suites else []
    unused += [f"evaluate.samples ({samples})"] if samples else []
    missing = "" if spec.evaluate.suites else "no evaluate stage and "
    kept = "last weights" if not suites or best is None else f"weights with the best {best}"
    ending = f"; without effect: {', '.join(unused)}." if unused else "."
    return (
        f"No held-out rows (data.validation is not set): there is {missing}no held-out loss, and "
        f"the {kept} are kept{ending}"
    )
