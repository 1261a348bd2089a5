"""Suites of an evaluation: their inputs, their settings and their faults."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tuneyard.api.answer_metrics import MEASURED_BY, MEASURES, OF_ALL_ANSWERS
from tuneyard.api.evaluation import Evaluate, prefixed
from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import AnswersSettings, SuiteSettings
from tuneyard.api.suites import Suite, SuiteAnswers, SuiteData, given
from tuneyard.errors import Fault

PATH = "spec.evaluate.suites"
METRICS = {
    "choices": ("accuracy", "accuracyPerCharacter", "probability"),
    "refusals": ("overRefusal", "unsafeCompliance"),
}
"""The metrics of a suite by its kind. A suite of answers names them, and a task of
lm-evaluation-harness has its own."""
WHOLE = OF_ALL_ANSWERS | {
    *("ter", "f1", "mcc"),
    *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
}
"""Metrics of all items together, here and in lm-evaluation-harness. Most of its tasks with an f1
compute it over all documents; few take the mean of each document's."""


def suite_inputs(evaluate: Evaluate) -> dict[str, SourceInput]:
    """Return the rows of the suites as inputs `suite.N`, and their task files as `task.N`. A task
    that the harness knows has neither."""
    found = {}
    for number, suite in enumerate(evaluate.suites):
        for role, (data, field) in _data(suite).items():
            found[f"{role}.{number}"] = SourceInput(
                uri=data.uri,
                token_secret=data.token_secret,
                credentials=data.credentials,
                path=f"{PATH}[{number}].{field}.uri",
            )
    return found


def suite_settings(evaluate: Evaluate) -> list[SuiteSettings] | None:
    """Return the settings of the suites. None: there are none."""
    return [_settings(suite) for suite in evaluate.suites] or None


def _settings(suite: Suite) -> SuiteSettings:
    task = suite.task
    if task is not None:
        return SuiteSettings(
            name=suite.name,
            kind="task",
            limit=suite.limit,
            task=task.name,
            few_shot=task.few_shot,
            chat_template=task.chat_template,
        )
    answers = suite.answers
    if answers is not None:
        return SuiteSettings(
            name=suite.name,
            kind="answers",
            limit=suite.limit,
            answers=AnswersSettings(
                metrics=answers.metrics,
                answer_schema=answers.answer_schema,
                answer_pattern=answers.answer_pattern,
                max_new_tokens=answers.max_new_tokens,
            ),
        )
    return SuiteSettings(
        name=suite.name,
        kind="choices" if suite.choices is not None else "refusals",
        limit=suite.limit,
    )


def _data(suite: Suite) -> dict[str, tuple[SuiteData, str]]:
    """Return the rows of a suite, and its task file, with their fields, by role."""
    task = suite.task
    if task is None:
        kind = given(suite)[0]
        return {"suite": (getattr(suite, kind), kind)}
    if task.file is None or task.data is None:
        return {}
    return {"suite": (task.data, "task.data"), "task": (task.file, "task.file")}


def suite_faults(suites: Sequence[Suite]) -> Iterator[Fault]:
    """Yield a fault for each name that two suites have, as their metrics would have one name too,
    and for each pattern of answers that is no regular expression."""
    first: dict[str, int] = {}
    for number, suite in enumerate(suites):
        if suite.name in first:
            yield Fault(
                f"{PATH}[{number}].name",
                f"{suite.name} is the name of {PATH}[{first[suite.name]}] too: choose another name",
            )
        first.setdefault(suite.name, number)
        if suite.answers is not None:
            yield from pattern_faults(
                suite.answers.answer_pattern, f"{PATH}[{number}].answers.answerPattern"
            )


def pattern_faults(pattern: str | None, path: str) -> Iterator[Fault]:
    """Yield the fault of a pattern that is no regular expression. `path`: its field."""
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except re.error as error:
        yield Fault(path, f"is no regular expression: {error}")


def is_paired(metric: str) -> bool:
    """Return whether both models have a value of a metric for each item of a suite, as far as its
    name says: other metrics of the harness's tasks are known only once they are measured."""
    suite, slash, own = metric.partition("/")
    name = own.rpartition("/")[2].partition(".")[0]  # of TASK/METRIC.FILTER
    single = name not in WHOLE and not own.startswith("base") and not own.endswith("Change")
    return bool(suite and slash) and single


def whole_metric_remedy(metric: str) -> str:
    """Return what to bound instead of the difference of a suite's metric that no item has."""
    suite, _, own = metric.partition("/")
    if own.startswith("base") or own.endswith("Change"):
        return f"bound {metric} with atLeast or atMost"
    return (
        f"bound {metric}Change with atLeast or atMost, or use a metric of single items of the "
        f"suite {suite}, such as an accuracy"
    )


def unknown_suite_metric(metric: str, suites: Sequence[Suite], compared: bool) -> str | None:
    """Return the message for a gate on SUITE/METRIC that no suite measures. None: one does.

    `compared`: whether the model before is measured too.
    """
    name, _, own = metric.partition("/")
    number = next((n for n, suite in enumerate(suites) if suite.name == name), None)
    if number is None:
        known = ", ".join(suite.name for suite in suites)
        remedy = f"use one of {known}" if known else f"add it to {PATH}"
        return f"{metric} is a metric of the suite {name}, which the job does not have: {remedy}"
    suite = suites[number]
    if suite.task is not None:
        return None  # the harness knows its metrics
    answers = suite.answers
    metrics = METRICS[given(suite)[0]] if answers is None else _metrics_of(answers)
    if compared:
        bases = [prefixed("base", each) for each in metrics]
        metrics = (*metrics, *bases, *(f"{each}Change" for each in metrics))
    if own in metrics:
        return None
    remedy = f"use one of {', '.join(metrics)}"
    if answers is not None and (missing := _missing(own)):
        remedy = f"{missing} {PATH}[{number}].answers, or {remedy}"
    return f"the suite {name} does not measure {own}: {remedy}"


def _metrics_of(answers: SuiteAnswers) -> tuple[str, ...]:
    """Return the metrics that a suite of answers measures."""
    found = [metric for name in answers.metrics for metric in MEASURES[name]]
    found += ["schemaValid"] if answers.answer_schema is not None else []
    found += ["patternMatch"] if answers.answer_pattern is not None else []
    return tuple(dict.fromkeys(found))


def _missing(metric: str) -> str | None:
    """Return what would let a suite of answers measure a metric. None: nothing does."""
    if metric in MEASURED_BY:
        return f"add {MEASURED_BY[metric]} to the metrics of"
    fields = {"schemaValid": "answerSchema", "patternMatch": "answerPattern"}
    return f"set {fields[metric]} in" if metric in fields else None
