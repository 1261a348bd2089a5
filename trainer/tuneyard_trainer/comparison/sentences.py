"""The comparison in words: which job is better, by how much, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuneyard.api.comparison import Cost, Difference, MetricRow
from tuneyard_trainer.reporting.formatting import duration, number, size

MOST_NAMED = 3
"""Differences that a sentence names; of more, it names the jobs."""
NOTABLE = 1.1
"""Costs whose ratio is smaller are called equal."""


def sentences(
    names: Sequence[str], metrics: Sequence[MetricRow], costs: Sequence[Cost]
) -> list[str]:
    """Return the sentences, the most important one first. `names`: of the jobs."""
    judged = [row for row in metrics if row.higher_is_better is not None and row.differences]
    clear = [row for row in judged if any(each.better is not None for each in row.differences)]
    compared = [row for row in judged if any(map(_is_compared, row.differences))]
    unclear = [row.metric for row in compared if row not in clear]
    found = [_overall(names, compared)] if compared else [*_incomparable(names, judged)]
    found += [_about(names, row) for row in clear]
    if unclear and clear:
        found.append(f"No clear difference on {listed(unclear)}.")
    return [*found, *_about_costs(names, costs)]


def _is_compared(difference: Difference) -> bool:
    return difference.interval is not None and difference.basis in ("paired", "unpaired")


def _incomparable(names: Sequence[str], rows: Sequence[MetricRow]) -> Iterator[str]:
    if rows:
        metrics = listed([row.metric for row in rows])
        yield f"{metrics} of {listed(names)} cannot be compared; the notes say why."


def listed(words: Sequence[str], last: str = "and") -> str:
    """Return "a", "a and b" or "a, b and c"."""
    *rest, final = words
    return f"{', '.join(rest)} {last} {final}" if rest else final


def _overall(names: Sequence[str], rows: Sequence[MetricRow]) -> str:
    total = f"{len(rows)} metric{'' if len(rows) == 1 else 's'}"
    if len(names) > 2:
        return _overall_of_several(names, rows, total)
    wins = [sum(each.better == job for row in rows for each in row.differences) for job in range(2)]
    if not any(wins):
        return f"No clear difference between {names[0]} and {names[1]} on {total}."
    if all(wins):
        return (
            f"Neither is better on all: {names[0]} is better on {wins[0]} and {names[1]} on "
            f"{wins[1]} of {total}."
        )
    job = wins.index(max(wins))
    better = f"{names[job]} is better than {names[1 - job]} on"
    if wins[job] < len(rows):
        return f"{better} {wins[job]} of {total}, and worse on none."
    return f"{better} {_every(rows)}."


def _every(rows: Sequence[MetricRow]) -> str:
    if len(rows) == 1:
        return f"{rows[0].metric}, the only metric that was compared"
    return "both metrics" if len(rows) == 2 else f"all {len(rows)} metrics"


def _overall_of_several(names: Sequence[str], rows: Sequence[MetricRow], total: str) -> str:
    bests = [sum(row.best == job for row in rows) for job in range(len(names))]
    if len(rows) in bests:
        return f"{names[bests.index(len(rows))]} is best on {_every(rows)}."
    parts = [f"{name} is best on {won}" for name, won in zip(names, bests, strict=True) if won]
    if parts:
        return f"Of {total}, {listed(parts)}."
    if any(each.better is not None for row in rows for each in row.differences):
        return f"No job is clearly better than each other job on any of {total}."
    return f"No clear difference between {listed(names)} on {total}."


def _about(names: Sequence[str], row: MetricRow) -> str:
    clear = [each for each in row.differences if each.better is not None]
    if len(names) == 2:
        winner = names[clear[0].better or 0]
        return f"{winner} is better on {row.metric} by {_amount(clear[0])}."
    if row.best is not None:
        won = [each for each in clear if each.better == row.best]
        if len(won) > MOST_NAMED:
            nearest = min(won, key=lambda each: abs(each.value or 0.0))
            than = f"than each other job, than {names[_loser(nearest)]} by {_amount(nearest)}"
            return f"{names[row.best]} is best on {row.metric}: better {than}."
        parts = [f"than {names[_loser(each)]} by {_amount(each)}" for each in won]
        return f"{names[row.best]} is best on {row.metric}: better {listed(parts)}."
    beaten = {_loser(each) for each in clear}
    leading = [
        name for job, name in enumerate(names) if job not in beaten and row.values[job] is not None
    ]
    if len(clear) > MOST_NAMED:
        return f"On {row.metric} none is clearly better than {listed(leading)}."
    parts = [
        f"{names[each.better or 0]} is better than {names[_loser(each)]} by {_amount(each)}"
        for each in clear
    ]
    return f"On {row.metric} none is best: {listed(parts)}."


def _loser(difference: Difference) -> int:
    return difference.first if difference.better == difference.second else difference.second


def _amount(difference: Difference) -> str:
    """Return "0.21 (95% interval 0.05 to 0.37, 20 items)", always above 0."""
    if difference.value is None or difference.interval is None:
        return number(difference.value)
    low, high = difference.interval
    if difference.value < 0:
        low, high = -high, -low
    how = "unpaired" if difference.items is None else f"{difference.items:,} items"
    return f"{number(abs(difference.value))} (95% interval {ends(low, high)}, {how})"


def ends(low: float, high: float) -> str:
    """Return the ends of an interval: "0.05 to 0.37"."""
    return f"{number(low + 0.0)} to {number(high + 0.0)}"


# ---- costs --------------------------------------------------------------------------------------


def _about_costs(names: Sequence[str], costs: Sequence[Cost]) -> Iterator[str]:
    found = {cost.name: cost.values for cost in costs}
    for name, shown, said, equal in (
        ("trainingSeconds", duration, "took {} times as long to train as", "training time"),
        ("peakMemoryBytes", size, "took {} times the memory of", "peak memory"),
    ):
        values = found.get(name) or ()  # type: ignore[call-overload]
        known = {job: value for job, value in enumerate(values) if value}
        if len(known) < 2:
            continue
        most, least = max(known, key=lambda j: known[j]), min(known, key=lambda j: known[j])
        ratio = known[most] / known[least]
        texts = dict.fromkeys((shown(known[most]), shown(known[least])))
        between = f"({' and '.join(texts)})"
        if ratio >= NOTABLE:
            times = said.format(f"{ratio:.2g}" if ratio < 10 else f"{ratio:,.0f}")
            yield f"{names[most]} {times} {names[least]} {between}."
        else:
            yield f"The {equal} is about equal {between}."
