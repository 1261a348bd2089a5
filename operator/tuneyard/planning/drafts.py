"""The parts of which both kinds of plans consist: drafts of stages, and sources as their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from tuneyard.api.adapters import Adapter
from tuneyard.api.cleaning import Clean
from tuneyard.api.evaluation import Evaluate, WinRate
from tuneyard.api.plan import Input, PlannedStage, SourceInput, TrainRuntime
from tuneyard.api.preserving import GuardLimits, PreserveTerms
from tuneyard.api.sources import (
    Dataset,
    Documents,
    FieldMap,
    FineTuneData,
    Judge,
    ModelSource,
    PromptSet,
)
from tuneyard.api.stage_settings import (
    ChatSettings,
    DatasetSettings,
    DistillSettings,
    DpoSettings,
    EvaluateSettings,
    JudgeSettings,
    LeaksSettings,
    LoopSettings,
    PrepareSettings,
    PromptSettings,
    ReplaySettings,
    RetrievalSettings,
    Settings,
    ToxicitySettings,
    TrainSettings,
    WinRateSettings,
)
from tuneyard.api.training import FineTuning, Training
from tuneyard.planning import defaults
from tuneyard.planning.fingerprint import fingerprint
from tuneyard.planning.principles import COMPARISON, PRINCIPLES
from tuneyard.planning.suites import item_inputs, suite_settings, training_suites

Sharding = Literal["auto", "none", "fsdp"]


class Draft(NamedTuple):
    """A planned stage without its fingerprint."""

    name: str
    settings: Settings
    inputs: Mapping[str, Input]
    runtime: TrainRuntime = TrainRuntime()


def fingerprinted(drafts: Sequence[Draft]) -> list[PlannedStage]:
    """Return the drafts as stages with their fingerprints."""
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


# ---- inputs -----------------------------------------------------------------------------------


def source_input(source: ModelSource | Dataset | PromptSet | Documents, path: str) -> SourceInput:
    """Return a source of the manifest as an input. `path`: its field in the manifest."""
    return SourceInput(
        uri=source.uri,
        revision=source.revision if isinstance(source, ModelSource) else None,
        token_secret=source.token_secret,
        credentials=source.credentials,
        path=f"{path}.uri",
    )


def dataset_inputs(role: str, path: str, datasets: Sequence[Dataset]) -> dict[str, SourceInput]:
    """Return data sets as inputs `role.0`, `role.1`, ... `path`: their field in the manifest."""
    return {
        f"{role}.{index}": source_input(dataset, f"{path}[{index}]")
        for index, dataset in enumerate(datasets)
    }


def data_inputs(data: FineTuneData, path: str) -> dict[str, SourceInput]:
    """Return the inputs `train.N`, with the data of replay last, `validation.N`, `documents` and
    `toxicity`. `path`: the data's field in the manifest. `augmentation.augmentation` returns the
    input of augmented rows, which follows the data of replay."""
    held_out = (data.validation and data.validation.data) or []
    replayed = enumerate(data.replay.data if data.replay else [])
    inputs = {
        **dataset_inputs("train", f"{path}.train", data.train),
        **{
            f"train.{len(data.train) + index}": source_input(
                dataset, f"{path}.replay.data[{index}]"
            )
            for index, dataset in replayed
        },
        **dataset_inputs("validation", f"{path}.validation.data", held_out),
    }
    if data.retrieval is not None:
        documents = source_input(data.retrieval.documents, f"{path}.retrieval.documents")
        inputs["documents"] = documents
    if data.clean is not None and data.clean.toxicity is not None:
        classifier = source_input(
            data.clean.toxicity.classifier, f"{path}.clean.toxicity.classifier"
        )
        inputs["toxicity"] = classifier
    return inputs


def general_inputs(training: FineTuning, path: str) -> dict[str, SourceInput]:
    """Return the general data of defenses against forgetting as inputs `general.N` and `guard.N`.
    `path`: the training's field in the manifest."""
    preserve, guard = training.preserve, training.guard
    preserved, watched = preserve and preserve.data, guard and guard.data
    return {
        **dataset_inputs("general", f"{path}.preserve.data", preserved or []),
        **dataset_inputs("guard", f"{path}.guard.data", watched or []),
    }


def judge_input(judge: Judge | None, path: str) -> tuple[dict[str, Input], TrainRuntime]:
    """Return the judge as an input if the job runs it, or else as the endpoint of the runtime."""
    if judge and judge.model:
        return {"judge": source_input(judge.model, f"{path}.model")}, TrainRuntime()
    return {}, TrainRuntime(endpoint=judge.endpoint if judge else None)


# ---- settings ---------------------------------------------------------------------------------


def dataset_settings(datasets: Sequence[Dataset]) -> list[DatasetSettings]:
    """Return the settings of each data set."""
    return [
        DatasetSettings(
            format=dataset.format,
            fields=dataset.fields,
            weight=dataset.weight,
            limit=dataset.limit,
            paths="all" if dataset.paths == "all" else None,
        )
        for dataset in datasets
    ]


def generated(weight: float = 1.0) -> DatasetSettings:
    """Return the settings for reading a file of an earlier stage."""
    return DatasetSettings(format="auto", fields=FieldMap(), weight=weight, limit=None)


def judge_settings(judge: Judge | None) -> JudgeSettings | None:
    """Return the settings of a judge behind an endpoint. None: it is a model that the job runs, or
    there is none."""
    if judge is None or judge.endpoint is None:
        return None
    endpoint = judge.endpoint
    return JudgeSettings(
        model=endpoint.model,
        max_requests=endpoint.max_requests,
        max_tokens=endpoint.max_tokens,
        label_tokens=endpoint.label_tokens,
    )


def runtime(training: Training, sharding: Sharding = "none") -> TrainRuntime:
    """Return the settings of a training stage that do not change its result."""
    return TrainRuntime(
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_checkpointing=training.gradient_checkpointing,
        checkpoint_steps=training.checkpoint_steps,
        sharding=sharding,
    )


def prepare(
    data: FineTuneData, method: Literal["sft", "pretrain"], training: FineTuning
) -> PrepareSettings:
    """Return the settings of the stage that prepares training and held-out rows, and the general
    data of `training`."""
    validation, replay, augment = data.validation, data.replay, data.augment
    preserve, guard = training.preserve, training.guard
    return PrepareSettings(
        method=method,
        train=[
            *dataset_settings([*data.train, *(replay.data if replay else [])]),
            *([generated(augment.weight)] if augment else []),
        ],
        validation=dataset_settings((validation and validation.data) or []),
        validation_fraction=validation.fraction if validation else None,
        max_length=data.max_length,
        on_overlength=data.on_overlength,
        on_invalid_row=data.on_invalid_row,
        train_on=data.train_on,
        reasoning="drop" if data.reasoning == "drop" else None,
        system_prompt=data.system_prompt,
        chat_template=data.chat_template,
        seed=defaults.SPLIT_SEED,
        clean=text_rules(data),
        toxicity=_toxicity(data),
        leaks=None if data.leaks == "warn" else data.leaks,
        temperature=data.temperature,
        replay=ReplaySettings(datasets=len(replay.data), share=replay.share) if replay else None,
        fill_in_the_middle=data.fill_in_the_middle,
        retrieval=_retrieval(data),
        augmented=True if augment else None,
        general=dataset_settings(preserve.data) if preserve and preserve.data else None,
        guard=dataset_settings(guard.data) if guard else None,
    )


def text_rules(data: FineTuneData) -> Clean | None:
    """Return the rules of cleaning that need no model."""
    found = data.clean
    if found is None:
        return None
    return Clean(**{name: getattr(found, name) for name in Clean.model_fields})


def _toxicity(data: FineTuneData) -> ToxicitySettings | None:
    found = data.clean.toxicity if data.clean else None
    if found is None:
        return None
    return ToxicitySettings(
        labels=found.labels, threshold=found.threshold, treatment=found.treatment
    )


def _retrieval(data: FineTuneData) -> RetrievalSettings | None:
    found = data.retrieval
    if found is None:
        return None
    return RetrievalSettings(
        fields=found.documents.fields,
        passages=found.passages,
        gold_share=found.gold_share,
        passage_words=found.passage_words,
        cite=found.cite,
    )


def train(
    method: Literal["sft", "pretrain"],
    adapter: Adapter | None,
    packing: Literal["auto", "always", "never"],
    training: Training,
    rule: defaults.Rule,
) -> TrainSettings:
    """Return the settings of a stage that trains on prepared rows."""
    settings = TrainSettings(
        kind=method,
        adapter=adapter,
        packing=packing,
        **dict(loop(training, rule, epochs=defaults.EPOCHS)),
    )
    return _defended(settings, training) if isinstance(training, FineTuning) else settings


def _defended(settings: TrainSettings, training: FineTuning) -> TrainSettings:
    """Return the settings with defenses against forgetting, whose data the prepare stage reads."""
    terms, guard = training.preserve, training.guard
    update = {
        "preserve": terms and PreserveTerms(l2_sp=terms.l2_sp, ewc=terms.ewc, kl=terms.kl),
        "guard": guard and GuardLimits(worsens_by=guard.worsens_by, patience=guard.patience),
    }
    return settings.model_copy(update=update)


def loop(training: Training, rule: defaults.Rule, *, epochs: float) -> LoopSettings:
    """Return a training loop with `auto` resolved by `rule`. `epochs`: the default."""
    return LoopSettings(
        engine="trl" if training.engine == "trl" else None,
        trl=training.trl or None,
        freeze=training.freeze,
        dropout=training.dropout,
        epochs=epochs if _has_default_epochs(training) else training.epochs,
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
        best_by=training.best_by,
        precision=training.precision,
        seed=training.seed,
    )


def with_suites(
    draft: Draft, training: Training, evaluate: Evaluate, chat: ChatSettings | None
) -> Draft:
    """Return the draft of a stage that trains, with the suites that it measures. `chat`: how the
    evaluation formats messages."""
    if not training.suites:
        return draft
    suites, rows = training_suites(training.suites, evaluate, chat)
    settings = draft.settings
    if isinstance(settings, LoopSettings):
        settings = settings.model_copy(update={"suites": suites})
    elif isinstance(settings, DpoSettings | DistillSettings):
        loop = settings.training.model_copy(update={"suites": suites})
        settings = settings.model_copy(update={"training": loop})
    return draft._replace(settings=settings, inputs={**draft.inputs, **rows})


def leaks(
    evaluate: Evaluate,
    policy: Literal["warn", "error", "off"],
    *,
    data: FineTuneData | None,
    data_path: str,
    preferences: Sequence[Dataset] = (),
    prompts: Sequence[tuple[PromptSet, str]] = (),
) -> list[Draft]:
    """Return the stage that searches the items of suites in the training data; []: no suite has a
    file of items, or the job searches for nothing. It is one of its own, so that a suite which is
    added later prepares nothing again.

    `data`: the rows of fine-tuning. None: there are none. `data_path`: their field in the manifest.
    `preferences`: those of `spec.preferences.data`. `prompts`: the prompts with their fields.
    """
    suites = item_inputs(evaluate)
    if not suites or policy == "off":
        return []
    replayed = data.replay.data if data and data.replay else []
    sources = data_inputs(data, data_path) if data else {}
    settings = LeaksSettings(
        train=dataset_settings([*data.train, *replayed]) if data else [],
        preferences=dataset_settings(preferences) or None,
        prompts=[prompt_settings(each) for each, _ in prompts] or None,
        suites=suite_settings(evaluate) or [],
        leaks="error" if policy == "error" else None,
    )
    inputs: dict[str, Input] = {
        **{role: source for role, source in sources.items() if role.startswith("train.")},
        **dataset_inputs("preferences", "spec.preferences.data", preferences),
        **{
            f"prompts.{index}": source_input(each, path)
            for index, (each, path) in enumerate(prompts)
        },
        **suites,
    }
    return [Draft("leaks", settings, inputs)]


def prompt_settings(prompts: PromptSet) -> PromptSettings:
    """Return the settings of a data set of prompts."""
    return PromptSettings(
        format=prompts.format,
        fields=prompts.fields,
        limit=prompts.limit,
        reasoning="drop" if prompts.reasoning == "drop" else None,
    )


def default_notes(path: str, training: Training, rule: defaults.Rule, epochs: float) -> list[str]:
    """Return a note for each value of a training loop that the planner chose.

    `path`: the training's field in the manifest; `epochs`: the default.
    """
    source = f"{rule.title} default (docs/defaults.md)"
    notes = []
    if training.learning_rate == "auto":
        notes.append(f"{path}.learningRate {rule.learning_rate:g}: {source}.")
    if training.batch_size == "auto":
        notes.append(f"{path}.batchSize {rule.batch_size}: {source}.")
    if _has_default_epochs(training):
        notes.append(
            f"{path}.epochs {epochs:g}: the default, as neither epochs nor maxSteps is set."
        )
    return notes


def _has_default_epochs(training: Training) -> bool:
    return training.epochs is None and training.max_steps is None


def evaluate(evaluate: Evaluate) -> EvaluateSettings:
    """Return the settings of the stage that measures a model on held-out rows."""
    return EvaluateSettings(
        compare_with_base=evaluate.compare_with_base,
        samples=evaluate.samples,
        max_new_tokens=evaluate.max_new_tokens,
        gates=evaluate.gates,
        engine=evaluation_engine(evaluate),
        metrics=evaluate.metrics or None,
        few_shot=evaluate.few_shot or None,
        answer_schema=evaluate.answer_schema,
        answer_pattern=evaluate.answer_pattern,
        win_rate=win_rate_settings(evaluate.win_rate),
        suites=suite_settings(evaluate),
        seed=defaults.SAMPLING_SEED if evaluate.win_rate else None,
    )


def evaluation_engine(evaluate: Evaluate) -> Literal["vllm"] | None:
    """Return the library with which the models answer. None: transformers."""
    return "vllm" if evaluate.engine == "vllm" else None


def win_rate_settings(win_rate: WinRate | None) -> WinRateSettings | None:
    """Return how a judge compares completions. None: no win rate is measured."""
    if win_rate is None:
        return None
    return WinRateSettings(
        judge=judge_settings(win_rate.judge),
        principles=list(win_rate.principles or PRINCIPLES),
        question=win_rate.question or COMPARISON,
    )
