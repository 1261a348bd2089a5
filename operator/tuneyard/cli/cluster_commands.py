"""The verbs for a cluster: status, logs, suspend, resume, cancel and delete."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live

from tuneyard.api.pods import GRACE_SECONDS
from tuneyard.cli import logs as pod_logs
from tuneyard.cli import views
from tuneyard.cli.errors import NotFoundError, RemoteError, UnreachableError
from tuneyard.cli.jobs import Event, Found, Kind, to_json
from tuneyard.cli.options import Where, for_cluster, job_name, optional_job_name

if TYPE_CHECKING:
    from tuneyard.cli.cluster import Cluster

FAILED = 1
LOOK_SECONDS = 2.0
FILE_WIDTH = 120
"""Columns where standard output is no terminal."""
STUCK_SECONDS = 30.0

# ---- status -------------------------------------------------------------------------------------


@click.command()
@optional_job_name
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Jobs of all namespaces.")
@click.option("-w", "--watch", is_flag=True, help="Go on showing it; exit 0 or 1 as the job ends.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch one line a change.")
@for_cluster
def status(
    name: str | None,
    where: Where,
    kinds: Sequence[Kind],
    everywhere: bool,
    watch: bool,
    as_json: bool,
) -> int:
    """Show how far jobs are, or everything about one.

    Without NAME every job gets a line. With it: its result or failure, progress, stages, attempts,
    conditions and events.
    """
    if name and everywhere:
        raise click.UsageError("--all-namespaces shows all jobs: remove NAME, or name a namespace")
    if watch and name is None:
        raise click.UsageError("--watch needs the NAME of a job")
    cluster = where.connect()
    if name is None:
        return _status_of_all(cluster, kinds, everywhere=everywhere, as_json=as_json)
    job = cluster.find(name, kinds)
    if watch:
        return _watch(cluster, job, as_json=as_json)
    if as_json:
        click.echo(json.dumps(to_json(job), indent=2))
    else:
        _console().print(_view(cluster, job))
    return 0


def _status_of_all(
    cluster: Cluster, kinds: Sequence[Kind], *, everywhere: bool, as_json: bool
) -> int:
    jobs = cluster.list_jobs(kinds, everywhere=everywhere)
    if as_json:
        click.echo(json.dumps([to_json(job) for job in jobs], indent=2))
    elif jobs:
        _console().print(views.jobs_table(jobs, _now(), with_namespace=everywhere))
    else:
        place = "in any namespace" if everywhere else f"in namespace {cluster.namespace}"
        click.echo(f"there are no jobs {place}: `tuneyard init` writes a manifest", err=True)
    return 0


def _watch(cluster: Cluster, job: Found, *, as_json: bool) -> int:
    """Until the job is over; the exit code says how."""
    console = _console()
    if as_json:
        job = _follow(cluster, job, _changes(lambda job: json.dumps(to_json(job))))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            job = _follow(cluster, job, lambda job: live.update(_view(cluster, job), refresh=True))
        console.print(_view(cluster, job))
    else:
        job = _follow(cluster, job, _changes(views.line))
    return 0 if job.phase == "Succeeded" else FAILED


def _changes(text: Callable[[Found], str]) -> Callable[[Found], None]:
    """Prints a job's text whenever it is another than before."""
    last: list[str] = []

    def show(job: Found) -> None:
        if (now := text(job)) not in last:
            click.echo(now)
            last[:] = [now]

    return show


def _follow(cluster: Cluster, job: Found, show: Callable[[Found], None]) -> Found:
    """Shows a job again and again until it is over, through an API server's absence too."""
    away = False
    while True:
        show(job)
        if job.is_finished:
            return job
        time.sleep(LOOK_SECONDS)
        try:
            now = cluster.refresh(job)
        except UnreachableError as error:
            if not away:
                click.echo(f"{error.message}; trying again", err=True)
            away = True
            continue
        away = False
        if now is None:
            raise NotFoundError(f"{job.kind.name} {job.name} was deleted")
        job = now


def _view(cluster: Cluster, job: Found) -> Any:
    return views.job_view(job, _events(cluster, job), _now())


def _events(cluster: Cluster, job: Found) -> list[Event]:
    """Empty where the user may not read them: the status tells the rest."""
    try:
        return cluster.events(job)
    except RemoteError:
        return []


# ---- logs ---------------------------------------------------------------------------------------


@click.command()
@job_name
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends, over all attempts.")
@click.option("--attempt", type=click.IntRange(min=1), help="Default: the newest that has pods.")
@click.option("--worker", is_flag=True, help="The workers' logs instead of the driver's.")
@for_cluster
def logs(
    name: str,
    where: Where,
    kinds: Sequence[Kind],
    follow: bool,
    attempt: int | None,
    worker: bool,
) -> int:
    """Print the log of a job's driver, or of its workers.

    Logs go with their pods, about a minute after an attempt; why it ended stays in the status.
    """
    cluster = where.connect()
    job = cluster.find(name, kinds)
    role = "worker" if worker else "driver"
    reader = pod_logs.Reader(cluster, role, attempt, write=click.echo, note=_note)
    if follow:
        reader.follow(job)
    else:
        reader.show(job)
    return 0


# ---- run policy ---------------------------------------------------------------------------------


@click.command()
@job_name
@for_cluster
def suspend(name: str, where: Where, kinds: Sequence[Kind]) -> int:
    """Stop a job at a checkpoint and free its pods.

    Nothing is lost: `tuneyard resume` goes on from there.
    """
    cluster = where.connect()
    job = cluster.find(name, kinds)
    _refuse_if_over(job, "suspended")
    if job.cancel:
        raise RemoteError(f"{job.name} is being canceled: it cannot be suspended any more")
    if job.suspend:
        state = "suspended" if job.phase == "Suspended" else "being suspended"
        click.echo(f"{job.name} is {state} already; `tuneyard resume {job.name}` lets it go on")
        return 0
    job = cluster.set_policy(job, suspend=True)
    if job.is_under_way:
        click.echo(f"{job.name} will {_stop(job)}; `tuneyard resume {job.name}` lets it go on")
    else:
        click.echo(f"{job.name} will not start until `tuneyard resume {job.name}`")
    return 0


def _stop(job: Found) -> str:
    """How the attempt that is under way ends."""
    if job.is_running:
        return f"write a checkpoint and release its pods, within {GRACE_SECONDS} s"
    return "release its pods"


@click.command()
@job_name
@for_cluster
def resume(name: str, where: Where, kinds: Sequence[Kind]) -> int:
    """Let a suspended job go on from where it stopped."""
    cluster = where.connect()
    job = cluster.find(name, kinds)
    _refuse_if_over(job, "resumed")
    if job.cancel:
        raise RemoteError(f"{job.name} is being canceled: it cannot be resumed any more")
    if not job.suspend:
        being = f"{job.name} is being resumed already"
        known = f"{job.name} is not suspended: its phase is {job.phase}"
        click.echo(being if job.phase == "Suspended" else known)
        return 0
    job = cluster.set_policy(job, suspend=False)
    if job.is_under_way:
        click.echo(f"{job.name} will go on; if its pods were stopping, in a new attempt")
        return 0
    attempts = len(job.status.attempts) if job.status else 0
    start = "from its last checkpoint" if attempts else "with its first stage"
    click.echo(f"{job.name} will go on {start}, as attempt {attempts + 1}")
    return 0


@click.command()
@job_name
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@for_cluster
def cancel(name: str, where: Where, kinds: Sequence[Kind], yes: bool) -> int:
    """End a job for good, as Failed with reason Canceled.

    It cannot be taken back. The job and its finished stages stay.
    """
    cluster = where.connect()
    job = cluster.find(name, kinds)
    if job.cancel or job.was_canceled:
        state = "was canceled" if job.is_finished else "is being canceled"
        click.echo(f"{job.name} {state} already")
        return 0
    _refuse_if_over(job, "canceled")
    _confirm(f"Cancel {job.kind.name} {job.name} for good?", yes=yes)
    job = cluster.set_policy(job, cancel=True)
    how = f"{_stop(job)} and end" if job.is_under_way else "end"
    click.echo(
        f"{job.name} will {how} as Failed with reason Canceled; its finished stages stay at "
        f"{job.output_uri}"
    )
    return 0


def _refuse_if_over(job: Found, deed: str) -> None:
    if job.deleting:
        raise RemoteError(f"{job.name} is being deleted: it cannot be {deed} any more")
    if job.is_finished:
        raise RemoteError(f"{job.name} is over, its phase is {job.phase}: it cannot be {deed}")


def _confirm(question: str, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise RemoteError("this cannot be taken back and there is no terminal to ask at: add --yes")
    if not click.confirm(question, err=True):
        raise RemoteError("nothing was changed")


# ---- delete -------------------------------------------------------------------------------------


@click.command()
@job_name
@click.option("--wait", is_flag=True, help="Return when the job and its pods are gone.")
@for_cluster
def delete(name: str, where: Where, kinds: Sequence[Kind], wait: bool) -> int:
    """Delete a job and end its cluster.

    Its output stays, or goes too where the manifest's output.deletionPolicy is Delete.
    """
    cluster = where.connect()
    job = cluster.find(name, kinds)
    if job.deleting:
        click.echo(f"{job.name} is being deleted already")
    else:
        cluster.delete(job)
        pods = "its pods end, then it is gone" if job.is_under_way else "it is gone in a moment"
        output = (
            f"its output at {job.output_uri} is deleted too, by its deletionPolicy"
            if job.erases
            else f"its output stays at {job.output_uri}"
        )
        click.echo(f"{job.name} is being deleted: {pods}; {output}")
    if wait:
        _wait_until_gone(cluster, job)
        click.echo(f"{job.name} is gone")
    return 0


def _wait_until_gone(cluster: Cluster, job: Found) -> None:
    patience = time.monotonic() + STUCK_SECONDS
    while True:
        try:
            if cluster.refresh(job) is None:
                return
        except UnreachableError as error:
            _note(f"{error.message}; trying again")
        if time.monotonic() > patience:
            _note(f"{job.name} is still there: the operator clears up after it; does it run?")
            patience = float("inf")
        time.sleep(LOOK_SECONDS / 4)


# ---- the terminal -------------------------------------------------------------------------------


def _console() -> Console:
    """Standard output; one that is no terminal gets wider lines than rich's 80 columns."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def _note(text: str) -> None:
    click.echo(f"# {text}", err=True)


def _now() -> datetime:
    return datetime.now(UTC)


COMMANDS = (status, logs, suspend, resume, cancel, delete)
