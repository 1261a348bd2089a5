"""The metrics of a run over its steps: `metrics.jsonl`, which a resumed run continues."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class History:
    """`metrics.jsonl`: one line per step or evaluation, of this attempt and earlier ones.

    With `enabled` False, on ranks other than 0, nothing is written.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self._path, self._enabled = path, enabled
        self._last: dict[str, float] = {}

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._last.update(line)
        if self._enabled:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def truncate(self, step: int) -> None:
        """Remove the lines after `step`, the last checkpoint: those steps are trained again."""
        if not self._enabled:
            return
        kept = [line for line in self.lines() if line["step"] <= step] if step else []
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        for line in kept:
            self._last.update(line)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines: a killed run may leave a partial last line."""
        text = self._path.read_text() if self._path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def evaluated(self, step: int | None) -> dict[str, float]:
        """Return the held-out metrics after a step; {} if the step was not evaluated."""
        measured = {"validationLoss", "generalLoss"}
        lines = [line for line in self.lines() if line["step"] == step and measured & line.keys()]
        return {name: value for name, value in lines[-1].items() if name != "step"} if lines else {}

    def last(self, name: str) -> float:
        """Return the most recent value of a metric; NaN if there is none."""
        return self._last.get(name, math.nan)
