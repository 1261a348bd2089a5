"""The output of `tuneyard compare`: tables and sentences of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tuneyard.api.comparison import Comparison, Cost, MetricRow
from tuneyard.cli.views import ABSENT, duration, number, plain

BEST = "best"
GIB = 1 << 30
_UNITS: dict[str, Callable[[float], str]] = {
    "trainingSeconds": duration,
    "seconds": duration,
    "peakMemoryBytes": lambda value: f"{value / GIB:.2f} GiB",
}


def comparison_view(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield the parts of the output from top to bottom."""
    names = [plain(job.label) for job in comparison.jobs]
    if comparison.metrics:
        yield _metrics_table(names, comparison.metrics)
        yield Text("Below each value: its 95% interval.\n", style="dim")
    for sentence in comparison.sentences:
        yield Text(plain(sentence), style="bold" if sentence == comparison.sentences[0] else "")
    for note in comparison.notes:
        yield Text(f"Note: {plain(note)}", style="yellow")
    yield Text("\nSettings that differ", style="bold")
    yield _settings_table(names, comparison) if comparison.settings else Text("none")
    if comparison.costs:
        yield Text("\nCost", style="bold")
        yield _costs_table(names, comparison.costs)


def _table(first: str, names: Sequence[str], *, justify_right: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right" if justify_right else "left", overflow="fold")
    return table


def _metrics_table(names: Sequence[str], rows: Sequence[MetricRow]) -> Table:
    with_base = any(row.base is not None for row in rows)
    table = _table("Metric", [*(["base"] if with_base else []), *names], justify_right=True)
    for row in rows:
        base = [ABSENT if row.base is None else number(row.base)] if with_base else []
        cells = [_cell(row, job) for job in range(len(names))]
        table.add_row(plain(row.metric), *base, *cells)
    return table


def _cell(row: MetricRow, job: int) -> Text:
    value, interval = row.values[job], row.intervals[job]
    if value is None:
        return Text(ABSENT)
    best = row.best == job
    text = Text(f"{BEST} " if best else "", style="bold green" if best else "", justify="right")
    text.append(number(value))
    if interval is not None:
        low, high = (number(end) for end in interval)
        text.append(f"\n{low} to {high}", style="not bold dim")
    return text


def _settings_table(names: Sequence[str], comparison: Comparison) -> Table:
    table = _table("Field", names, justify_right=False)
    for setting in comparison.settings:
        values = (ABSENT if value is None else plain(value) for value in setting.values)
        table.add_row(plain(setting.field), *values)
    return table


def _costs_table(names: Sequence[str], costs: Sequence[Cost]) -> Table:
    table = _table("", names, justify_right=True)
    for cost in costs:
        shown = _UNITS.get(cost.name, lambda value: f"{value:,.0f}")
        values = (ABSENT if value is None else shown(value) for value in cost.values)
        table.add_row(cost.label, *values)
    return table
