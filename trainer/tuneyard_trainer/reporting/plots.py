"""The curves of a training run as a PNG: the loss, or the reward and the KL divergence."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # needs no display; overrides MPLBACKEND

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from tuneyard.api.evaluation import prefixed
from tuneyard.api.stage_settings import REINFORCEMENT_KINDS, SUPERVISED_KINDS
from tuneyard.api.suites import is_main

Theme = Literal["light", "dark"]

MAX_POINTS = 4000
"""Longer series are thinned before drawing: the plot is about 1300 pixels wide."""
SMOOTHING_SHARE = 0.05
"""The smoothed line averages over this share of the run."""
TITLE_CHARACTERS = 60
"""Characters of a line of a title, in the picture's width."""
FEW_POINTS = 20
"""At most this many values are drawn as points and are not smoothed."""

# Okabe and Ito's palette, which color-blind readers can distinguish; its yellow is on dark only.
COLORS: Mapping[Theme, Mapping[str, str]] = {
    "light": {
        "background": "#ffffff",
        "text": "#1f2328",
        "grid": "#d0d7de",
        "train": "#0072b2",
        "heldOut": "#d55e00",
        "base": "#6e7781",
        "rate": "#009e73",
        "independent": "#cc79a7",
    },
    "dark": {
        "background": "#161b22",
        "text": "#e6edf3",
        "grid": "#30363d",
        "train": "#56b4e9",
        "heldOut": "#e69f00",
        "base": "#9da7b3",
        "rate": "#2fc79b",
        "independent": "#e39ac4",
    },
}

Points = Sequence[tuple[int, float]]
"""(step, value), in the order of the steps."""


@dataclass(frozen=True)
class Panel:
    """One metric of a run by step. Values may be NaN."""

    label: str
    """The label of the axis, with the unit."""
    name: str
    """The metric's name in the legend."""
    training: Points
    """One value for each step."""
    held_out: Points
    """One value for each evaluation."""
    base: float | None = None
    """The base model's value on the held-out rows. None: not measured."""
    metric: str = ""
    """The name of the metric."""
    independent: Points = ()
    """A measurement on the held-out rows that nothing is trained on, with an axis of its own: it
    may have another unit. Empty: there is none."""


@dataclass(frozen=True)
class Curves:
    """The curves of a training stage, from its `metrics.jsonl`."""

    panels: tuple[Panel, ...]
    """From top to bottom; the first is the largest."""
    learning_rate: Points

    @classmethod
    def read(cls, path: Path, kind: str = "sft") -> Curves:
        """Read the curves of a training stage of this kind.

        A missing file gives empty curves; an incomplete last line is ignored.
        """
        lines = _lines(path)
        series = partial(_series, lines)
        if kind in REINFORCEMENT_KINDS:
            independent = series("heldOutIndependentReward")
            held_out = series("heldOutReward")
            length, name = series("rewardLengthCorrelation"), "heldOutRewardLengthCorrelation"
            panels: tuple[Panel, ...] = (
                Panel(
                    "Reward",
                    "reward",
                    series("reward"),
                    held_out,
                    metric="reward",
                    independent=independent,
                ),
                Panel("KL (nats)", "KL", series("kl"), series("heldOutKl"), metric="kl"),
            )
            if length:
                panels += (
                    Panel(
                        "Correlation\nwith length",
                        "correlation",
                        length,
                        series(name),
                        metric="rewardLengthCorrelation",
                    ),
                )
        else:
            base = next((line[_BASE] for line in lines if _BASE in line), None)
            unit = " (nats per token)" if kind in (*SUPERVISED_KINDS, "distill") else ""
            training, held_out = series("loss"), series("validationLoss")
            panels = (
                Panel(f"Loss{unit}", "loss", training, held_out, base, metric="loss"),
                *_of_general_data(lines),
                *_of_suites(lines),
            )
        return cls(panels, series("learningRate"))


_BASE, _BASE_GENERAL = "baseValidationLoss", "baseGeneralLoss"
MAX_SUITE_PANELS = 3
"""The panels of suites: more of them would leave no room for the loss."""


def _of_general_data(lines: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """Yield a panel of the loss that the guard watches, if it was measured."""
    if general := _series(lines, "generalLoss"):
        base = next((line[_BASE_GENERAL] for line in lines if _BASE_GENERAL in line), None)
        yield Panel("General loss", "general loss", (), general, base, "generalLoss")


def _of_suites(lines: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """Yield a panel for each of the first metrics of suites that evaluations measured."""
    names = dict.fromkeys(name for line in lines for name in line if "/" in name)
    shown = [name for name in names if is_main(name)]
    for name in shown[:MAX_SUITE_PANELS]:
        points, bases = _series(lines, name), _series(lines, prefixed("base", name))
        base = bases[0][1] if bases else None
        yield Panel(name.replace("/", "\n"), name, [], points, base, name)


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    return [(line["step"], float(line[name])) for line in lines if name in line]


def draw(curves: Curves, title: str, theme: Theme = "light") -> bytes:
    """Return a PNG of 1600 x 1000 pixels, legible at half that size. The same curves give the same
    bytes."""
    colors = COLORS[theme]

    def fill(rows: Sequence[Axes]) -> None:
        for axes, panel in zip(rows, curves.panels, strict=False):
            _draw_panel(axes, panel, colors)
        _draw_legend(rows[0], _draw_independent(rows[0], independent, colors))
        _draw_learning_rate(rows[-1], curves.learning_rate, colors)

    independent = curves.panels[0].independent
    last = 1 if len(curves.panels) < 3 else 1.4
    pad = 60 if independent else 12  # the legend is then between the title and the panel
    return png([4, *[1.5] * (len(curves.panels) - 1), last], title, colors, fill, pad)


def png(
    heights: Sequence[float],
    title: str,
    colors: Mapping[str, str],
    fill: Callable[[Sequence[Axes]], None],
    pad: float = 12,
) -> bytes:
    """Return a PNG of 1600 x 1000 pixels with panels below each other, of which the last shows the
    optimizer step. `heights`: of the panels. `fill`: draws into them. `pad`: points between the
    title and the first panel."""
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "text.color": colors["text"],
        "axes.labelcolor": colors["text"],
        "xtick.color": colors["text"],
        "ytick.color": colors["text"],
        "axes.edgecolor": colors["grid"],
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, hspace=0.02)
        figure = Figure(figsize=(10, 6.25), dpi=160, layout=layout)
        figure.set_facecolor(colors["background"])
        rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=[*heights])
        fill(rows)
        rows[-1].set_xlabel("Optimizer step")
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        rows[0].set_title(_folded(title), loc="left", fontsize=15, fontweight="bold", pad=pad)
        for axes in rows:
            axes.set_facecolor(colors["background"])
            axes.grid(color=colors["grid"], linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _folded(title: str) -> str:
    """Return a title in lines that fit in the picture."""
    return textwrap.fill(title, TITLE_CHARACTERS, break_on_hyphens=False)


def _draw_panel(axes: Axes, panel: Panel, colors: Mapping[str, str]) -> None:
    few = len(panel.training) <= FEW_POINTS
    if panel.training:
        axes.plot(
            *zip(*thinned(panel.training), strict=True),
            color=colors["train"],
            alpha=1 if few else 0.3,
            linewidth=1.2,
            marker="o" if few else None,
            markersize=4,
            label=f"Training {panel.name}" if few else f"Training {panel.name}, each step",
        )
    if not few:
        axes.plot(
            *zip(*thinned(smoothed(panel.training)), strict=True),
            color=colors["train"],
            linewidth=2.4,
            label=f"Training {panel.name}, smoothed",
        )
    if panel.held_out:
        axes.plot(
            *zip(*panel.held_out, strict=True),
            color=colors["heldOut"],
            linewidth=1.8,
            marker="o",
            markersize=7,
            label=f"Held-out {panel.name}",
        )
    if panel.base is not None and math.isfinite(panel.base):
        axes.axhline(
            panel.base,
            color=colors["base"],
            linewidth=1.8,
            linestyle=(0, (6, 4)),
            label=f"Held-out {panel.name} of the base model",
        )
    axes.set_ylabel(panel.label)


def _draw_independent(axes: Axes, points: Points, colors: Mapping[str, str]) -> Axes | None:
    """Draw an independent measurement over the first panel, on an axis at the right. None: there is
    none."""
    if not points:
        return None
    beside = axes.twinx()
    beside.plot(
        *zip(*points, strict=True),
        color=colors["independent"],
        linewidth=1.8,
        linestyle=(0, (3, 2)),
        marker="s",
        markersize=6,
        label="Held-out independent reward (right axis)",
    )
    beside.set_ylabel("Independent reward", color=colors["independent"])
    beside.spines[["top", "left"]].set_visible(False)
    beside.spines["right"].set_color(colors["grid"])
    return beside


def _draw_legend(axes: Axes, beside: Axes | None) -> None:
    """Draw the legend of all panels into the first one; above it, if there are curves of two axes,
    which leave no room. `beside`: the axes over the first panel."""
    handles, labels = axes.get_legend_handles_labels()
    if beside is not None:
        more = beside.get_legend_handles_labels()
        handles, labels = [*handles, *more[0]], [*labels, *more[1]]
        axes.legend(
            handles,
            labels,
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
            borderaxespad=0.2,
        )
    elif handles:
        axes.legend(frameon=False, loc="best")
    else:
        axes.text(0.5, 0.5, "No steps were logged", ha="center", transform=axes.transAxes)


def _draw_learning_rate(axes: Axes, points: Points, colors: Mapping[str, str]) -> None:
    if points:
        axes.plot(
            *zip(*thinned(points), strict=True),
            color=colors["rate"],
            linewidth=2,
            marker="o" if len(points) == 1 else None,
        )
        axes.set_xlim(0, 1.02 * points[-1][0])
    axes.set_ylabel("Learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)


def smoothed(points: Points) -> Points:
    """Return a bias-corrected exponential average (Kingma & Ba 2015, section 3).

    A value that is not finite becomes NaN, a gap in the line, and does not enter the average.
    """
    keep = 1 - 1 / max(1.0, SMOOTHING_SHARE * len(points))
    total = weight = 0.0
    result = []
    for step, value in points:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
            result.append((step, total / weight))
        else:
            result.append((step, math.nan))
    return result


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """Return every n-th point and the last one: at most about `most`."""
    interval = -(-len(points) // most)
    if interval <= 1:
        return points
    return [*points[:-1:interval], points[-1]]
