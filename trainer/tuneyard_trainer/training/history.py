"""The metrics of a run over its steps: `metrics.jsonl`, which a resumed run continues."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tuneyard_trainer.worker import Worker

METRICS = "metrics.jsonl"
"""The file of a run's `History`, in the stage's work folder."""
PERSIST_SECONDS = 60.0
"""The time between two copies to durable storage, from which trackers read; each checkpoint makes
one too."""


def is_evaluation(metrics: Iterable[str]) -> bool:
    """Return whether metrics are those of an evaluation: held-out losses, or those of suites."""
    return any(name in ("validationLoss", "generalLoss") or "/" in name for name in metrics)


class History:
    """`metrics.jsonl`: one line per step or evaluation, of this attempt and earlier ones. Ranks
    other than 0 write nothing."""

    def __init__(self, path: Path, worker: Worker) -> None:
        self._path, self._enabled, self._persist = path, worker.is_main, worker.persist
        self._persisted = time.monotonic()
        self._last: dict[str, float] = {}

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._last.update(line)
        if self._enabled:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if time.monotonic() - self._persisted > PERSIST_SECONDS:
                self._persist(self._path)
                self._persisted = time.monotonic()

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
        lines = [line for line in self.lines() if line["step"] == step and is_evaluation(line)]
        return {name: value for name, value in lines[-1].items() if name != "step"} if lines else {}

    def last(self, name: str) -> float:
        """Return the most recent value of a metric; NaN if there is none."""
        return self._last.get(name, math.nan)
