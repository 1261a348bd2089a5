"""The page of a comparison: one file without external resources, with the style of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuneyard.api.comparison import ComparedAnswer, Comparison, Cost, Difference, MetricRow
from tuneyard_trainer.reporting.formatting import ABSENT, count, duration, size
from tuneyard_trainer.reporting.intervals import Bars
from tuneyard_trainer.reporting.job_curves import JOB_COLORS, JobCurves, draw_jobs
from tuneyard_trainer.reporting.page import MOST_SHOWN, Pictures, rendered

BASES = {
    "paired": "same items",
    "unpaired": "unpaired",
    "otherRows": "other rows",
    "otherUnit": "other unit, not compared",
}


def write(found: Comparison, path: Path) -> None:
    """Write the page of a comparison. The same comparison gives the same bytes. Raises OSError."""
    path.write_text(render(found), encoding="utf-8")


def render(found: Comparison) -> str:
    """Return the page of a comparison."""
    names = [job.label for job in found.jobs]
    jobs = [JobCurves(names[each.job], each.curves) for each in found.curves]
    title = "Training of all jobs"
    return rendered(
        "compare.html.jinja",
        Pictures(draw_jobs(jobs, title), draw_jobs(jobs, title, "dark")),
        style=_colors(),
        found=found,
        names=names,
        with_base=any(row.base is not None for row in found.metrics),
        answers=_shown(found.answers),
        absent=ABSENT,
        direction=_direction,
        basis=_basis,
        job_bars=_bars,
        first_text=_first_text,
        spent=_spent,
    )


def _shown(answers: Sequence[ComparedAnswer]) -> list[ComparedAnswer]:
    """Return at most MOST_SHOWN answers in their order: those that differ are shown first."""
    ranked = sorted(range(len(answers)), key=lambda i: (not answers[i].differ, i))
    return [answers[i] for i in sorted(ranked[:MOST_SHOWN])]


def _direction(row: MetricRow) -> str:
    found = {True: ", higher is better", False: ", lower is better", None: ""}
    return found[row.higher_is_better]


def _basis(difference: Difference) -> str:
    """Return how a difference was found: "40 same items"."""
    name = BASES[difference.basis]
    return name if difference.items is None else f"{count(difference.items)} {name}"


def _bars(row: MetricRow) -> Bars | None:
    values = [
        (f"job-{job}", value, interval)
        for job, (value, interval) in enumerate(zip(row.values, row.intervals, strict=True))
        if value is not None
    ]
    return Bars.between(values, is_share=row.is_share)


def _first_text(answer: ComparedAnswer) -> str | None:
    """Return the completion of the first job. None: it has none."""
    first = answer.completions[0]
    return None if first is None else first.text


def _spent(value: float | None, cost: Cost) -> str:
    if value is None:
        return ABSENT
    if cost.name in ("seconds", "trainingSeconds"):
        return duration(value)
    return size(value) if cost.name == "peakMemoryBytes" else count(value)


def _colors() -> str:
    """Return the rules for the colors of the jobs, which are those of the plot."""

    def variables(theme: str) -> str:
        colors = JOB_COLORS["dark" if theme == "dark" else "light"]
        return "".join(f" --job-{job}: {color};" for job, color in enumerate(colors))

    rules = [
        f":root {{{variables('light')} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{{variables('dark')} }} }}",
        f"@media print {{ :root {{{variables('light')} }} }}",
    ]
    for job in range(len(JOB_COLORS["light"])):
        color = f"var(--job-{job})"
        rules.append(f".bars .job-{job} {{ stroke: {color}; fill: {color}; }}")
        rules.append(f".key .job-{job} {{ --color: {color}; }}")
    return "\n".join(rules) + "\n"
