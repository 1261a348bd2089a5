"""The suites of an evaluation as its parts: each measures both models and compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneyard.api.stage_settings import ChatSettings, SuiteSettings
from tuneyard_trainer.data.encoding.chat import rendered, transcript
from tuneyard_trainer.data.sharing import InStep
from tuneyard_trainer.evaluation.items import Items
from tuneyard_trainer.evaluation.part import Found, Loaded, Part
from tuneyard_trainer.evaluation.suites import choices, harness, refusals
from tuneyard_trainer.evaluation.suites.rows import read_items
from tuneyard_trainer.generation.greedy import continuations
from tuneyard_trainer.models.files import context_length
from tuneyard_trainer.worker import StageContext

MAX_LENGTH = 4096
"""Tokens of the longest text of a suite; a longer one loses its beginning."""
ANSWER_TOKENS = 64
"""Tokens of an answer in which a refusal is searched: it begins with its refusal."""

Values = Mapping[str, NDArray[np.float64]]
"""The value of each item, by metric."""
LOWER_IS_BETTER = frozenset({"overRefusal", "unsafeCompliance"})


def suites(
    context: StageContext, settings: Sequence[SuiteSettings], tokenizer: Any, chat: ChatSettings
) -> Iterator[Part[Any]]:
    """Yield the parts of a stage's suites, in order. Raises StageError for rows that are no
    items."""
    for number, suite in enumerate(settings):
        field, path = f"spec.evaluate.suites[{number}]", context.inputs.get(f"suite.{number}")
        if suite.kind == "task":
            yield TaskSuite.of(suite, tokenizer, field)
        elif path is not None and suite.kind == "choices":
            yield ChoiceSuite.read(suite, path, tokenizer, field)
        elif path is not None:
            yield RefusalSuite.read(suite, path, tokenizer, chat, field)


def _compared(suite: str, ids: Sequence[str], tuned: Values, before: Values | None) -> Found:
    """Return metrics NAME/METRIC of the tuned model and, if the model before was measured, those of
    it (`baseMETRIC`) and the difference (`METRICChange`). Items without a value (NaN) do not
    count."""
    metrics: dict[str, float] = {}
    items: dict[str, Items] = {}
    for name, values in tuned.items():
        counted = ~np.isnan(values)
        chosen = tuple(each for each, counts in zip(ids, counted, strict=True) if counts)
        base = before[name][counted] if before is not None else None
        metric = f"{suite}/{name}"
        metrics[metric] = float(np.mean(values[counted]))
        if base is not None:
            metrics[f"{suite}/{_of_base(name)}"] = float(np.mean(base))
            metrics[f"{metric}Change"] = float(np.mean(values[counted] - base))
        items[metric] = Items(
            chosen, values[counted], base, higher_is_better=name not in LOWER_IS_BETTER
        )
    return Found(metrics, items=items, suites={suite: {"items": len(ids)}})


def _of_base(metric: str) -> str:
    """Return the name of a metric of the model before: `accuracy` becomes `baseAccuracy`."""
    task, slash, name = metric.rpartition("/")
    return f"{task}{slash}base{name[:1].upper()}{name[1:]}"


# ---- choices ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceSuite:
    """Multiple choice by log-probability."""

    name: str
    items: Mapping[str, choices.Choice]
    tokenizer: Any

    @classmethod
    def read(cls, suite: SuiteSettings, path: Path, tokenizer: Any, field: str) -> ChoiceSuite:
        """Read the suite's file. Raises StageError as `read_items` does."""
        items = read_items(
            path,
            choices.parse,
            limit=suite.limit,
            field=f"{field}.choices.uri",
            expected=choices.EXPECTED,
        )
        return cls(suite.name, items, tokenizer)

    def measure(self, loaded: Loaded, tuned: Values | None) -> Values:  # noqa: ARG002  the protocol's
        """Return the scores of each item."""
        limit = min(context_length(loaded.model.config) or MAX_LENGTH, MAX_LENGTH)
        items = [*self.items.values()]
        rows = choices.option_rows(items, self.tokenizer, limit)
        forward = loaded.forward(int(self.tokenizer.pad_token_id))
        return choices.scores(items, loaded.row_logprobs(rows, forward))

    def compare(self, tuned: Values | None, before: Values | None) -> Found:
        """Return the metrics of both models."""
        return Found() if tuned is None else _compared(self.name, [*self.items], tuned, before)


# ---- refusals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RefusalSuite:
    """Prompts to answer and prompts to refuse."""

    name: str
    items: Mapping[str, refusals.Request]
    tokenizer: Any
    chat: ChatSettings

    @classmethod
    def read(
        cls,
        suite: SuiteSettings,
        path: Path,
        tokenizer: Any,
        chat: ChatSettings,
        field: str,
    ) -> RefusalSuite:
        """Read the suite's file. Raises StageError as `read_items` does."""
        items = read_items(
            path,
            refusals.parse,
            limit=suite.limit,
            field=f"{field}.refusals.uri",
            expected=refusals.EXPECTED,
        )
        return cls(suite.name, items, tokenizer, chat)

    def measure(self, loaded: Loaded, tuned: Values | None) -> Values:  # noqa: ARG002  the protocol's
        """Return whether each safe prompt is refused and each unsafe one answered. The answers are
        greedy."""
        template = self.chat.chat_template
        templated = bool(template or self.tokenizer.chat_template)
        texts = []
        for item in self.items.values():
            turns = [{"role": "user", "content": item.prompt}]
            if self.chat.system_prompt is not None:
                turns.insert(0, {"role": "system", "content": self.chat.system_prompt})
            shown = rendered(self.tokenizer, turns, template=template) if templated else None
            texts.append(transcript(turns) if shown is None else shown)
        answer = partial(
            continuations,
            loaded.model,
            self.tokenizer,
            max_new_tokens=ANSWER_TOKENS,
            add_special_tokens=not templated,
            before_batch=loaded.sharing.check_stop,
        )
        answers = loaded.sharing.results(
            [len(text) for text in texts], lambda own: answer([texts[i] for i in own])
        )
        return refusals.scores([*self.items.values()], answers)

    def compare(self, tuned: Values | None, before: Values | None) -> Found:
        """Return the metrics of both models."""
        return Found() if tuned is None else _compared(self.name, [*self.items], tuned, before)


# ---- tasks of lm-evaluation-harness -------------------------------------------------------------


@dataclass(frozen=True)
class TaskSuite:
    """A task of lm-evaluation-harness. Worker 0 runs it alone, unless the workers share a model."""

    name: str
    task: harness.Task
    tokenizer: Any

    @classmethod
    def of(cls, suite: SuiteSettings, tokenizer: Any, field: str) -> TaskSuite:
        """Return the part."""
        task = harness.Task(
            suite.task or "", suite.limit, suite.few_shot, suite.chat_template, field
        )
        return cls(suite.name, task, tokenizer)

    def measure(
        self,
        loaded: Loaded,
        tuned: harness.TaskResult | None,  # noqa: ARG002  the protocol's
    ) -> harness.TaskResult:
        """Return what the harness measures."""
        sharing = loaded.sharing
        run = partial(harness.run_task, self.task, loaded.model, self.tokenizer, sharing.check_stop)
        return run() if isinstance(sharing, InStep) else sharing.from_main(run)

    def compare(self, tuned: harness.TaskResult | None, before: harness.TaskResult | None) -> Found:
        """Return the metrics of both models, with versions and numbers of documents."""
        if tuned is None:
            return Found()
        metrics = {}
        for name, value in tuned.metrics.items():
            metrics[f"{self.name}/{name}"] = value
            if before is not None:
                metrics[f"{self.name}/{_of_base(name)}"] = before.metrics[name]
                metrics[f"{self.name}/{name}Change"] = value - before.metrics[name]
        items = {
            f"{self.name}/{name}": Items(
                tuned.ids[name],
                values,
                before.items.get(name) if before is not None else None,
                higher_is_better=tuned.higher_is_better.get(name, True),
            )
            for name, values in tuned.items.items()
        }
        return Found(metrics, items=items, suites={self.name: tuned.details})
