"""Merge the posts of an attempt's driver into the status. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from tuneyard.api.progress import Post
from tuneyard.api.status import AttemptStatus, MemoryEstimate, Progress, StageState, StageStatus
from tuneyard.status.times import rfc3339

DONE = ("Succeeded", "Skipped")
"""States of a stage whose record exists."""
PEAK_METRIC = "peakMemoryBytes"
"""The metric of a finished stage that is its measured peak."""
MAX_METRICS = 256
"""Most metrics that a status holds: as many as one post may carry."""


def progress_of(post: Post, before: Progress | None, now: datetime) -> Progress:
    """Return the progress after a post; values that the post omits keep their old value."""
    trainer, report = post.trainer_status, post.tuneyard
    numbers = {item.name: _number(item.value) for item in trainer.metrics}
    metrics = {name: value for name, value in numbers.items() if value is not None}
    known = {**before.metrics, **metrics} if before else metrics
    percentage = trainer.progress_percentage
    if percentage is None:
        percentage = before.percentage if before else 0
    progress = Progress(
        stage=report.stage if report else "",
        step=report.step if report else 0,
        total_steps=report.total_steps if report else 0,
        percentage=percentage,
        estimated_remaining_seconds=trainer.estimated_remaining_seconds,
        cost=report.cost if report else None,
        metrics=known if len(known) <= MAX_METRICS else metrics,
        last_updated_time=trainer.last_updated_time or (before.last_updated_time if before else ""),
    )
    if trainer.last_updated_time or progress == before:
        return progress
    return progress.model_copy(update={"last_updated_time": rfc3339(now)})


def _number(value: float | str) -> float | None:
    """Return the number with six digits, so that `kubectl get` shows all of it. None: the value is
    not finite, and a status cannot hold it."""
    try:
        number = float(f"{float(value):.6g}")
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def merge_stages(
    stages: Sequence[StageStatus], reported: Sequence[StageStatus]
) -> list[StageStatus]:
    """Return the plan's stages with the states that the driver reported. Stages outside the plan
    are ignored; a stage that is done keeps its state until it runs again."""
    newest = {(stage.name, stage.kind): stage for stage in reported}
    return [_newer(stage, newest.get((stage.name, stage.kind), stage)) for stage in stages]


def with_measured(memory: MemoryEstimate, stages: Sequence[StageStatus]) -> MemoryEstimate:
    """Return the estimate with the measured peaks of the stages that are done."""
    peaks = {
        stage.name: stage.metrics[PEAK_METRIC] for stage in stages if PEAK_METRIC in stage.metrics
    }
    measured = [
        stage.model_copy(update={"measured_bytes": peak})
        if (peak := _size(peaks.get(stage.name))) is not None
        else stage
        for stage in memory.stages
    ]
    return memory.model_copy(update={"stages": measured})


def _size(value: float | None) -> int | None:
    """Return a posted size that a status can hold. None: it is no such size."""
    return int(value) if value is not None and 0 <= value < 1 << 63 else None


def _newer(stage: StageStatus, reported: StageStatus) -> StageStatus:
    return stage if was_done(stage.state, reported.state) else reported


def was_done(state: str, reported: StageState) -> bool:
    """Return whether a stage in this state keeps it although a driver reports another one."""
    return state in DONE and reported in ("Pending", "Skipped")


def with_lost_steps(attempt: AttemptStatus, stage: str, resumed_step: int) -> AttemptStatus:
    """Return an earlier attempt with its lost steps, once its stage was resumed at
    `resumed_step`."""
    if attempt.stage != stage or attempt.last_step is None or attempt.steps_lost is not None:
        return attempt
    return attempt.model_copy(update={"steps_lost": max(0, attempt.last_step - resumed_step)})
