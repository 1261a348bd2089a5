"""The page of a report, which shows its document: one file without external resources."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from tuneyard.api.gates import VERDICT_WORDS, GateResult
from tuneyard.api.report import Answer, Comparison, Curve, JobReport, Score
from tuneyard_trainer.reporting import words
from tuneyard_trainer.reporting.answered import preferred, shares
from tuneyard_trainer.reporting.differing import differing
from tuneyard_trainer.reporting.formatting import (
    ABSENT,
    count,
    duration,
    harmless,
    number,
    size,
)
from tuneyard_trainer.reporting.intervals import Bars
from tuneyard_trainer.reporting.results import EXAMPLES
from tuneyard_trainer.reporting.summary import RunSummary

MOST_SHOWN = 200
"""Answers on the page, which a browser can filter at once; the document has more."""
MOST_ROWS = 25
"""Rows of a curve's table."""


@dataclass(frozen=True)
class Pictures:
    """The curves as PNG."""

    light: bytes
    dark: bytes


def render(
    report: JobReport,
    summary: RunSummary,
    pictures: Pictures,
    usage: Sequence[tuple[str, str]],
) -> str:
    """Return the page. `summary`: facts for people that the document has no fields for. `usage`:
    titles and programs that load the result."""
    suites = {suite.name: suite.kind for suite in report.suites}
    own = [each for each in report.comparisons if each.suite is None]
    of_suites = [each for each in report.comparisons if each.suite is not None]
    safety = [each for each in of_suites if suites.get(each.suite or "") == "refusals"]
    shown = shown_answers(report)
    return rendered(
        "report.html.jinja",
        pictures,
        report=report,
        summary=summary,
        own=own,
        abilities=[each for each in of_suites if each not in safety],
        safety=safety,
        answers=shown,
        answer_sources={each.suite: _source_name(each) for each in shown},
        answers_heading=_heading(report, summary.results.samples_heading),
        answers_total=_answers_total(report),
        manifest=yaml.safe_dump(summary.manifest, sort_keys=False, allow_unicode=True),
        usage=usage,
        facts_of_training=[fact for fact in summary.results.facts if fact[0] != EXAMPLES],
    )


def rendered(template: str, pictures: Pictures, style: str = "", **values: Any) -> str:
    """Return a page of a template, with the style, the script and its policy of all pages.
    `style`: our own rules of this page alone."""
    environment = _environment()
    script = _source(environment, "report.js")
    rules = _source(environment, "report.css") + style
    return environment.get_template(template).render(
        style=Markup(rules),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        script_digest=_digest(script),
        curve_light=_data_uri(pictures.light),
        curve_dark=_data_uri(pictures.dark),
        **values,
    )


def shown_answers(report: JobReport) -> list[Answer]:
    """Return at most MOST_SHOWN answers in their order: flipped and worse ones are shown first. At
    most half of them are of suites, as many of each, unless there are few others."""
    groups = [[*group] for _, group in groupby(report.suite_answers, lambda each: each.suite)]
    room = max(MOST_SHOWN // 2, MOST_SHOWN - len(report.answers))
    most = shares([len(group) for group in groups], room)
    of_suites = [
        answer
        for group, share in zip(groups, most, strict=True)
        for answer in preferred(group, share)
    ]
    return [*preferred(report.answers, MOST_SHOWN - len(of_suites)), *of_suites]


def _answers_total(report: JobReport) -> int:
    """Return the number of answers of the evaluation, those to prompts of suites included."""
    answered = {each.suite for each in report.suite_answers}
    items = (suite.items or 0 for suite in report.suites if suite.name in answered)
    return report.answers_total + max(sum(items), len(report.suite_answers))


def _source_name(answer: Answer) -> str:
    """Return the name by which a reader chooses the answers of a suite, or those of none."""
    return "The job's own" if answer.suite is None else answer.suite


def _heading(report: JobReport, own: str) -> str:
    """Return the heading of the answers. `own`: that of the answers to the job's own prompts."""
    if not report.suite_answers:
        return own
    return f"{own} and of suites" if report.answers else "Completions of prompts of suites"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuneyard_trainer.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count,
        duration=duration,
        size=size,
        number=number,
        verdict=_verdict,
        bars=Bars.of,
        table=_table,
        scores=_scores,
    )
    environment.globals.update(
        absent=ABSENT,
        shown=words.shown,
        interval=words.shown_interval,
        difference=words.shown_difference,
        change=_change,
        differing=differing,
    )
    return environment


def _finalized(value: Any) -> Any:
    """Return what the page shows of a value: texts without control characters."""
    return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _source(environment: jinja2.Environment, name: str) -> str:
    """Return the text of a file beside the template."""
    if environment.loader is None:
        raise TypeError("the environment has no loader")
    return environment.loader.get_source(environment, name)[0]


def _digest(script: str) -> str:
    """Return the hash by which the page's policy allows its script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _data_uri(png: bytes) -> Markup:
    text = base64.b64encode(png).decode("ascii")
    return Markup(f"data:image/png;base64,{text}")  # noqa: S704 - base64 has no markup


def _verdict(gate: GateResult) -> str:
    return VERDICT_WORDS[gate.verdict]


_VERDICTS: Mapping[str, str] = {
    "better": "better",
    "worse": "worse",
    "unclear": "no clear difference",
    "equal": "equal",
    "none": "",
}


def _change(comparison: Comparison) -> str:
    """Return the difference in words: "+82 points, better"."""
    parts = (
        words.shown_difference(comparison.difference, comparison),
        _VERDICTS[comparison.verdict],
    )
    return ", ".join(filter(None, parts))


def _scores(answer: Answer) -> list[tuple[str, Score]]:
    """Return the metrics of an answer, without those that its marks of right and wrong show."""
    shown = answer.tuned_right is not None
    return [each for each in answer.scores.items() if not (shown and each[0] == "answerAccuracy")]


def _table(curve: Curve) -> list[tuple[int, float | None, float | None]]:
    """Return steps with the values of training and of held-out rows, at most about MOST_ROWS."""
    held_out = {point.step: point.value for point in curve.held_out}
    training = {point.step: point.value for point in curve.training}
    steps: list[int] = sorted({*training, *held_out})
    interval = max(1, -(-len(steps) // MOST_ROWS))
    kept = [
        step
        for place, step in enumerate(steps)
        if place % interval == 0 or step == steps[-1] or step in held_out
    ]
    return [(step, training.get(step), held_out.get(step)) for step in kept]
