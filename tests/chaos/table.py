"""The table of runs: how often each fault struck, and what it broke.

    python -m tests.chaos.table RESULTS...

Each file has one line of JSON for each run, as TUNEYARD_CHAOS_RESULTS names it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.chaos.run import Verdict

HEADER = "| fault | runs | strikes | attempts | broken |\n|---|---:|---:|---:|---:|"


def table(verdicts: Sequence[Verdict]) -> str:
    """Return a Markdown table: for each fault the runs that it struck, its strikes, the attempts of
    those runs, and the runs with a broken invariant; the last line counts every run once."""
    names = sorted({name for verdict in verdicts for name in _names(verdict.struck)})
    lines = [_line(name, [v for v in verdicts if name in _names(v.struck)]) for name in names]
    strikes = sum(len(verdict.struck) for verdict in verdicts)
    return "\n".join([HEADER, *lines, _row("all", verdicts, strikes)])


def _line(name: str, verdicts: Sequence[Verdict]) -> str:
    strikes = sum(_names(verdict.struck).count(name) for verdict in verdicts)
    return _row(name, verdicts, strikes)


def _row(name: str, verdicts: Sequence[Verdict], strikes: int) -> str:
    attempts = sum(verdict.started for verdict in verdicts)
    broken = sum(bool(verdict.broken) for verdict in verdicts)
    return f"| {name} | {len(verdicts)} | {strikes} | {attempts} | {broken} |"


def _names(faults: Iterable[str]) -> list[str]:
    return [text.partition("@")[0] for text in faults]


def main(files: Sequence[str]) -> None:
    """Print the table of the files, then each run with a broken invariant."""
    lines = [line for file in files for line in Path(file).read_text().splitlines()]
    verdicts = [Verdict(**json.loads(line)) for line in lines]
    print(table(verdicts))
    for verdict in verdicts:
        if verdict.broken:
            print(f"\n{verdict}")


if __name__ == "__main__":
    main(sys.argv[1:])
