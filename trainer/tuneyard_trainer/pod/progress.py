"""An attempt's progress, computed from the workers' events, as the operator receives it.

Pure: events and times in, `Post`s out.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuneyard.api.gates import GateResult
from tuneyard.api.job_facts import JobFacts
from tuneyard.api.plan import Plan, StageRecord
from tuneyard.api.pods import stage_folder
from tuneyard.api.progress import (
    LONGEST_NAME,
    MetricValue,
    Outcome,
    Post,
    ProgressReport,
    TrainerStatus,
)
from tuneyard.api.stage_settings import EVALUATION_KINDS
from tuneyard.api.status import MOST_SECONDS, Result, StageCost, StageState, StageStatus

SHORT = ("augment", "prepare", "leaks", "pairs", *EVALUATION_KINDS, "export")
WEIGHTS = dict.fromkeys(SHORT, 1.0)
"""The weight of a short stage in the job's percentage, by kind. The quickstart on two cores spends
12% of its time in prepare, 71% in training, 11% in evaluate and 7% in export. Longer jobs spend
more in training."""
LONG = 7.0
"""The weight of all other kinds, which train or sample."""
MOST_METRICS = 256
SECONDS_PER_HOUR = 3600.0


class AttemptProgress:
    """The state of an attempt after the events so far."""

    def __init__(
        self,
        plan: Plan,
        attempt: int,
        at: float,
        *,
        workers: int | None = None,
        preparing: bool = False,
    ) -> None:
        """`at`, here and below: seconds since the epoch. `workers`: of this attempt. None: as
        planned. `preparing`: only the leading stages run, before there are workers."""
        self._preparing = preparing
        self._workers = workers or plan.compute.workers or 1
        self._started_at = at
        """When the running stage began."""
        self._plan, self._attempt = plan, attempt
        self._stages = {s.name: StageStatus(name=s.name, kind=s.kind) for s in plan.stages}
        self._weights = {s.name: WEIGHTS.get(s.kind, LONG) for s in plan.stages}
        self._records: dict[str, StageRecord] = {}
        self._stage = ""
        self._step = self._total = 0
        self._resumed: int | None = None
        self._metrics: dict[str, float] = {}
        self._updated_at = at
        self._pace: tuple[int, float] | None = None
        """The step and the time from which this stage's pace is measured."""
        self._percentage = 0
        self._facts: JobFacts | None = None

    def set_facts(self, facts: JobFacts | None) -> None:
        """Ask with these facts in each post from now on. None: ask nothing."""
        self._facts = facts

    def add(self, event: Mapping[str, Any], at: float) -> None:
        """Add one event of the runner."""
        self._updated_at = at
        if event["type"] == "stage":
            self._add_stage(event, at)
        elif event["type"] == "progress" and event["stage"] == self._stage:
            self._add_progress(event, at)
        self._percentage = max(self._percentage, self._measured())

    def post(self) -> Post:
        """Return the post for the present state."""
        return Post(
            trainer_status=TrainerStatus(
                progress_percentage=self._percentage,
                estimated_remaining_seconds=self._remaining(),
                metrics=[
                    MetricValue(name=name, value=value)
                    for name, value in list(self._metrics.items())[:MOST_METRICS]
                    if len(name) <= LONGEST_NAME
                ],
                last_updated_time=rfc3339(self._updated_at),
            ),
            tuneyard=ProgressReport(
                attempt=self._attempt,
                preparing=self._preparing,
                stage=self._stage,
                step=self._step,
                total_steps=self._total,
                resumed_step=self._resumed,
                cost=self._cost(),
                stages=list(self._stages.values()),
                facts=self._facts,
            ),
        )

    def success(self) -> Outcome:
        """Return the outcome of a successful attempt, from the records of its stages."""
        last = self._plan.stages[-1].name
        evaluations = [s.name for s in self._plan.stages if s.kind in EVALUATION_KINDS]
        measured = self._records.get(evaluations[-1]) if evaluations else None
        exported = self._records.get(last)
        result = Result(
            uri=f"{self._plan.output.uri.rstrip('/')}/{stage_folder(last)}",
            digest=exported.digest if exported else None,
            metrics=finite(measured.metrics) if measured else {},
        )
        return Outcome(state="Succeeded", result=result)

    def end(self, outcome: Outcome, at: float) -> Post:
        """Return the last post, which carries the outcome."""
        self._updated_at = at
        if outcome.state == "Succeeded":
            self._percentage = 100
        elif self._stage:
            state: StageState = "Failed" if outcome.state == "Failed" else "Pending"
            self._change(self._stage, state=state, finished_at=rfc3339(at))
        post = self.post()
        report = post.tuneyard
        return post.model_copy(
            update={"tuneyard": report and report.model_copy(update={"outcome": outcome})}
        )

    def _add_stage(self, event: Mapping[str, Any], at: float) -> None:
        name, value = event["stage"], event["record"]
        record = StageRecord.model_validate(value) if value else None
        if record is None:
            self._stage, self._step, self._total = name, 0, 0
            self._resumed = self._pace = None
            self._started_at = at
            self._change(name, state=event["state"], started_at=rfc3339(at))
            return
        self._stage, self._step, self._total = "", 0, 0
        self._records[name] = record
        self._change(
            name,
            state=event["state"],
            started_at=record.started_at,
            finished_at=record.finished_at,
            digest=record.digest,
            metrics=finite(record.metrics),
            reused=record.reused or None,
            gates=_gates(record.details.get("gates", ())),
        )

    def _add_progress(self, event: Mapping[str, Any], at: float) -> None:
        self._step, self._total = event["step"], event["totalSteps"]
        if event.get("resumedStep") is not None:
            self._resumed = event["resumedStep"]
        if self._step and self._pace is None:
            self._pace = (self._step, at)
        self._metrics |= finite(event["metrics"])
        if "gates" in event:
            self._change(self._stage, gates=_gates(event["gates"]))

    def _change(self, name: str, **changes: Any) -> None:
        self._stages[name] = self._stages[name].model_copy(update=changes)

    def _measured(self) -> int:
        """Return the percentage of the job's weight that is done; 100 only after the outcome."""
        done = 0.0
        for name, weight in self._weights.items():
            if self._stages[name].state in ("Succeeded", "Skipped"):
                done += weight
            elif name == self._stage and self._total:
                done += weight * min(1.0, self._step / self._total)
        return min(99, int(100 * done / sum(self._weights.values())))

    def _remaining(self) -> int | None:
        """Return the seconds to the stage's end at this attempt's pace; None: unknown."""
        if self._pace is None or not self._total:
            return None
        step, since = self._pace
        if self._step <= step:
            return None
        per_step = (self._updated_at - since) / (self._step - step)
        return max(0, round(per_step * (self._total - self._step)))

    def _cost(self) -> StageCost | None:
        """Return what the whole stage takes at this attempt's pace; None: unknown."""
        remaining, compute = self._remaining(), self._plan.compute
        if remaining is None:
            return None
        seconds = min(max(0.0, self._updated_at - self._started_at) + remaining, MOST_SECONDS)
        hours = seconds / SECONDS_PER_HOUR
        gpus, price = self._workers * (compute.gpus_per_worker or 0), compute.price_per_hour
        return StageCost(
            total_seconds=round(seconds),
            gpu_hours=round(hours * gpus, 2) if gpus else None,
            price=None if price is None else round(hours * self._workers * price, 2),
        )


def _gates(values: Sequence[Any]) -> list[GateResult]:
    return [GateResult.model_validate(value) for value in values]


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics without NaN and infinity, which JSON lacks."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def rfc3339(at: float) -> str:
    """Return a time as RFC 3339, in UTC, to the second."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
