"""Values with their intervals as points and bars on one scale, drawn as SVG in the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tuneyard.api.report import Comparison, Interval

WIDTH, MARGIN = 150.0, 6.0
"""The width of the picture and of its margin on each side, in pixels."""
ROW = 11.0
"""The height of one bar, in pixels."""


Value = tuple[str, float, Interval | None]
"""The class of the color, the value, and its interval if it is known."""


class Bar(NamedTuple):
    """One model's value: the center of a point, and the ends of its interval."""

    model: str
    """base, few-shot, tuned or job-N: the class of its color."""
    x: float
    low: float
    high: float
    y: float


class Bars(NamedTuple):
    """The bars of one metric."""

    bars: tuple[Bar, ...]
    height: float

    @classmethod
    def of(cls, comparison: Comparison) -> Bars | None:
        """Return the bars of a metric. None: no interval is known, so they would say nothing."""
        return cls.between([*_values(comparison)], is_share=comparison.is_share)

    @classmethod
    def between(cls, values: Sequence[Value], *, is_share: bool) -> Bars | None:
        """Return a bar for each value, from top to bottom. None: no interval is known."""
        if not any(interval for _, _, interval in values):
            return None
        low, high = _scale(values, is_share=is_share)

        def place(value: float) -> float:
            share = (value - low) / (high - low)
            return round(MARGIN + min(max(share, 0.0), 1.0) * (WIDTH - 2 * MARGIN), 1)

        bars = tuple(
            Bar(
                model,
                place(value),
                place(interval[0]) if interval else place(value),
                place(interval[1]) if interval else place(value),
                ROW * (number + 0.5),
            )
            for number, (model, value, interval) in enumerate(values)
        )
        return cls(bars, ROW * len(bars))


def _values(comparison: Comparison) -> Iterator[Value]:
    models = (
        ("base", comparison.base, comparison.base_interval),
        ("few-shot", comparison.few_shot, comparison.few_shot_interval),
        ("tuned", comparison.tuned, comparison.tuned_interval),
    )
    for model, value, interval in models:
        if value is not None:
            yield model, value, interval


def _scale(values: Sequence[Value], *, is_share: bool) -> tuple[float, float]:
    """Return the ends of the scale: 0 and 1 for shares, else those of all values and intervals."""
    ends = [end for _, value, interval in values for end in (value, *(interval or ()))]
    low, high = min(ends), max(ends)
    if is_share and low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)
