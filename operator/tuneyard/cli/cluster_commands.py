"""The commands for a cluster: status, logs, suspend, resume, cancel and delete."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live

from tuneyard.api.pods import GRACE_SECONDS
from tuneyard.cli import logs as pod_logs
from tuneyard.cli import views
from tuneyard.cli.errors import RemoteError, UnreachableError
from tuneyard.cli.jobs import Event, JobView, Kind, to_json
from tuneyard.cli.options import ClusterOptions, for_cluster, job_name, optional_job_name

if TYPE_CHECKING:
    from tuneyard.cli.cluster import Cluster

FAILED = 1
FILE_WIDTH = 120
"""Columns of the output if standard output is not a terminal."""
STUCK_SECONDS = 30.0
"""How long `delete --wait` waits before it suggests that the operator does not run."""

# ---- status -------------------------------------------------------------------------------------


@click.command()
@optional_job_name
@click.option(
    "-A", "--all-namespaces", "everywhere", is_flag=True, help="Show the jobs of all namespaces."
)
@click.option(
    "-w", "--watch", is_flag=True, help="Show changes until the job ends; exit with 1 if it failed."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON; with --watch, a line for each change."
)
@for_cluster
def status(
    name: str | None,
    options: ClusterOptions,
    kinds: Sequence[Kind],
    everywhere: bool,
    watch: bool,
    as_json: bool,
) -> int:
    """Show the progress of all jobs, or the details of one job.

    Without NAME, the output has a line for each job. With NAME, it shows the job's result or
    failure, progress, stages, attempts, conditions and events.
    """
    if name and everywhere:
        raise click.UsageError(
            "--all-namespaces cannot be combined with NAME: remove NAME, or use --namespace"
        )
    if watch and name is None:
        raise click.UsageError("--watch needs a NAME: add the name of a job")
    cluster = options.connect()
    if name is None:
        return _status_of_all(cluster, kinds, everywhere=everywhere, as_json=as_json)
    job = cluster.find(name, kinds)
    if watch:
        return _watch(cluster, job, as_json=as_json)
    if as_json:
        click.echo(json.dumps(to_json(job), indent=2))
    else:
        stdout_console().print(_view(cluster, job))
    return 0


def _status_of_all(
    cluster: Cluster, kinds: Sequence[Kind], *, everywhere: bool, as_json: bool
) -> int:
    jobs = cluster.list_jobs(kinds, everywhere=everywhere)
    if as_json:
        click.echo(json.dumps([to_json(job) for job in jobs], indent=2))
    elif jobs:
        stdout_console().print(views.jobs_table(jobs, _now(), with_namespace=everywhere))
    else:
        place = "in any namespace" if everywhere else f"in namespace {cluster.namespace}"
        message = f"there are no jobs {place}: write a manifest with `tuneyard init`"
        click.echo(message, err=True)
    return 0


def _watch(cluster: Cluster, job: JobView, *, as_json: bool) -> int:
    """Show a job until it ends. Return 0 if it succeeded."""
    console = stdout_console()
    if as_json:
        job = _follow(cluster, job, _changes(lambda job: json.dumps(to_json(job))))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            job = _follow(cluster, job, lambda job: live.update(_view(cluster, job), refresh=True))
        console.print(_view(cluster, job))
    else:
        job = _follow(cluster, job, _changes(views.line))
    return 0 if job.phase == "Succeeded" else FAILED


def _changes(text: Callable[[JobView], str]) -> Callable[[JobView], None]:
    """Return a function that prints a job's text if it differs from the last one."""
    last: list[str] = []

    def show(job: JobView) -> None:
        if (now := text(job)) not in last:
            click.echo(now)
            last[:] = [now]

    return show


def _follow(cluster: Cluster, job: JobView, show: Callable[[JobView], None]) -> JobView:
    """Show a job repeatedly until it ends; return its last state. Raises RemoteError.

    An unreachable API server is reported once and tried again.
    """
    unreachable = False
    while True:
        show(job)
        if job.is_finished:
            return job
        time.sleep(pod_logs.POLL_SECONDS)
        try:
            job = pod_logs.refreshed(cluster, job)
            unreachable = False
        except UnreachableError as error:
            if not unreachable:
                click.echo(f"{error.message}; retrying", err=True)
            unreachable = True


def _view(cluster: Cluster, job: JobView) -> Any:
    return views.job_view(job, _events(cluster, job), _now())


def _events(cluster: Cluster, job: JobView) -> list[Event]:
    """Return a job's events, or none if they cannot be read: the status is shown without them."""
    try:
        return cluster.events(job)
    except RemoteError:
        return []


# ---- logs ---------------------------------------------------------------------------------------


@click.command()
@job_name
@click.option("-f", "--follow", is_flag=True, help="Follow all attempts until the job ends.")
@click.option(
    "--attempt", type=click.IntRange(min=1), help="Attempt. Default: the newest one with pods."
)
@click.option("--worker", is_flag=True, help="Print the workers' logs instead of the driver's.")
@click.option(
    "--kept",
    is_flag=True,
    help="Print the log in the output, also while pods run. Default: only if there are none.",
)
@for_cluster
def logs(
    name: str,
    options: ClusterOptions,
    kinds: Sequence[Kind],
    follow: bool,
    attempt: int | None,
    worker: bool,
    kept: bool,
) -> int:
    """Print the log of a job's driver, or of its workers.

    Pods are deleted about a minute after an attempt ends. Their logs stay in the job's output, in
    logs/attempt-N, and are then read from there.
    """
    if kept and follow:
        raise click.UsageError("--kept cannot be combined with --follow: remove one of them")
    cluster = options.connect()
    job = cluster.find(name, kinds)
    role = "worker" if worker else "driver"
    reader = pod_logs.Reader(cluster, role, attempt, write=click.echo, note=_note)
    if kept:
        reader.show_kept(job)
    elif follow:
        reader.follow(job)
    else:
        reader.show(job)
    return 0


# ---- run policy ---------------------------------------------------------------------------------


@click.command()
@job_name
@for_cluster
def suspend(name: str, options: ClusterOptions, kinds: Sequence[Kind]) -> int:
    """Stop a job at a checkpoint and release its pods.

    `tuneyard resume` continues from that checkpoint.
    """
    cluster = options.connect()
    job = cluster.find(name, kinds)
    _require_open(job, "suspended")
    if job.cancel:
        raise RemoteError(f"{job.name} is being canceled and cannot be suspended")
    if job.suspend:
        state = "suspended" if job.phase == "Suspended" else "being suspended"
        click.echo(f"{job.name} is already {state}; resume it with `tuneyard resume {job.name}`")
        return 0
    job = cluster.set_policy(job, suspend=True)
    if job.has_open_attempt:
        click.echo(f"{job.name} will {_stop(job)}; resume it with `tuneyard resume {job.name}`")
    else:
        click.echo(f"{job.name} will not start; resume it with `tuneyard resume {job.name}`")
    return 0


def _stop(job: JobView) -> str:
    """Return how the open attempt of a job stops."""
    if job.has_running_driver:
        return f"write a checkpoint and release its pods, within {GRACE_SECONDS} s"
    return "release its pods"


@click.command()
@job_name
@for_cluster
def resume(name: str, options: ClusterOptions, kinds: Sequence[Kind]) -> int:
    """Resume a suspended job from its last checkpoint."""
    cluster = options.connect()
    job = cluster.find(name, kinds)
    _require_open(job, "resumed")
    if job.cancel:
        raise RemoteError(f"{job.name} is being canceled and cannot be resumed")
    if not job.suspend:
        resuming = f"{job.name} is already being resumed"
        not_suspended = f"{job.name} is not suspended; its phase is {job.phase}"
        click.echo(resuming if job.phase == "Suspended" else not_suspended)
        return 0
    job = cluster.set_policy(job, suspend=False)
    if job.has_open_attempt:
        click.echo(f"{job.name} will continue; if its pods are already stopping, in a new attempt")
        return 0
    newest = job.newest_attempt
    start = "continue from its last checkpoint" if newest else "start with its first stage"
    click.echo(f"{job.name} will {start}, as attempt {newest + 1}")
    return 0


@click.command()
@job_name
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
@for_cluster
def cancel(name: str, options: ClusterOptions, kinds: Sequence[Kind], yes: bool) -> int:
    """End a job for good, with phase Failed and reason Canceled.

    A cancellation cannot be undone. The job and the output of its finished stages are kept.
    """
    cluster = options.connect()
    job = cluster.find(name, kinds)
    if job.cancel or job.was_canceled:
        state = "was canceled" if job.is_finished else "is being canceled"
        click.echo(f"{job.name} {state} already")
        return 0
    _require_open(job, "canceled")
    _confirm(f"Cancel {job.kind.name} {job.name} for good?", yes=yes)
    job = cluster.set_policy(job, cancel=True)
    stop = f"{_stop(job)} and end" if job.has_open_attempt else "end"
    click.echo(
        f"{job.name} will {stop} with phase Failed and reason Canceled; the output of its finished "
        f"stages stays at {views.plain(job.output_uri)}"
    )
    return 0


def _require_open(job: JobView, action: str) -> None:
    """Raise RemoteError if a job is being deleted or has ended. `action`: e.g. "suspended"."""
    if job.deleting:
        raise RemoteError(f"{job.name} is being deleted and cannot be {action}")
    if job.is_finished:
        raise RemoteError(f"{job.name} has ended with phase {job.phase} and cannot be {action}")


def _confirm(question: str, *, action: str = "a cancellation", yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise RemoteError(
            f"{action} cannot be undone, and there is no terminal to confirm it: add --yes"
        )
    if not click.confirm(question, err=True):
        raise RemoteError("not confirmed: nothing was changed")


# ---- delete -------------------------------------------------------------------------------------


@click.command()
@job_name
@click.option("--wait", is_flag=True, help="Wait until the job and its pods are deleted.")
@click.option("--force", is_flag=True, help="Wait neither for pods nor for the output's erasure.")
@click.option("-y", "--yes", is_flag=True, help="With --force: do not ask for confirmation.")
@for_cluster
def delete(
    name: str,
    options: ClusterOptions,
    kinds: Sequence[Kind],
    wait: bool,
    force: bool,
    yes: bool,
) -> int:
    """Delete a job and its pods.

    The output is kept, unless the manifest's output.deletionPolicy is Delete.

    --force is for a deletion that hangs, for example because a node is lost. It prints what stays
    behind.
    """
    if wait and force:
        raise click.UsageError(
            "--wait cannot be combined with --force, whose pods may stay for good: remove --wait"
        )
    cluster = options.connect()
    job = cluster.find(name, kinds)
    if force:
        return _delete_now(cluster, job, yes=yes)
    if job.deleting:
        click.echo(f"{job.name} is already being deleted")
    else:
        cluster.delete(job)
        pods = " with its pods" if job.has_open_attempt else ""
        uri = views.plain(job.output_uri)
        output = (
            f"its output at {uri} is deleted too, because of its deletionPolicy"
            if job.deletes_output
            else f"its output stays at {uri}"
        )
        click.echo(f"{job.name} is being deleted{pods}; {output}")
    if wait:
        _wait_until_deleted(cluster, job)
        click.echo(f"{job.name} was deleted")
    return 0


def _delete_now(cluster: Cluster, job: JobView, *, yes: bool) -> int:
    """Delete a job without its finalizers, after a message about what stays behind."""
    click.echo(f"{job.name} is deleted without waiting; this stays behind:")
    for line in _left_behind(job, [pod.name for pod in cluster.pods(job)]):
        click.echo(f"- {line}")
    _confirm(f"Delete {job.kind.name} {job.name} now?", action="this deletion", yes=yes)
    if not job.deleting:
        cluster.delete(job)
    current = cluster.refresh(job)
    left = cluster.release(current) if current else ()
    if left:
        raise RemoteError(
            f"{job.name} is being deleted but still has finalizers of other controllers, "
            f"{', '.join(left)}: ask the owners of these controllers"
        )
    click.echo(f"{job.name} was deleted")
    return 0


def _left_behind(job: JobView, pods: Sequence[str]) -> Iterator[str]:
    """Yield what stays after a deletion that does not wait."""
    uri = views.plain(job.output_uri)
    if job.deletes_output and job.has_begun:
        yield f"the output at {uri} is not erased: remove it by hand"
    else:
        yield f"the output at {uri}, if there is one: this job does not erase it"
    attempts = job.raw_status.get("attempts") or []
    if pods and attempts:
        yield f"RayJob {attempts[-1]['rayJob']}, until its pods are removed"
    if pods:
        names = ", ".join(sorted(pods))
        yield f"pods {names}: Kubernetes removes them when their nodes respond or are deleted"


def _wait_until_deleted(cluster: Cluster, job: JobView) -> None:
    own = {pod.uid for pod in cluster.pods(job)}  # a new job of this name has others
    deadline = time.monotonic() + STUCK_SECONDS
    while True:
        try:
            waits_for = _waits_for(cluster, job, own)
        except UnreachableError as error:
            waits_for = ""
            _note(f"{error.message}; retrying")
        else:
            if not waits_for:
                return
        if waits_for and time.monotonic() > deadline:
            _note(f"{waits_for}; `tuneyard delete --force {job.name}` does not wait")
            deadline = float("inf")
        time.sleep(pod_logs.POLL_SECONDS / 4)


def _waits_for(cluster: Cluster, job: JobView, own: Collection[str]) -> str:
    """Return what the deletion of a job with these pods waits for; "": it is done."""
    if cluster.refresh(job) is not None:
        return f"{job.name} waits for the operator's cleanup: check that the operator runs"
    pods = ", ".join(sorted(pod.name for pod in cluster.pods(job) if pod.uid in own))
    return f"pods {pods} of {job.name} still exist: check whether a node was lost" if pods else ""


# ---- the terminal -------------------------------------------------------------------------------


def stdout_console() -> Console:
    """Return standard output; a file gets wider lines than rich's default of 80 columns."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def _note(text: str) -> None:
    click.echo(f"# {text}", err=True)


def _now() -> datetime:
    return datetime.now(UTC)


COMMANDS = (status, logs, suspend, resume, cancel, delete)
