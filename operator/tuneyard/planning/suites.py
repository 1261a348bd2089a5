"""Suites of an evaluation, and of training: their inputs, their settings and their faults."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from tuneyard.api.answer_metrics import MEASURED_BY, MEASURES, OF_ALL_ANSWERS
from tuneyard.api.evaluation import Evaluate, prefixed
from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import (
    AnswersSettings,
    ChatSettings,
    SuiteSettings,
    TrainingSuiteSettings,
)
from tuneyard.api.suites import Suite, SuiteAnswers, SuiteData, TrainingSuite, given
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
    return {
        f"{role}.{index}": source
        for index in range(len(evaluate.suites))
        for role, source in _sources(evaluate, index).items()
    }


def item_inputs(evaluate: Evaluate) -> dict[str, SourceInput]:
    """Return those of `suite_inputs` whose rows are items. The rows of a task are made to items by
    its file."""
    tasks = {str(number) for number, suite in enumerate(evaluate.suites) if suite.task is not None}
    inputs = suite_inputs(evaluate).items()
    return {role: source for role, source in inputs if role.partition(".")[2] not in tasks}


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


def _sources(evaluate: Evaluate, index: int) -> dict[str, SourceInput]:
    """Return the rows of a suite, and its task file, by role."""
    return {
        role: SourceInput(
            uri=data.uri,
            token_secret=data.token_secret,
            credentials=data.credentials,
            path=f"{PATH}[{index}].{field}.uri",
        )
        for role, (data, field) in _data(evaluate.suites[index]).items()
    }


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
    return "/" in metric and _is_own(metric) and is_counted(metric)


def is_counted(metric: str) -> bool:
    """Return whether a metric of a suite has a value for each item, or is computed from one that
    has: the value of the model before, or the change. As far as its name says."""
    name = metric.rpartition("/")[2]  # of SUITE/TASK/METRIC.FILTER
    if not _is_own(metric):
        name = name.removesuffix("Change").removeprefix("base")
    return f"{name[:1].lower()}{name[1:]}".partition(".")[0] not in WHOLE


def _is_own(metric: str) -> bool:
    """Return whether a suite's metric is of the tuned model alone, and not that of the model before
    (`baseMETRIC`) or the difference (`METRICChange`)."""
    name = metric.rpartition("/")[2]
    return not re.match("base[A-Z]", name) and not name.endswith("Change")


def whole_metric_remedy(metric: str) -> str:
    """Return what to bound instead of the difference of a suite's metric that no item has."""
    suite = metric.partition("/")[0]
    if not _is_own(metric):
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


# ---- during training ----------------------------------------------------------------------------


def training_suites(
    suites: Sequence[TrainingSuite], evaluate: Evaluate, chat: ChatSettings | None
) -> tuple[list[TrainingSuiteSettings], dict[str, SourceInput]]:
    """Return the settings of suites that are measured during training, and their rows as inputs
    `suite.N`. `chat`: how the evaluation formats messages."""
    places = {suite.name: index for index, suite in enumerate(evaluate.suites)}
    settings, inputs = [], {}
    for number, chosen in enumerate(suites):
        index = places[chosen.name]
        suite = evaluate.suites[index]
        inputs[f"suite.{number}"] = _sources(evaluate, index)["suite"]
        refuses = suite.refusals is not None
        settings.append(
            TrainingSuiteSettings(
                name=suite.name,
                kind="refusals" if refuses else "choices",
                limit=suite.limit,
                items=chosen.limit,
                chat=chat if refuses else None,
            )
        )
    return settings, inputs


_UNMEASURED = {
    "task": "is a task of lm-evaluation-harness, which one worker runs while the others wait, and "
    "its number of documents has no bound",
    "answers": "compares answers with targets, which is done once training has ended",
}
"""The reason why a suite is not measured during training, by its kind."""


def training_suite_faults(
    path: str, suites: Sequence[TrainingSuite], evaluate: Evaluate
) -> Iterator[Fault]:
    """Yield a fault for each suite that cannot be measured during training. `path`: of the list."""
    known = {suite.name: suite for suite in evaluate.suites}
    seen: set[str] = set()
    for number, chosen in enumerate(suites):
        where = f"{path}[{number}].name"
        if chosen.name not in known:
            close = difflib.get_close_matches(chosen.name, known, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"add it to {PATH}"
            yield Fault(where, f"'{chosen.name}' is the name of no suite of {PATH}: {hint}")
        elif (kind := given(known[chosen.name])[0]) not in METRICS:
            yield Fault(
                where,
                f"{chosen.name} {_UNMEASURED[kind]}: name a suite with choices or refusals",
            )
        if chosen.name in seen:
            yield Fault(where, f"{chosen.name} is in the list twice: remove one")
        seen.add(chosen.name)


def training_metrics(suites: Sequence[TrainingSuite], evaluate: Evaluate) -> list[str]:
    """Return the metrics of the suites that are measured during training."""
    chosen = {suite.name for suite in suites}
    return [
        f"{suite.name}/{metric}"
        for suite in evaluate.suites
        if suite.name in chosen and given(suite)[0] in METRICS
        for metric in METRICS[given(suite)[0]]
    ]
