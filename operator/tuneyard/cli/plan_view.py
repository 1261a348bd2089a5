"""The output of `tuneyard plan`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuneyard.api.adapters import Adapter
from tuneyard.api.plan import Input, Plan, PlannedStage, SourceInput, StageInput
from tuneyard.api.stage_settings import (
    AugmentSettings,
    CritiqueSettings,
    DistillSettings,
    DpoSettings,
    EvaluateSettings,
    FeedbackSettings,
    GrpoSettings,
    LoopSettings,
    PairsSettings,
    PpoSettings,
    RewardSettings,
    Settings,
    TrainSettings,
)
from tuneyard.planning.defenses import describe_guard, describe_terms


def print_plan(console: Console, plan: Plan) -> None:
    """Print a plan's stages, locations, main settings and notes."""
    console.print(Text(f"{plan.job.kind} {plan.job.name}", style="bold"))
    table = Table("Stage", "What it does", "Reads", "Fingerprint", box=None, pad_edge=False)
    for stage in plan.stages:
        table.add_row(stage.name, describe_stage(stage), _inputs(stage), stage.fingerprint[7:19])
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in [*_locations(plan), *_settings(plan)]:
        facts.add_row(name, value)
    for note in plan.notes:
        facts.add_row("note", note)
    console.print()
    console.print(facts)


def describe_stage(stage: PlannedStage) -> str:
    """Return what a stage does, in a few words."""
    settings = stage.settings
    if settings.kind == "prepare":
        rows = "chats" if settings.method == "sft" else "text"
        return f"read, check, split and tokenize the {rows}"
    if settings.kind == "leaks":
        return "search the items of the suites in the training data"
    if isinstance(settings, AugmentSettings):
        return f"make new rows by {', '.join(_ways(settings))}"
    if isinstance(settings, EvaluateSettings):
        return _describe_evaluation(settings, stage.inputs)
    if settings.kind == "export":
        merged = ", also merged" if settings.merge else ""
        return f"write the model, its tokenizer and its card{merged}"
    return _describe_alignment(settings)


def _describe_evaluation(settings: EvaluateSettings, inputs: Mapping[str, Input]) -> str:
    if "tuned" not in inputs:
        return "measure the reward model on held-out preferences"
    before = "the model before" if settings.completions else "the base"
    models = f"{before} and the tuned model" if settings.compare_with_base else "the tuned model"
    names = [suite.name for suite in settings.suites or ()]
    items = [f"held-out {'rows' if 'data' in inputs else 'prompts'}"]
    if names and "data" not in inputs and not settings.completions:
        items = []
    items += [f"the suite{'s' if names[1:] else ''} {', '.join(names)}"] if names else []
    return f"measure {models} on {' and '.join(items)}"


def _ways(settings: AugmentSettings) -> Iterator[str]:
    if settings.paraphrase:
        yield "paraphrase"
    if settings.inversion:
        yield "inversion"
    if settings.templates:
        yield "templates"


def _describe_alignment(settings: Settings) -> str:
    if isinstance(settings, CritiqueSettings):
        times = "once" if settings.revisions == 1 else f"{settings.revisions} times"
        return f"sample completions, criticize and revise them {times}"
    if isinstance(settings, FeedbackSettings):
        return f"sample {settings.responses_per_prompt} completions a prompt, let a judge compare"
    if isinstance(settings, PairsSettings):
        return "read, check, split and tokenize the preferences"
    return _describe_training(settings)


def _describe_training(settings: Settings) -> str:
    loop = _loop(settings)
    if loop is None:
        return settings.kind
    scope = f"{_weights(getattr(settings, 'adapter', None))}, {_length(loop)}"
    if isinstance(settings, RewardSettings):
        return f"train a reward model: {scope}"
    if isinstance(settings, DpoSettings):
        return f"align by {'' if settings.loss == 'kto' else 'dpo, '}{settings.loss}: {scope}"
    if isinstance(settings, PpoSettings | GrpoSettings):
        method = settings.estimator if isinstance(settings, GrpoSettings) else "ppo"
        return f"align by {method}: {scope}"
    if isinstance(settings, DistillSettings):
        return f"distill the teacher: {scope}"
    return f"train {scope}"


def _weights(adapter: Adapter | None) -> str:
    return adapter.kind if adapter else "all weights"


def _length(loop: LoopSettings) -> str:
    if loop.max_steps is not None:
        return f"{loop.max_steps} steps"
    return f"{loop.epochs:g} epoch" + ("" if loop.epochs == 1 else "s")


def _inputs(stage: PlannedStage) -> str:
    return ", ".join(
        source.stage if isinstance(source, StageInput) else role
        for role, source in stage.inputs.items()
    )


def _locations(plan: Plan) -> Iterable[tuple[str, str]]:
    """Yield the sources that the plan reads, with their roles, and its output folder."""
    sources = {
        source.uri: role
        for stage in plan.stages
        for role, source in stage.inputs.items()
        if isinstance(source, SourceInput)
    }
    for uri, role in sources.items():
        yield role, uri
    yield "output", plan.output.uri
    if tracking := plan.tracking:
        if tracking.mlflow:
            experiment = tracking.mlflow.experiment or plan.job.name
            yield "mlflow", f"{tracking.mlflow.uri}, experiment {experiment}"
        if tracking.tensorboard:
            yield "tensorboard", tracking.tensorboard.uri or f"{plan.output.uri}/tensorboard"


def _settings(plan: Plan) -> Iterable[tuple[str, str]]:
    """Yield the most important resolved settings."""
    loops = {
        stage.name: loop
        for stage in plan.stages
        if (loop := _loop(stage.settings)) and not stage.name.endswith(_LATER_ROUNDS)
    }
    for name, loop in loops.items():
        of = f", {name}" if len(loops) > 1 else ""
        if loop.engine:
            yield f"engine{of}", loop.engine
        yield f"learning rate{of}", f"{loop.learning_rate:g}, {loop.schedule.type}"
        yield f"batch size{of}", f"{loop.batch_size} sequences a step, over all workers"
        yield f"precision{of}", loop.precision
        yield f"seed{of}", str(loop.seed)
        if loop.suites:
            names = ", ".join(f"{suite.name} ({suite.items} items)" for suite in loop.suites)
            yield f"measured during training{of}", names
        if loop.best_by:
            yield f"best by{of}", loop.best_by
        if isinstance(loop, TrainSettings) and loop.preserve:
            yield f"against forgetting{of}", describe_terms(loop.preserve)
        if isinstance(loop, TrainSettings) and loop.guard:
            yield f"guard{of}", describe_guard(loop.guard)
    yield "workers", str(plan.compute.workers or 1)
    if sharding := {stage.runtime.sharding for stage in plan.stages} - {"none"}:
        yield "sharding", ", ".join(sharding)
    yield "memory", "add --gpu NAME to see whether the job fits its GPUs"


_LATER_ROUNDS = tuple(f"-{number}" for number in range(2, 33))
"""Suffixes of the stages of later rounds, which have the settings of the first round."""


def _loop(settings: Settings) -> LoopSettings | None:
    if isinstance(settings, TrainSettings):
        return settings
    if isinstance(
        settings, RewardSettings | DpoSettings | PpoSettings | GrpoSettings | DistillSettings
    ):
        return settings.training
    return None
