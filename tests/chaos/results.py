"""What runs under faults found: one line of JSON for each, and a table of all.

    python -m tests.chaos.results RESULTS...

Each file has one line of JSON for each run, as TUNEYARD_CHAOS_RESULTS names it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEADER = "| fault | runs | strikes | attempts | broken |\n|---|---:|---:|---:|---:|"


@dataclass
class Verdict:
    """The outcome of one run."""

    seed: int
    index: int
    began: str
    """The time of its start (RFC 3339)."""
    struck: list[str] = field(default_factory=list)
    """The faults that struck, in order, with their moments."""
    missed: list[str] = field(default_factory=list)
    """The faults for which the job ended too early, or which this machine cannot carry out."""
    shared: list[str] = field(default_factory=list)
    """The faults of other runs that struck this one too."""
    attempts: list[str] = field(default_factory=list)
    """The reasons of the ends of its attempts; a job that was created anew has only the newest."""
    started: int = 0
    """Number of attempts that started, of every job of this name."""
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)
    """The broken invariants."""

    def __str__(self) -> str:
        words = " ".join(self.struck) or "undisturbed"
        ended = "broken: " + "; ".join(self.broken) if self.broken else "ok"
        return f"run {self.seed}/{self.index}: {words} -> {' '.join(self.attempts)} {ended}"


def append(file: Path, verdict: Verdict) -> None:
    """Append one line of JSON to the file."""
    with file.open("a", encoding="utf-8") as results:
        results.write(json.dumps(asdict(verdict)) + "\n")


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
