"""The stages that a driver has seen in the events of its workers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tuneyard.api.plan import Plan, StageRecord
from tuneyard.api.stage_settings import StageKind


@dataclass(frozen=True)
class SeenStage:
    """A stage that runs or is done."""

    name: str
    kind: StageKind
    identity: str
    record: StageRecord | None = None
    """None: the stage is not done."""
    readable: bool = False
    """Whether its `metrics.jsonl` holds no step that this attempt trains again: a stage cuts the
    file back to its checkpoint when it begins."""


class SeenStages:
    """The stages, in the order of their events. One thread adds, others read."""

    def __init__(self, plan: Plan) -> None:
        self._kinds = {stage.name: stage.kind for stage in plan.stages}
        self._stages: dict[str, SeenStage] = {}
        self._lock = threading.Lock()

    def add(self, event: Mapping[str, Any]) -> bool:
        """Add an event of the runner. Return whether it changed the stages: a step does not."""
        if event["type"] == "stage":
            value = event["record"]
            record = StageRecord.model_validate(value) if value else None
            name = event["stage"]
            seen = SeenStage(
                name, self._kinds[name], event["identity"], record, readable=record is not None
            )
        elif event["type"] == "progress" and event.get("resumedStep") is not None:
            seen = replace(self._stages[event["stage"]], readable=True)
        else:
            return False
        with self._lock:
            self._stages[seen.name] = seen
        return True

    def all(self) -> list[SeenStage]:
        """Return the stages."""
        with self._lock:
            return list(self._stages.values())
