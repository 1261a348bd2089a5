"""What an attempt's driver reported, taken into the status. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from tuneyard.api.progress import Post
from tuneyard.api.status import AttemptStatus, Progress, StageStatus

DONE = ("Succeeded", "Skipped")
"""States of a stage whose record exists."""
MAX_METRICS = 256
"""Names of metrics that a status holds: as many as one post may carry."""


def progress_of(post: Post, before: Progress | None, now: datetime) -> Progress:
    """The newest numbers; what a post leaves out stays as it was."""
    told, picture = post.trainer_status, post.tuneyard
    numbers = {item.name: _number(item.value) for item in told.metrics}
    metrics = {name: value for name, value in numbers.items() if value is not None}
    known = {**before.metrics, **metrics} if before else metrics
    percentage = told.progress_percentage
    if percentage is None:
        percentage = before.percentage if before else 0
    progress = Progress(
        stage=picture.stage if picture else "",
        step=picture.step if picture else 0,
        total_steps=picture.total_steps if picture else 0,
        percentage=percentage,
        estimated_remaining_seconds=told.estimated_remaining_seconds,
        metrics=known if len(known) <= MAX_METRICS else metrics,
        last_updated_time=told.last_updated_time or (before.last_updated_time if before else ""),
    )
    if told.last_updated_time or progress == before:
        return progress
    return progress.model_copy(update={"last_updated_time": rfc3339(now)})


def _number(value: float | str) -> float | None:
    """To six digits, as `kubectl get` shows it whole. None for what is no finite number: a status
    cannot hold it."""
    try:
        number = float(f"{float(value):.6g}")
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def merged(stages: Sequence[StageStatus], told: Sequence[StageStatus]) -> list[StageStatus]:
    """The plan's stages with what the driver told of them. A stage that is not in the plan is not
    taken; one that is done stays as it was until it really runs again."""
    news = {(stage.name, stage.kind): stage for stage in told}
    return [_newer(stage, news.get((stage.name, stage.kind), stage)) for stage in stages]


def _newer(stage: StageStatus, told: StageStatus) -> StageStatus:
    was_done = stage.state in DONE and told.state in ("Pending", "Skipped")
    return stage if was_done else told


def with_loss(attempt: AttemptStatus, stage: str, resumed_step: int) -> AttemptStatus:
    """An earlier attempt, whose stage was taken up again at this step."""
    if attempt.stage != stage or attempt.last_step is None or attempt.steps_lost is not None:
        return attempt
    return attempt.model_copy(update={"steps_lost": max(0, attempt.last_step - resumed_step)})


def rfc3339(moment: datetime) -> str:
    """RFC 3339, UTC, to the second, as Kubernetes writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
