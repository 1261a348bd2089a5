"""What plans of both kinds of job are made of: drafts of stages, and sources as their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from tuneyard.api.adapters import Adapter
from tuneyard.api.evaluation import Evaluate
from tuneyard.api.plan import Input, PlannedStage, SourceInput, TrainRuntime
from tuneyard.api.sources import Dataset, FineTuneData, ModelSource
from tuneyard.api.stage_settings import (
    DatasetSettings,
    EvaluateSettings,
    LoopSettings,
    PrepareSettings,
    Settings,
    TrainSettings,
)
from tuneyard.api.training import Training
from tuneyard.planning import defaults
from tuneyard.planning.fingerprint import fingerprint


class Draft(NamedTuple):
    """A stage before its fingerprint."""

    name: str
    settings: Settings
    inputs: Mapping[str, Input]
    runtime: TrainRuntime = TrainRuntime()


def fingerprinted(drafts: Sequence[Draft]) -> list[PlannedStage]:
    """The stages that the drafts stand for."""
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


def model_input(model: ModelSource, path: str = "spec.model") -> SourceInput:
    """A model; `path`: its field in the manifest."""
    return SourceInput(
        uri=model.uri,
        revision=model.revision,
        token_secret=model.token_secret,
        credentials=model.credentials,
        path=f"{path}.uri",
    )


def dataset_inputs(role: str, path: str, datasets: Sequence[Dataset]) -> dict[str, SourceInput]:
    """Data sets as `role.0`, `role.1` and so on; `path`: their field in the manifest."""
    return {
        f"{role}.{index}": SourceInput(
            uri=dataset.uri,
            token_secret=dataset.token_secret,
            credentials=dataset.credentials,
            path=f"{path}[{index}].uri",
        )
        for index, dataset in enumerate(datasets)
    }


def dataset_settings(datasets: Sequence[Dataset]) -> list[DatasetSettings]:
    """How each of them is read."""
    return [
        DatasetSettings(
            format=dataset.format,
            fields=dataset.fields,
            weight=dataset.weight,
            limit=dataset.limit,
        )
        for dataset in datasets
    ]


def runtime(training: Training) -> TrainRuntime:
    """How a training stage is carried out."""
    return TrainRuntime(
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_checkpointing=training.gradient_checkpointing,
        checkpoint_steps=training.checkpoint_steps,
    )


def prepare(data: FineTuneData, method: Literal["sft", "pretrain"]) -> PrepareSettings:
    """How training and held-out rows are prepared."""
    validation = data.validation
    return PrepareSettings(
        method=method,
        train=dataset_settings(data.train),
        validation=dataset_settings((validation and validation.data) or []),
        validation_fraction=validation.fraction if validation else None,
        max_length=data.max_length,
        on_overlength=data.on_overlength,
        on_invalid_row=data.on_invalid_row,
        train_on=data.train_on,
        system_prompt=data.system_prompt,
        chat_template=data.chat_template,
        seed=defaults.SPLIT_SEED,
    )


def train(
    method: Literal["sft", "pretrain"],
    adapter: Adapter | None,
    packing: Literal["auto", "always", "never"],
    training: Training,
    rule: defaults.Rule,
) -> TrainSettings:
    """How a model is trained on prepared rows."""
    return TrainSettings(
        kind=method,
        adapter=adapter,
        packing=packing,
        **dict(loop(training, rule, epochs=defaults.EPOCHS)),
    )


def loop(training: Training, rule: defaults.Rule, *, epochs: float) -> LoopSettings:
    """A training loop with `auto` decided by `rule`. `epochs`: where the manifest says nothing."""
    open_ended = training.epochs is None and training.max_steps is None
    return LoopSettings(
        freeze=training.freeze,
        dropout=training.dropout,
        epochs=epochs if open_ended else training.epochs,
        max_steps=training.max_steps,
        batch_size=rule.batch_size if training.batch_size == "auto" else training.batch_size,
        learning_rate=(
            rule.learning_rate if training.learning_rate == "auto" else training.learning_rate
        ),
        schedule=training.schedule,
        optimizer=training.optimizer,
        evaluation_steps=training.evaluation_steps,
        early_stopping=training.early_stopping,
        keep_best=training.keep_best,
        precision=training.precision,
        seed=training.seed,
    )


def evaluate(evaluate: Evaluate) -> EvaluateSettings:
    """What is measured of a fine-tuned model."""
    return EvaluateSettings(
        compare_with_base=evaluate.compare_with_base,
        samples=evaluate.samples,
        max_new_tokens=evaluate.max_new_tokens,
        gates=evaluate.gates,
    )
