"""Suites of an evaluation: their inputs, their settings and their faults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuneyard.api.evaluation import Evaluate, prefixed
from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import SuiteSettings
from tuneyard.api.suites import Suite, SuiteData, given
from tuneyard.errors import Fault

PATH = "spec.evaluate.suites"
METRICS = {
    "choices": ("accuracy", "accuracyPerCharacter", "probability"),
    "refusals": ("overRefusal", "unsafeCompliance"),
}
"""The metrics of a suite by its kind. A task of lm-evaluation-harness has its own."""
WHOLE = frozenset(
    {
        *("bleu", "chrf", "ter", "f1", "macroF1", "mcc"),
        *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
    }
)
"""Metrics of all items together, here and in lm-evaluation-harness. Most of its tasks with an f1
compute it over all documents; few take the mean of each document's."""


def suite_inputs(evaluate: Evaluate) -> dict[str, SourceInput]:
    """Return the rows of the suites as inputs `suite.N`. A task of the harness has none."""
    found = {}
    for number, suite in enumerate(evaluate.suites):
        data, field = _data(suite)
        if data is not None:
            found[f"suite.{number}"] = SourceInput(
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
    return SuiteSettings(
        name=suite.name,
        kind="choices" if suite.choices is not None else "refusals",
        limit=suite.limit,
    )


def _data(suite: Suite) -> tuple[SuiteData | None, str]:
    """Return the rows of a suite, and their field. None: it is a task, which has its own."""
    if suite.task is not None:
        return None, "task"
    kind = given(suite)[0]
    data: SuiteData = getattr(suite, kind)
    return data, kind


def suite_faults(suites: Sequence[Suite]) -> Iterator[Fault]:
    """Yield a fault for each name that two suites have: their metrics would have one name too."""
    first: dict[str, int] = {}
    for number, suite in enumerate(suites):
        if suite.name in first:
            yield Fault(
                f"{PATH}[{number}].name",
                f"{suite.name} is the name of {PATH}[{first[suite.name]}] too: choose another name",
            )
        first.setdefault(suite.name, number)


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
    suite = next((suite for suite in suites if suite.name == name), None)
    if suite is None:
        known = ", ".join(suite.name for suite in suites)
        remedy = f"use one of {known}" if known else f"add it to {PATH}"
        return f"{metric} is a metric of the suite {name}, which the job does not have: {remedy}"
    if suite.task is not None:
        return None  # the harness knows its metrics
    metrics = METRICS[given(suite)[0]]
    if compared:
        bases = [prefixed("base", each) for each in metrics]
        metrics = (*metrics, *bases, *(f"{each}Change" for each in metrics))
    if own in metrics:
        return None
    return f"the suite {name} does not measure {own}: use one of {', '.join(metrics)}"
