"""The results of a benchmark that trains several times: a line of JSON for each run, and a table.

A run whose label and seed are in the file is not repeated, so that an interrupted benchmark goes on
with the next run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

THE_BASE = "the base"
"""The label of the model that no run has trained."""


class Journal:
    """The results of the runs so far."""

    def __init__(self, path: Path) -> None:
        """Read the results, if there are some."""
        self.path = path
        text = path.read_text("utf-8") if path.exists() else ""
        self.results: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def has(self, label: str, seed: int) -> bool:
        """Return whether a run has ended."""
        return any((each["label"], each["seed"]) == (label, seed) for each in self.results)

    def add(self, label: str, seed: int, **figures: Any) -> None:
        """Add the figures of a run."""
        self.results.append({"label": label, "seed": seed, **figures})
        line = json.dumps(self.results[-1]) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        sys.stderr.write(line)

    def table(self, columns: Sequence[Column]) -> Iterator[str]:
        """Yield the lines of a Markdown table: the mean of each label's runs with, of several, the
        least and the most in parentheses. Figures that no run has get no column."""
        base = next((each for each in self.results if each["label"] == THE_BASE), {})
        known = [
            column for column in columns if any(column.of(each, base) for each in self.results)
        ]
        yield "| | runs | " + " | ".join(column.title for column in known) + " |"
        yield "|---|---:|" + "---:|" * len(known)
        for label in dict.fromkeys(each["label"] for each in self.results):
            runs = [each for each in self.results if each["label"] == label]
            cells = (column.cell(runs, base) for column in known)
            yield f"| {label} | {len(runs)} | " + " | ".join(cells) + " |"


class Column(NamedTuple):
    """A column of the table."""

    title: str
    name: str
    """The figure of a run."""
    form: str
    sign: int = 0
    """1: by how much the figure is above the base's, -1: below it. 0: the figure itself."""

    def of(self, run: dict[str, Any], base: dict[str, Any]) -> list[float]:
        """Return the value of a run; [] if it has none."""
        if self.name not in run:
            return []
        if not self.sign:
            return [run[self.name]]
        if self.name not in base or run is base:
            return []
        return [self.sign * (run[self.name] - base[self.name])]

    def cell(self, runs: Sequence[dict[str, Any]], base: dict[str, Any]) -> str:
        """Return the cell of the runs of a label."""
        values = [value for run in runs for value in self.of(run, base)]
        if len(values) < 2:
            return "".join(map(self.form.format, values))
        spread = f"{self.form} to {self.form}".format(min(values), max(values))
        return f"{self.form.format(fmean(values))} ({spread})"
