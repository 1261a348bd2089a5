"""Suites of an evaluation, and of training: their inputs, their settings and their faults."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from tuneyard.api.evaluation import Evaluate, prefixed
from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import ChatSettings, SuiteSettings, TrainingSuiteSettings
from tuneyard.api.suites import Suite, SuiteData, TrainingSuite, given
from tuneyard.errors import Fault

PATH = "spec.evaluate.suites"
METRICS = {
    "choices": ("accuracy", "accuracyPerCharacter", "probability"),
    "refusals": ("overRefusal", "unsafeCompliance"),
}
"""The metrics of a suite by its kind. A task of lm-evaluation-harness has its own."""


def suite_inputs(evaluate: Evaluate) -> dict[str, SourceInput]:
    """Return the rows of the suites as inputs `suite.N`. A task of the harness has none."""
    sources = {f"suite.{index}": _source(evaluate, index) for index in range(len(evaluate.suites))}
    return {role: source for role, source in sources.items() if source is not None}


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


def _source(evaluate: Evaluate, index: int) -> SourceInput | None:
    """Return the rows of a suite as an input. None: it is a task, which has its own."""
    suite = evaluate.suites[index]
    if suite.task is not None:
        return None
    kind = given(suite)[0]
    data: SuiteData = getattr(suite, kind)
    return SourceInput(
        uri=data.uri,
        token_secret=data.token_secret,
        credentials=data.credentials,
        path=f"{PATH}[{index}].{kind}.uri",
    )


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
    """Return whether both models have a value of a metric for each item of a suite. Those of the
    harness's tasks are known only once they are measured."""
    suite, slash, own = metric.partition("/")
    return bool(suite and slash) and not own.startswith("base") and not own.endswith("Change")


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
        suite, source = evaluate.suites[index], _source(evaluate, index)
        if source is None:
            raise TypeError(f"the suite {chosen.name} has no rows")
        inputs[f"suite.{number}"] = source
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
        elif known[chosen.name].task is not None:
            yield Fault(
                where,
                f"{chosen.name} is a task of lm-evaluation-harness, which one worker runs while "
                "the others wait, and its number of documents has no bound: name a suite with "
                "choices or refusals",
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
        if suite.name in chosen and suite.task is None
        for metric in METRICS[given(suite)[0]]
    ]
