"""The steps of the stages, read from `metrics.jsonl` in the output as far as it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tuneyard.api.pods import stage_folder
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.training.history import METRICS

MOST_BYTES = 256 << 10
"""The most that is read at once, which bounds the memory of a tracker."""


class Step(NamedTuple):
    """The metrics of one line: of a step, or of an evaluation after it."""

    step: int
    metrics: Mapping[str, float]
    """Finite numbers."""


class StepReader:
    """Reads each stage's lines once, in order. A line counts as read when it is passed to
    `advance`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._offsets: dict[str, int] = {}
        """By stage: the bytes of the lines that were read."""

    def next(self, stage: str) -> tuple[list[Step], int]:
        """Return the next lines and where they end; no lines: all that are complete were read."""
        start = self._offsets.get(stage, 0)
        data = self._store.read(_file(stage), start, start + MOST_BYTES)
        complete = data[: data.rfind(b"\n") + 1]
        return [_step(line) for line in complete.splitlines()], start + len(complete)

    def advance(self, stage: str, end: int) -> None:
        """Count the lines before `end` as read."""
        self._offsets[stage] = end

    def restart(self) -> None:
        """Read all lines of all stages again."""
        self._offsets = {}

    def unread(self, stage: str) -> int:
        """Return the number of lines that are not read."""
        count, end = 0, self._offsets.get(stage, 0)
        while data := self._store.read(_file(stage), end, end + MOST_BYTES):
            count, end = count + data.count(b"\n"), end + len(data)
        return count


def _file(stage: str) -> str:
    return f"{stage_folder(stage)}/{METRICS}"


def _step(line: bytes) -> Step:
    value: dict[str, Any] = json.loads(line)
    step = value.pop("step")
    return Step(step, {name: float(item) for name, item in value.items() if _is_metric(item)})


def _is_metric(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
