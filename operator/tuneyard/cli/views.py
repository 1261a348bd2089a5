"""How jobs look to people. Pure: what is shown depends on the job, its events and the moment."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuneyard.api.status import AttemptStatus, JobStatus, Progress, StageStatus
from tuneyard.cli.jobs import Event, Found, time_of

ABSENT = "\N{EN DASH}"
STYLES = {
    "Succeeded": "green",
    "Running": "cyan",
    "Failed": "red",
    "Suspended": "yellow",
    "Queued": "yellow",
}
MAX_EVENTS = 8
STAGE_METRICS = (
    *("validationLoss", "loss", "validationPerplexity", "lossReduction", "answerAccuracy"),
    *("preferenceAccuracy", "rewardAccuracy", "reward", "kl", "steps", "rows", "tokens"),
)
"""What a stage's line shows first; there is room for four."""
ADVERBS = {"True": "yes", "False": "no", "Unknown": "unknown"}


# ---- all jobs -----------------------------------------------------------------------------------


def jobs_table(jobs: Sequence[Found], now: datetime, *, with_namespace: bool) -> Table:
    """One line for each job."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    if with_namespace:
        table.add_column("Namespace", no_wrap=True)
    table.add_column("Kind", no_wrap=True)
    table.add_column("Name", no_wrap=True)
    for title in ("Phase", "Stage"):
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


def _open_progress(job: Found) -> Progress | None:
    """How far it is; None once it is over: what it told last would say nothing any more."""
    return None if job.status is None or job.is_finished else job.status.progress


def _seconds_left(job: Found) -> int | None:
    """To the end of the stage; None: nothing runs, or it is unknown."""
    progress = _open_progress(job)
    running = progress is not None and job.phase == "Running"
    return progress.estimated_remaining_seconds if progress and running else None


def _phase(job: Found) -> Text:
    return Text(phase(job), style=STYLES.get(job.phase, ""))


def phase(job: Found) -> str:
    """The phase, and what was asked for but has not happened yet."""
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


def job_view(job: Found, events: Sequence[Event], now: datetime) -> RenderableType:
    """Everything about one job."""
    title = Text(f"{job.kind.name} {job.name}", style="bold")
    title.append(f" in namespace {job.namespace}: ", style="not bold")
    title.append_text(_phase(job))
    title.append(f", {duration((now - job.created).total_seconds())} old", style="not bold")
    parts: list[RenderableType] = [title]
    if job.status is None:
        parts.append(Text(f"This version of tuneyard cannot read its status. {_UPGRADE}"))
    elif job.status.phase is None:
        parts.append(Text(_UNSEEN))
    else:
        parts += _status_parts(job, job.status, now)
    if events:
        parts += [Text(), _events_table(events[-MAX_EVENTS:], now)]
    return Group(*parts)


_UPGRADE = "Use the version of the cluster's operator; `--json` prints the status as it is."
_UNSEEN = (
    "The operator has not looked at it yet. Where this lasts: does it run, and does it watch this "
    "namespace?"
)


def _status_parts(job: Found, status: JobStatus, now: datetime) -> Iterator[RenderableType]:
    if waits := waits_for(job):
        yield Text(f"Waits: {waits}")
    if status.failure:
        yield Text(f"{status.failure.reason}: {plain(status.failure.message)}", style="red")
        if status.failure.advice:
            yield Text(plain(status.failure.advice))
    if status.result:
        yield Text(f"The result lies at {plain(status.result.uri)}")
        if status.result.digest:
            yield Text(f"Its digest is {plain(status.result.digest)}")
        if status.result.metrics:
            yield Text(metrics_line(status.result.metrics))
    if progress := _open_progress(job):
        yield Text()
        yield from _progress_lines(progress, _seconds_left(job), now)
    for table in (
        _stages_table(status.stages, now),
        _attempts_table(status.attempts, now),
        _conditions_table(status, now),
    ):
        if table.row_count:
            yield Text()
            yield table


def waits_for(job: Found) -> str:
    """Why a job that is neither running nor over does not run; "" where nothing is said."""
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
        text += f"; {plain(progress.stage)} is at {_steps(progress)}"
    if left is not None:
        text += f", about {duration(left)} from its end"
    yield Text(f"{text} (told {ago(progress.last_updated_time, now)})", style="bold")
    if progress.metrics:
        yield Text(metrics_line(progress.metrics))


def _steps(progress: Progress) -> str:
    total = f" of {progress.total_steps:,}" if progress.total_steps else ""
    return f"step {progress.step:,}{total}"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    *short, long = titles
    for title in short:
        table.add_column(title, no_wrap=True)
    table.add_column(long, overflow="fold")
    return table


def _stages_table(stages: Sequence[StageStatus], now: datetime) -> Table:
    table = _table("Stage", "State", "Began", "Took", "Key metrics")
    for stage in stages:
        state = "done before" if stage.state == "Skipped" else stage.state
        took = stage.state == "Running" or stage.finished_at is not None
        table.add_row(
            plain(stage.name),
            Text(state, STYLES.get(stage.state, "")),
            ago(stage.started_at, now),
            _took(stage.started_at, stage.finished_at, now) if took else ABSENT,
            metrics_line(_key_metrics(stage.metrics)),
        )
    return table


def _key_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    names = [name for name in STAGE_METRICS if name in metrics]
    names += [name for name in metrics if name not in names]
    return {name: metrics[name] for name in names[:4]}


def _attempts_table(attempts: Sequence[AttemptStatus], now: datetime) -> Table:
    table = _table("Attempt", "Began", "Took", "Lost", "How it ended")
    for attempt in attempts:
        table.add_row(
            str(attempt.number),
            ago(attempt.started_at, now),
            _took(attempt.running_at or attempt.started_at, attempt.finished_at, now),
            ABSENT if attempt.steps_lost is None else f"{attempt.steps_lost:,} steps",
            ending(attempt),
        )
    return table


def ending(attempt: AttemptStatus) -> str:
    """How an attempt ended, or what it does."""
    if attempt.finished_at is None:
        if attempt.stopping_at:
            return "it was asked to checkpoint and end"
        return "it runs" if attempt.running_at else "it is starting"
    at = ""
    if attempt.stage and attempt.reason != "Succeeded":
        at = f", in {plain(attempt.stage)}"
        at += f" after step {attempt.last_step:,}" if attempt.last_step else ""
    message = f": {plain(attempt.message)}" if attempt.message else ""
    return f"{attempt.reason or 'Ended'}{at}{message}"


def _conditions_table(status: JobStatus, now: datetime) -> Table:
    table = _table("Condition", "Holds", "Since", "Why")
    for condition in status.conditions:
        message = plain(condition.message)
        reason = "" if condition.reason == condition.type else condition.reason
        table.add_row(
            condition.type,
            ADVERBS[condition.status],
            ago(condition.last_transition_time, now),
            ": ".join(filter(None, (reason, message))),
        )
    return table


def _events_table(events: Sequence[Event], now: datetime) -> Table:
    table = _table("Last seen", "Event", "Message")
    for event in events:
        times = f" ({event.times} times)" if event.times > 1 else ""
        table.add_row(
            f"{duration((now - event.time).total_seconds())} ago",
            Text(plain(event.reason), style="yellow" if event.warns else ""),
            f"{plain(event.message)}{times}",
        )
    return table


# ---- one line -----------------------------------------------------------------------------------


def line(job: Found) -> str:
    """A job's state in one line: two that are equal say that nothing happened between them."""
    status = job.status or JobStatus()
    parts = [f"{job.name}: {phase(job)}"]
    if len(status.attempts) > 1:
        parts.append(f"attempt {len(status.attempts)}")
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
        parts.append(f"the result lies at {plain(status.result.uri)}")
    return ", ".join(parts)


# ---- words and figures --------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text of unknown origin in one line, without what could steer a terminal."""
    words = " ".join(text.split())
    return "".join("\N{REPLACEMENT CHARACTER}" if _steers(char) else char for char in words)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Names and values."""
    return ", ".join(f"{plain(name)} {number(value)}" for name, value in metrics.items())


def _metric(metrics: Mapping[str, float], name: str) -> str:
    return number(metrics[name]) if name in metrics else ABSENT


def number(value: float) -> str:
    """Whole numbers with thousands separated, others to four significant digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def ago(moment: str | None, now: datetime) -> str:
    """None: it has not come."""
    if moment is None:
        return ABSENT
    try:
        return f"{duration((now - time_of(moment)).total_seconds())} ago"
    except ValueError:
        return plain(moment)


def _took(start: str | None, end: str | None, now: datetime) -> str:
    if start is None:
        return ABSENT
    try:
        last = time_of(end) if end else now
        return duration((last - time_of(start)).total_seconds())
    except ValueError:
        return ABSENT


def duration(seconds: float) -> str:
    """The two largest units: "12 s", "1 min 12 s", "2 h 5 min", "3 d 4 h". Clocks differ between
    machines, so a negative one is taken for none."""
    whole = max(0, round(seconds))
    units = (("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60))
    parts = [*units, ("s", whole % 60)]
    first = next((index for index, (_, value) in enumerate(parts) if value), 3)
    return " ".join(f"{value} {name}" for name, value in parts[first : first + 2] if value) or "0 s"
