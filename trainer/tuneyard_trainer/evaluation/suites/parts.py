"""The suites of an evaluation as its parts: each measures both models and compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.answer_metrics import WITHOUT_REFERENCE
from tuneyard.api.evaluation import prefixed
from tuneyard.api.stage_settings import (
    AnswersSettings,
    ChatSettings,
    SuiteSettings,
    TrainingSuiteSettings,
)
from tuneyard.api.suites import LOWER_IS_BETTER
from tuneyard_trainer.data.prompts import Prompt, is_templated
from tuneyard_trainer.data.sharing import InStep
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.part import Found, Loaded, Part
from tuneyard_trainer.evaluation.suites import answers, choices, harness, refusals
from tuneyard_trainer.evaluation.suites.rows import prompt_texts, read_items
from tuneyard_trainer.evaluation.suites.tasks import suite_field, task_of
from tuneyard_trainer.evaluation.task_metrics import Compared, TaskMetric, task_metrics
from tuneyard_trainer.models.files import config_of, context_length
from tuneyard_trainer.worker import StageContext

MAX_LENGTH = 4096
"""Tokens of the longest text of a suite; a longer one loses its beginning."""
ANSWER_TOKENS = 64
"""Tokens of an answer in which a refusal is searched: it begins with its refusal."""

KEPT_ANSWERS = 1000
"""Answers of each model that `evaluation.json` holds of a suite."""

CHOICE_SEED = 0
"""Seed of the choice of items during training: the same in all jobs, so that they compare."""

T = TypeVar("T")
Values = Mapping[str, NDArray[np.float64]]
"""The value of each item, by metric."""


def suites(
    context: StageContext, settings: Sequence[SuiteSettings], tokenizer: Any, chat: ChatSettings
) -> Iterator[Part[Any]]:
    """Yield the parts of a stage's suites, in order. Raises StageError for rows that are no
    items."""
    for number, suite in enumerate(settings):
        if suite.kind == "task":
            yield TaskSuite(suite.name, task_of(suite, number, context.inputs), tokenizer)
            continue
        path = context.inputs[f"suite.{number}"]
        field = f"{suite_field(number)}.{suite.kind}.uri"
        if suite.answers is not None:
            yield AnswerSuite.of(context, path, suite, suite.answers, field, tokenizer, chat)
        else:
            yield row_suite(context, suite, path, field, tokenizer, chat)


def row_suite(
    context: StageContext,
    suite: SuiteSettings | TrainingSuiteSettings,
    path: Path,
    field: str,
    tokenizer: Any,
    chat: ChatSettings,
) -> ChoiceSuite | RefusalSuite:
    """Return a suite of the rows at `path`. `field`: their field in the manifest. Raises StageError
    for rows that are no items, such as a prompt that the chat template refuses."""
    most = suite.items if isinstance(suite, TrainingSuiteSettings) else None
    if suite.kind == "choices":
        found = read_items(path, choices.parse, suite.limit, field, choices.EXPECTED)
        return ChoiceSuite(suite.name, _some(found, most), tokenizer)
    asked = read_items(path, refusals.parse, suite.limit, field, refusals.EXPECTED)
    chosen = _some(asked, most)
    prompts = {
        where: Prompt(({"role": "user", "content": item.prompt},), where)
        for where, item in chosen.items()
    }
    texts = prompt_texts(prompts, tokenizer, chat, _room(context, ANSWER_TOKENS), field)
    return RefusalSuite(suite.name, chosen, tokenizer, texts, is_templated(tokenizer, chat))


def _room(context: StageContext, answer: int) -> int | None:
    """Return how many tokens a prompt may have before an answer. None: any number."""
    most = context_length(config_of(context.inputs["model"]))
    return None if most is None else most - answer


def _some(items: Mapping[str, T], most: int | None) -> Mapping[str, T]:
    """Return at most so many items, in their order. Those of a smaller number are among those of a
    larger one."""
    if most is None or most >= len(items):
        return items
    chosen = {*np.random.default_rng(CHOICE_SEED).permutation(len(items))[:most].tolist()}
    return {where: item for index, (where, item) in enumerate(items.items()) if index in chosen}


def _metrics(
    suite: str, tuned: Mapping[str, float], before: Mapping[str, float] | None
) -> dict[str, float]:
    """Return metrics NAME/METRIC of the tuned model and, if the model before was measured, those of
    it (`baseMETRIC`) and the difference (`METRICChange`)."""
    metrics = {}
    for name, value in tuned.items():
        metric = f"{suite}/{name}"
        metrics[metric] = value
        if before is not None:
            metrics[prefixed("base", metric)] = before[name]
            metrics[f"{metric}Change"] = value - before[name]
    return metrics


# ---- rows of a file -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _OwnSuite:
    """A suite whose items are the rows of a file."""

    name: str
    items: Mapping[str, Any]
    """By file and row."""
    tokenizer: Any

    def compare(self, tuned: Values | None, before: Values | None, /) -> Found:
        """Return the metrics of both models. Items without a value (NaN) do not count."""
        if tuned is None:
            return Found()
        counted = {name: ~np.isnan(values) for name, values in tuned.items()}

        def means(model: Values) -> dict[str, float]:
            return {name: float(np.mean(model[name][counts])) for name, counts in counted.items()}

        metrics = _metrics(self.name, means(tuned), None if before is None else means(before))
        items = {
            f"{self.name}/{name}": Items(
                tuple(compress(self.items, counts)),
                tuned[name][counts],
                None if before is None else before[name][counts],
                higher_is_better=name not in LOWER_IS_BETTER,
            )
            for name, counts in counted.items()
        }
        return Found(metrics, items=items, suites={self.name: {"items": len(self.items)}})


@dataclass(frozen=True)
class ChoiceSuite(_OwnSuite):
    """Multiple choice by log-probability."""

    items: Mapping[str, choices.Choice]

    def measure(self, loaded: Loaded, _tuned: Values | None, /) -> Values:
        """Return the scores of each item."""
        limit = min(context_length(loaded.model.config) or MAX_LENGTH, MAX_LENGTH)
        items = [*self.items.values()]
        rows = choices.option_rows(items, self.tokenizer, limit)
        forward = loaded.forward(int(self.tokenizer.pad_token_id))
        return choices.scores(items, loaded.row_logprobs(rows, forward))


@dataclass(frozen=True)
class RefusalSuite(_OwnSuite):
    """Prompts to answer and prompts to refuse."""

    items: Mapping[str, refusals.Request]
    texts: Sequence[str]
    """What the models continue, of each item."""
    templated: bool
    """Whether a chat template rendered the texts, special tokens included."""

    def measure(self, loaded: Loaded, _tuned: Values | None, /) -> Values:
        """Return whether each safe prompt is refused and each unsafe one answered. The answers are
        greedy."""
        answers = loaded.answers(
            self.tokenizer,
            self.texts,
            max_new_tokens=ANSWER_TOKENS,
            templated=self.templated,
        )
        return refusals.scores([*self.items.values()], answers)


# ---- prompts that are answered ------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerSuite:
    """Prompts whose answers metrics compare with targets."""

    name: str
    items: Mapping[str, answers.Asked]
    """By file and row."""
    texts: Sequence[str]
    """What the models continue, of each item."""
    metrics: Sequence[TaskMetric]
    max_new_tokens: int
    tokenizer: Any
    templated: bool
    """Whether a chat template rendered the texts, special tokens included."""

    @classmethod
    def of(
        cls,
        context: StageContext,
        path: Path,
        suite: SuiteSettings,
        settings: AnswersSettings,
        field: str,
        tokenizer: Any,
        chat: ChatSettings,
    ) -> AnswerSuite:
        """Read the rows at `path` and render their prompts. `field`: the file's field. Raises
        StageError BadSchema, InvalidData and those of `read_items`."""
        metrics = task_metrics(
            settings.metrics,
            settings.answer_schema,
            settings.answer_pattern,
            field.removesuffix(".uri"),
        )
        parse = partial(answers.parse, needs_target=bool({*settings.metrics} - WITHOUT_REFERENCE))
        items = read_items(path, parse, suite.limit, field, answers.EXPECTED)
        room = _room(context, settings.max_new_tokens)
        prompts = {where: item.prompt for where, item in items.items()}
        return cls(
            name=suite.name,
            items=items,
            texts=prompt_texts(prompts, tokenizer, chat, room, field),
            metrics=metrics,
            max_new_tokens=settings.max_new_tokens,
            tokenizer=tokenizer,
            templated=is_templated(tokenizer, chat),
        )

    def measure(self, loaded: Loaded, _tuned: tuple[str, ...] | None, /) -> tuple[str, ...]:
        """Return the greedy answer to each prompt."""
        return loaded.answers(
            self.tokenizer,
            self.texts,
            max_new_tokens=self.max_new_tokens,
            templated=self.templated,
        )

    def compare(self, tuned: Sequence[str] | None, before: Sequence[str] | None, /) -> Found:
        """Return the metrics of both models' answers, their values for each item, and answers."""
        if tuned is None:
            return Found()
        ids = tuple(self.items)
        targets = [item.targets for item in self.items.values()]
        metrics: dict[str, float] = {}
        items: dict[str, Items] = {}
        facts: dict[str, Any] = {"items": len(ids)}
        for metric in self.metrics:
            found = Compared.of(metric, targets, tuned, before)
            base = found.base.metrics if found.base else None
            metrics |= _metrics(self.name, found.tuned.metrics, base)
            items |= {f"{self.name}/{name}": each for name, each in found.items(ids).items()}
            facts |= found.details
        prompts = [item.prompt.question for item in self.items.values()]
        columns = {
            "id": ids,
            "prompt": prompts,
            "targets": targets,
            "tuned": tuned,
            "base": before,
        }
        kept = {name: list(each[:KEPT_ANSWERS]) for name, each in columns.items() if each}
        return Found(
            metrics, items=items, suites={self.name: facts}, suite_answers={self.name: kept}
        )


# ---- tasks of lm-evaluation-harness -------------------------------------------------------------


@dataclass(frozen=True)
class TaskSuite:
    """A task of lm-evaluation-harness. Worker 0 runs it alone, unless the workers share a model."""

    name: str
    task: harness.Task
    tokenizer: Any

    def measure(self, loaded: Loaded, _tuned: harness.TaskResult | None, /) -> harness.TaskResult:
        """Return what the harness measures."""
        sharing = loaded.sharing
        run = partial(harness.run_task, self.task, loaded.model, self.tokenizer, sharing.check_stop)
        return run() if isinstance(sharing, InStep) else sharing.from_main(run)

    def compare(
        self, tuned: harness.TaskResult | None, before: harness.TaskResult | None, /
    ) -> Found:
        """Return the metrics of both models, with versions and numbers of documents."""
        if tuned is None:
            return Found()
        items = {
            f"{self.name}/{name}": Items(
                tuned.ids[name],
                values,
                None if before is None else before.items.get(name),
                higher_is_better=tuned.higher_is_better.get(name, True),
            )
            for name, values in tuned.items.items()
        }
        metrics = _metrics(self.name, tuned.metrics, None if before is None else before.metrics)
        return Found(metrics, items=items, suites={self.name: tuned.details})
