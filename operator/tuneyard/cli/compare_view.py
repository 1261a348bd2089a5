"""The output of `tuneyard compare`: tables and sentences of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from tuneyard.api.comparison import Comparison, Cost, MetricRow, Setting
from tuneyard.cli.views import ABSENT, duration, number, plain

Cells = Sequence[Sequence[Text]]

BEST = "best"
MANY = 4
"""Columns of jobs that fit on a terminal."""
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
    yield from _settings(names, comparison.settings)
    if comparison.costs:
        yield Text("\nCost", style="bold")
        yield _costs_table(names, comparison.costs)


def _table(first: str, titles: Sequence[str], *, justify: JustifyMethod = "right") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for title in titles:
        table.add_column(title, justify=justify, overflow="fold")
    return table


def _turned(title: str, labels: Sequence[str], names: Sequence[str], cells: Cells) -> Table:
    """Return a table with a row for each label and a column for each job; of more than MANY jobs,
    with a row for each job. `cells`: those of each label."""
    if len(names) <= MANY:
        table = _table(title, names)
        for label, row in zip(labels, cells, strict=True):
            table.add_row(label, *row)
        return table
    table = _table("Job", labels)
    table.columns[0].no_wrap = True
    for name, column in zip(names, zip(*cells, strict=True), strict=True):
        table.add_row(name, *column)
    return table


def _metrics_table(names: Sequence[str], rows: Sequence[MetricRow]) -> Table:
    with_base = any(row.base is not None for row in rows)
    cells = [
        [*([_base(row)] if with_base else []), *(_cell(row, job) for job in range(len(names)))]
        for row in rows
    ]
    labels = [plain(row.metric) for row in rows]
    return _turned("Metric", labels, [*(["base"] if with_base else []), *names], cells)


def _base(row: MetricRow) -> Text:
    return Text(ABSENT if row.base is None else number(row.base))


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


def _settings(names: Sequence[str], settings: Sequence[Setting]) -> Iterator[RenderableType]:
    """Yield a table of the settings; of more than MANY jobs, the jobs by each value."""
    if not settings:
        yield Text("none known")
    elif len(names) <= MANY:
        table = _table("Field", names, justify="left")
        table.columns[0].no_wrap = True
        for setting in settings:
            values = (ABSENT if value is None else plain(value) for value in setting.values)
            table.add_row(plain(setting.field), *values)
        yield table
    else:
        for setting in settings:
            yield Text(plain(setting.field))
            jobs: dict[str, list[str]] = {}
            for name, value in zip(names, setting.values, strict=True):
                jobs.setdefault(ABSENT if value is None else plain(value), []).append(name)
            for value, having in jobs.items():
                yield Text(f"  {value}: {', '.join(having)}")


def _costs_table(names: Sequence[str], costs: Sequence[Cost]) -> Table:
    cells = [
        [
            Text(ABSENT if value is None else _UNITS.get(cost.name, _whole)(value))
            for value in cost.values
        ]
        for cost in costs
    ]
    return _turned("", [cost.label for cost in costs], names, cells)


def _whole(value: float) -> str:
    return f"{value:,.0f}"
