"""The output of `tuneyard status`: tables and lines, made from a job, its events and the time."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuneyard.api.gates import VERDICT_WORDS, GateResult
from tuneyard.api.status import (
    AttemptStatus,
    JobStatus,
    MemoryEstimate,
    Progress,
    StageCost,
    StageEstimate,
    StageStatus,
)
from tuneyard.cli.jobs import Event, JobView, time_of

ABSENT = "\N{EN DASH}"
STYLES = {
    "Succeeded": "green",
    "Running": "cyan",
    "Failed": "red",
    "Suspended": "yellow",
    "Queued": "yellow",
    "Preparing": "cyan",
}
GIB = 1 << 30
MAX_EVENTS = 8
STAGE_METRICS = (
    *("validationLoss", "generalLossIncrease", "loss", "validationPerplexity", "lossReduction"),
    "answerAccuracy",
    *("preferenceAccuracy", "rewardAccuracy", "reward", "independentReward"),
    *("kl", "steps", "rows", "tokens"),
)
"""The metrics of a stage that are shown first; four fit in a line."""
VERDICT_STYLES = {
    "pass": "green",
    "breach": "red",
    "insufficientEvidence": "yellow",
    "missing": "red",
}
CONDITION_STATUS = {"True": "yes", "False": "no", "Unknown": "unknown"}


# ---- all jobs -----------------------------------------------------------------------------------


def jobs_table(jobs: Sequence[JobView], now: datetime, *, with_namespace: bool) -> Table:
    """Return a table with a line for each job."""
    table = _bare_table()
    for title in (*(["Namespace"] if with_namespace else []), "Kind", "Name", "Phase", "Stage"):
        table.add_column(title, no_wrap=True)
    for title in ("Progress", "Loss", "ETA", "Age"):
        table.add_column(title, no_wrap=True, justify="right")
    for job in jobs:
        progress = job.status.progress if job.status else None
        cells: list[RenderableType] = [
            job.kind.name,
            job.name,
            _phase(job),
            plain(progress.stage) if progress and not job.is_finished else ABSENT,
            f"{progress.percentage}%" if progress else ABSENT,
            _metric(progress.metrics, "loss") if progress else ABSENT,
            duration(left) if (left := _seconds_left(job)) is not None else ABSENT,
            duration((now - job.created).total_seconds()),
        ]
        table.add_row(*([job.namespace] if with_namespace else []), *cells)
    return table


def _open_progress(job: JobView) -> Progress | None:
    """Return a job's progress. None: it has none, or it has ended and the progress is outdated."""
    return None if job.status is None or job.is_finished else job.status.progress


def _seconds_left(job: JobView) -> int | None:
    """Return the time to the end of the stage. None: unknown, or no stage is running."""
    progress = _open_progress(job)
    running = progress is not None and job.phase == "Running"
    return progress.estimated_remaining_seconds if progress and running else None


def _phase(job: JobView) -> Text:
    return Text(phase(job), style=STYLES.get(job.phase, ""))


def phase(job: JobView) -> str:
    """Return the phase, and a requested change that has not happened yet."""
    if job.deleting:
        return f"{job.phase}, being deleted"
    if job.is_finished:
        return job.phase
    if job.cancel:
        return f"{job.phase}, being canceled"
    if job.suspend and job.phase != "Suspended":
        return f"{job.phase}, being suspended"
    if not job.suspend and job.phase == "Suspended":
        return "Suspended, being resumed"
    return job.phase


# ---- one job ------------------------------------------------------------------------------------


def job_view(job: JobView, events: Sequence[Event], now: datetime) -> RenderableType:
    """Return the details of one job."""
    title = Text(f"{job.kind.name} {job.name}", style="bold")
    title.append(f" in namespace {job.namespace}: ", style="not bold")
    title.append_text(_phase(job))
    title.append(f", {duration((now - job.created).total_seconds())} old", style="not bold")
    parts: list[RenderableType] = [title]
    if job.status is None:
        parts.append(Text(_UNREADABLE))
    elif job.status.phase is None:
        parts.append(Text(_NOT_RECONCILED))
    else:
        parts += _status_parts(job, job.status, now)
    if events:
        parts += [Text(), _events_table(events[-MAX_EVENTS:], now)]
    return Group(*parts)


_UNREADABLE = (
    "This version of tuneyard cannot read the job's status: use the version of the cluster's "
    "operator, or print the status with --json."
)
_NOT_RECONCILED = (
    "The operator has not reconciled the job yet. If this lasts, check that the operator runs and "
    "watches this namespace."
)


def _status_parts(job: JobView, status: JobStatus, now: datetime) -> Iterator[RenderableType]:
    if waits := waits_for(job):
        yield Text(f"Waiting: {waits}")
    if status.failure:
        yield Text(f"{status.failure.reason}: {plain(status.failure.message)}", style="red")
        if status.failure.advice:
            yield Text(plain(status.failure.advice))
    if status.result:
        yield Text(f"Result: {plain(status.result.uri)}")
        if status.result.digest:
            yield Text(f"Digest: {plain(status.result.digest)}")
        if status.result.metrics:
            yield Text(metrics_line(status.result.metrics))
    if progress := _open_progress(job):
        yield Text()
        yield from _progress_lines(progress, _seconds_left(job), now)
    for table in (
        _stages_table(status.stages, now),
        gates_table([result for stage in status.stages for result in stage.gates]),
        _memory_table(status.memory),
        _attempts_table(status.attempts, now),
        _conditions_table(status, now),
    ):
        if table.row_count:
            yield Text()
            yield table


def waits_for(job: JobView) -> str:
    """Return why a job does not run. "": the status gives no reason, or the job runs or ended."""
    if job.status is None or job.phase in ("Running", "Succeeded", "Failed", "Suspended"):
        return ""
    conditions = {condition.type: condition for condition in job.status.conditions}
    for name in ("Planned", "Admitted", "Running"):
        condition = conditions.get(name)
        if condition and condition.status != "True" and condition.message:
            return plain(condition.message)
    return ""


def _progress_lines(progress: Progress, left: int | None, now: datetime) -> Iterator[Text]:
    text = f"{progress.percentage}% done"
    if progress.stage:
        text += f"; {plain(progress.stage)}: {_steps(progress)}"
    if left is not None:
        text += f", about {duration(left)} left"
    yield Text(f"{text} (reported {ago(progress.last_updated_time, now)})", style="bold")
    if progress.cost:
        yield Text(f"{plain(progress.stage)} as a whole: {_cost(progress.cost)}")
    if progress.metrics:
        yield Text(metrics_line(progress.metrics))


def _cost(cost: StageCost) -> str:
    """Return the time and the price of a stage: "about 1 h 8 min, 9.07 GPU-hours, price 27.4"."""
    parts = [f"about {duration(cost.total_seconds)}"]
    if cost.gpu_hours is not None:
        parts.append(f"{number(cost.gpu_hours)} GPU-hours")
    if cost.price is not None:
        parts.append(f"price {number(cost.price)}")
    return ", ".join(parts)


def _steps(progress: Progress) -> str:
    total = f" of {progress.total_steps:,}" if progress.total_steps else ""
    return f"step {progress.step:,}{total}"


def _bare_table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _table(*titles: str) -> Table:
    """Return a table whose last column wraps."""
    table = _bare_table()
    *short, long = titles
    for title in short:
        table.add_column(title, no_wrap=True)
    table.add_column(long, overflow="fold")
    return table


def _stages_table(stages: Sequence[StageStatus], now: datetime) -> Table:
    table = _table("Stage", "State", "Started", "Duration", "Key metrics")
    for stage in stages:
        has_duration = stage.state == "Running" or stage.finished_at is not None
        table.add_row(
            plain(stage.name),
            Text(_state(stage), STYLES.get(stage.state, "")),
            ago(stage.started_at, now),
            _elapsed(stage.started_at, stage.finished_at, now) if has_duration else ABSENT,
            metrics_line(_key_metrics(stage.metrics)),
        )
    return table


def _state(stage: StageStatus) -> str:
    if stage.state == "Skipped":
        return "done before"
    return "reused" if stage.reused else stage.state


def _memory_table(memory: MemoryEstimate | None) -> Table:
    """Return the memory of one worker in GiB: estimated before the training, measured after it."""
    device = plain(memory.device) if memory else ""
    table = _table(f"Memory ({device})", "Estimated", "Measured", "Can be used", "Parts")
    for stage in memory.stages if memory else ():
        capacity = memory.capacity_bytes if memory else None
        table.add_row(
            plain(stage.name),
            _gib(stage.total_bytes),
            _gib(stage.measured_bytes),
            _gib(capacity),
            _largest_parts(stage),
        )
    return table


def _largest_parts(stage: StageEstimate) -> str:
    largest = sorted(stage.parts, key=lambda part: -part.bytes)[:4]
    return ", ".join(f"{plain(part.name)} {part.bytes / GIB:.1f}" for part in largest)


def _gib(size: int | None) -> str:
    return ABSENT if size is None else f"{size / GIB:.1f} GiB"


def _key_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    names = [name for name in STAGE_METRICS if name in metrics]
    names += [name for name in metrics if name not in names]
    return {name: metrics[name] for name in names[:4]}


def gates_table(results: Sequence[GateResult]) -> Table:
    """Return a table of the verdicts on gates, with their evidence."""
    table = _table("Gate", "Verdict", "Value", "95% interval", "Items", "Bound")
    for result in results:
        tier = "" if result.is_required else " (advisory)"
        table.add_row(
            plain(result.metric),
            Text(f"{VERDICT_WORDS[result.verdict]}{tier}", VERDICT_STYLES[result.verdict]),
            result.measured,
            result.interval or ABSENT,
            ABSENT if result.items is None else f"{result.items:,}",
            result.bound,
        )
    return table


def _attempts_table(attempts: Sequence[AttemptStatus], now: datetime) -> Table:
    table = _table("Attempt", "Started", "Duration", "Lost", "Outcome")
    for attempt in attempts:
        table.add_row(
            str(attempt.number),
            ago(attempt.started_at, now),
            _elapsed(attempt.running_at or attempt.started_at, attempt.finished_at, now),
            ABSENT if attempt.steps_lost is None else f"{attempt.steps_lost:,} steps",
            outcome(attempt),
        )
    return table


def outcome(attempt: AttemptStatus) -> str:
    """Return how an attempt ended, or its state if it has not ended."""
    if attempt.finished_at is None:
        if attempt.stopping_at:
            return "stopping at a checkpoint"
        if attempt.prepare_job and not attempt.prepared_at:
            return "preparing"
        return "running" if attempt.running_at else "starting"
    at = ""
    if attempt.stage and attempt.reason != "Succeeded":
        at = f", in {plain(attempt.stage)}"
        at += f" after step {attempt.last_step:,}" if attempt.last_step else ""
    message = f": {plain(attempt.message)}" if attempt.message else ""
    return f"{attempt.reason or 'Ended'}{at}{message}"


def _conditions_table(status: JobStatus, now: datetime) -> Table:
    table = _table("Condition", "Status", "Since", "Reason")
    for condition in status.conditions:
        message = plain(condition.message)
        reason = "" if condition.reason == condition.type else condition.reason
        table.add_row(
            condition.type,
            CONDITION_STATUS[condition.status],
            ago(condition.last_transition_time, now),
            ": ".join(filter(None, (reason, message))),
        )
    return table


def _events_table(events: Sequence[Event], now: datetime) -> Table:
    table = _table("Last seen", "Event", "Message")
    for event in events:
        times = f" ({event.occurrences} times)" if event.occurrences > 1 else ""
        table.add_row(
            f"{duration((now - event.time).total_seconds())} ago",
            Text(plain(event.reason), style="yellow" if event.is_warning else ""),
            f"{plain(event.message)}{times}",
        )
    return table


# ---- one line -----------------------------------------------------------------------------------


def line(job: JobView) -> str:
    """Return a job's state in one line. It changes only if the job's state does."""
    status = job.status or JobStatus()
    parts = [f"{job.name}: {phase(job)}"]
    if job.newest_attempt > 1:
        parts.append(f"attempt {job.newest_attempt}")
    if waits := waits_for(job):
        parts.append(waits)
    if progress := _open_progress(job):
        parts.append(f"{progress.percentage}%")
        if progress.stage:
            parts.append(f"{plain(progress.stage)} {_steps(progress)}")
        shown = [name for name in ("loss", "reward") if name in progress.metrics]
        parts += [f"{name} {number(progress.metrics[name])}" for name in shown]
        if (left := _seconds_left(job)) is not None:
            parts.append(f"{duration(left)} left")
    if status.failure:
        parts.append(f"{status.failure.reason}: {plain(status.failure.message)}")
    if status.result:
        parts.append(f"result: {plain(status.result.uri)}")
    return ", ".join(parts)


# ---- text, numbers and times --------------------------------------------------------------------


def plain(text: str) -> str:
    """Return untrusted text in one line, without characters that control a terminal."""
    words = " ".join(text.split())
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_control(char) else char for char in words)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Return the metrics in one line: "loss 1.235, reward 0.4"."""
    return ", ".join(f"{plain(name)} {number(value)}" for name, value in metrics.items())


def _metric(metrics: Mapping[str, float], name: str) -> str:
    return number(metrics[name]) if name in metrics else ABSENT


def number(value: float) -> str:
    """Return a number with separated thousands; fractions have four significant digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def ago(time: str | None, now: datetime) -> str:
    """Return how long ago a time was (RFC 3339). None: not yet, shown as a dash."""
    if time is None:
        return ABSENT
    try:
        return f"{duration((now - time_of(time)).total_seconds())} ago"
    except ValueError:
        return plain(time)


def _elapsed(start: str | None, end: str | None, now: datetime) -> str:
    if start is None:
        return ABSENT
    try:
        last = time_of(end) if end else now
        return duration((last - time_of(start)).total_seconds())
    except ValueError:
        return ABSENT


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: "12 s", "1 min 12 s", "2 h 5 min", "3 d 4 h".

    A negative duration is shown as "0 s": the clocks of two machines can differ.
    """
    whole = max(0, round(seconds))
    units = (("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60))
    parts = [*units, ("s", whole % 60)]
    first = next((index for index, (_, value) in enumerate(parts) if value), 3)
    return " ".join(f"{value} {name}" for name, value in parts[first : first + 2] if value) or "0 s"
