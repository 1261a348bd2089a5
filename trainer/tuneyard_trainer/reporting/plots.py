"""The curves of a training run as a PNG: its loss, or the reward of its answers."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # no display, whatever MPLBACKEND says

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from tuneyard.api.stage_settings import REINFORCEMENT_KINDS, SUPERVISED_KINDS

Theme = Literal["light", "dark"]

MAX_POINTS = 4000
"""A longer run is thinned out for drawing: the plot is some 1300 pixels wide."""
SMOOTHING_SHARE = 0.05
"""The smoothed line averages over so much of the run."""
FEW_POINTS = 20
"""So few losses are drawn as points, and not smoothed."""

# Okabe and Ito's palette, told apart with any colour vision; the yellow-ish ones only on dark.
COLOURS: Mapping[Theme, Mapping[str, str]] = {
    "light": {
        "ground": "#ffffff",
        "ink": "#1f2328",
        "faint": "#d0d7de",
        "train": "#0072b2",
        "heldOut": "#d55e00",
        "base": "#6e7781",
        "rate": "#009e73",
    },
    "dark": {
        "ground": "#161b22",
        "ink": "#e6edf3",
        "faint": "#30363d",
        "train": "#56b4e9",
        "heldOut": "#e69f00",
        "base": "#9da7b3",
        "rate": "#2fc79b",
    },
}

Points = Sequence[tuple[int, float]]
"""(step, value), by rising step."""


@dataclass(frozen=True)
class Panel:
    """One figure of a run over its steps. Values may be NaN."""

    label: str
    """The axis's, with the unit."""
    name: str
    """What is drawn, as the legend says it."""
    each: Points
    """Of each step."""
    held_out: Points
    base: float | None = None
    """The base model's on the held-out rows; None where it was not measured."""


@dataclass(frozen=True)
class Curves:
    """What `metrics.jsonl` holds."""

    panels: tuple[Panel, ...]
    """From the top; the first is the largest."""
    learning_rate: Points

    @classmethod
    def read(cls, path: Path, kind: str = "sft") -> Curves:
        """Of a training stage of this kind. Empty where there is no file; a torn last line is left
        out."""
        lines = _lines(path)
        series = partial(_series, lines)
        if kind in REINFORCEMENT_KINDS:
            panels: tuple[Panel, ...] = (
                Panel("Reward", "reward", series("reward"), series("heldOutReward")),
                Panel("KL (nats)", "KL", series("kl"), series("heldOutKl")),
            )
        else:
            base = next((line[_BASE] for line in lines if _BASE in line), None)
            unit = " (nats per token)" if kind in SUPERVISED_KINDS else ""
            each, held_out = series("loss"), series("validationLoss")
            panels = (Panel(f"Loss{unit}", "loss", each, held_out, base),)
        return cls(panels, series("learningRate"))


_BASE = "baseValidationLoss"


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    return [(line["step"], float(line[name])) for line in lines if name in line]


def draw(curves: Curves, title: str, theme: Theme = "light") -> bytes:
    """A PNG of 1600 x 1000 pixels, legible at half that; the same bytes for the same curves."""
    colours = COLOURS[theme]
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "text.color": colours["ink"],
        "axes.labelcolor": colours["ink"],
        "xtick.color": colours["ink"],
        "ytick.color": colours["ink"],
        "axes.edgecolor": colours["faint"],
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, hspace=0.02)
        figure = Figure(figsize=(10, 6.25), dpi=160, layout=layout)
        figure.set_facecolor(colours["ground"])
        heights = [4, *[1.5] * (len(curves.panels) - 1), 1]
        every = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        for axes, panel in zip(every, curves.panels, strict=False):
            _draw_panel(axes, panel, colours)
        _explain(every[0])
        _draw_rate(every[-1], curves.learning_rate, colours)
        every[0].set_title(title, loc="left", fontsize=15, fontweight="bold", pad=12)
        for axes in every:
            axes.set_facecolor(colours["ground"])
            axes.grid(color=colours["faint"], linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _draw_panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    few = len(panel.each) <= FEW_POINTS
    if panel.each:
        axes.plot(
            *zip(*thinned(panel.each), strict=True),
            color=colours["train"],
            alpha=1 if few else 0.3,
            linewidth=1.2,
            marker="o" if few else None,
            markersize=4,
            label=f"Training {panel.name}" if few else f"Training {panel.name}, each step",
        )
    if not few:
        axes.plot(
            *zip(*thinned(smoothed(panel.each)), strict=True),
            color=colours["train"],
            linewidth=2.4,
            label=f"Training {panel.name}, smoothed",
        )
    if panel.held_out:
        axes.plot(
            *zip(*panel.held_out, strict=True),
            color=colours["heldOut"],
            linewidth=1.8,
            marker="o",
            markersize=7,
            label=f"Held-out {panel.name}",
        )
    if panel.base is not None and math.isfinite(panel.base):
        axes.axhline(
            panel.base,
            color=colours["base"],
            linewidth=1.8,
            linestyle=(0, (6, 4)),
            label=f"Held-out {panel.name} of the base model",
        )
    axes.set_ylabel(panel.label)


def _explain(axes: Axes) -> None:
    """The legend, which stands for the panels below too."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best")
    else:
        axes.text(0.5, 0.5, "No step was logged", ha="center", transform=axes.transAxes)


def _draw_rate(axes: Axes, points: Points, colours: Mapping[str, str]) -> None:
    if points:
        axes.plot(
            *zip(*thinned(points), strict=True),
            color=colours["rate"],
            linewidth=2,
            marker="o" if len(points) == 1 else None,
        )
        axes.set_xlim(0, 1.02 * points[-1][0])
    axes.set_ylabel("Learning rate")
    axes.set_xlabel("Optimizer step")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def smoothed(points: Points) -> Points:
    """An exponential average without its start's bias (Kingma & Ba 2015, section 3); a value that
    is not finite leaves a gap and is no part of it."""
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


def thinned(points: Points) -> Points:
    """Every n-th point and the last one, so that at most about MAX_POINTS are left."""
    every = -(-len(points) // MAX_POINTS)
    if every <= 1:
        return points
    return [*points[:-1:every], points[-1]]
