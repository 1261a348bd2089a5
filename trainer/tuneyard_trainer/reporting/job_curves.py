"""The training curves of several jobs in one plot, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tuneyard.api.report import Curve
from tuneyard_trainer.reporting.formatting import clipped
from tuneyard_trainer.reporting.plots import COLORS, FEW_POINTS, Theme, png, smoothed

LEARNING_RATE = "learningRate"
MOST_PANELS = 3
"""Panels above that of the learning rate."""
NAME_CHARACTERS = 40

# Okabe and Ito's palette, which color-blind readers can distinguish; black and yellow are replaced
# where they are not readable.
JOB_COLORS: Mapping[Theme, Sequence[str]] = {
    "light": (
        *("#0072b2", "#d55e00", "#009e73", "#a4508b"),
        *("#b8860b", "#1f2328", "#2e8bc0", "#7a4b2a"),
    ),
    "dark": (
        *("#56b4e9", "#e69f00", "#2fc79b", "#e3a3cb"),
        *("#f0e442", "#ffffff", "#ff7f50", "#d8b08c"),
    ),
}


@dataclass(frozen=True)
class JobCurves:
    """The curves of one job."""

    name: str
    curves: Sequence[Curve]


def draw_jobs(jobs: Sequence[JobCurves], title: str, theme: Theme = "light") -> bytes:
    """Return a PNG of 1600 x 1000 pixels: a panel for each metric, each job in a color of its own.
    The same curves give the same bytes."""
    found = {
        (curve.metric, curve.label)
        for job in jobs
        for curve in job.curves
        if curve.metric != LEARNING_RATE and (curve.training or curve.held_out)
    }
    panels = sorted(found, key=lambda each: (each[0] not in ("loss", "reward"), each))[:MOST_PANELS]

    def fill(rows: Sequence[Axes]) -> None:
        for axes, (metric, label) in zip(rows, panels, strict=False):
            for job, color in zip(jobs, JOB_COLORS[theme], strict=False):
                for curve in job.curves:
                    if (curve.metric, curve.label) == (metric, label):
                        _draw(axes, curve, color)
            axes.set_ylabel(label)
        _draw_learning_rates(rows[-1], jobs, JOB_COLORS[theme])
        if panels:
            _draw_legend(rows[0], jobs, theme)
        else:
            text = "No steps were logged"
            rows[0].text(0.5, 0.5, text, ha="center", transform=rows[0].transAxes)

    return png([4, *[1.5] * (len(panels) - 1), 1], title, COLORS[theme], fill)


def _draw(axes: Axes, curve: Curve, color: str) -> None:
    training = _points(curve, held_out=False)
    few = len(training) <= FEW_POINTS
    if training:
        shown = training if few else smoothed(training)
        axes.plot(
            *zip(*shown, strict=True),
            color=color,
            linewidth=2,
            marker="o" if few else None,
            markersize=3,
        )
    if held_out := _points(curve, held_out=True):
        axes.plot(
            *zip(*held_out, strict=True),
            color=color,
            linewidth=1.6,
            linestyle=(0, (4, 3)),
            marker="D",
            markersize=7,
        )


def _points(curve: Curve, *, held_out: bool) -> list[tuple[int, float]]:
    points = curve.held_out if held_out else curve.training
    return [(each.step, math.nan if each.value is None else each.value) for each in points]


def _draw_learning_rates(axes: Axes, jobs: Sequence[JobCurves], colors: Sequence[str]) -> None:
    last = 0
    for job, color in zip(jobs, colors, strict=False):
        for curve in job.curves:
            points = _points(curve, held_out=False)
            if curve.metric == LEARNING_RATE and points:
                axes.plot(*zip(*points, strict=True), color=color, linewidth=2)
                last = max(last, points[-1][0])
    axes.set_ylabel("Learning rate")
    axes.set_ylim(bottom=0)
    if last:
        axes.set_xlim(0, 1.02 * last)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)


def _draw_legend(axes: Axes, jobs: Sequence[JobCurves], theme: Theme) -> None:
    """Draw the color of each job, and how training and held-out curves are drawn."""
    handles = [
        Line2D([], [], color=color, linewidth=3, label=clipped(job.name, NAME_CHARACTERS))
        for job, color in zip(jobs, JOB_COLORS[theme], strict=False)
    ]
    gray = COLORS[theme]["base"]
    handles += [
        Line2D([], [], color=gray, linewidth=2, label="training, smoothed"),
        Line2D([], [], color=gray, linestyle=(0, (4, 3)), marker="D", label="held out"),
    ]
    axes.legend(handles=handles, frameon=False, loc="best")
