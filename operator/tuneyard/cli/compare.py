"""`tuneyard compare`: finished jobs beside each other, on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.text import Text

from tuneyard.api.plan import Plan
from tuneyard.cli.cluster_commands import stdout_console
from tuneyard.cli.compare_view import comparison_view
from tuneyard.cli.errors import needs_extra
from tuneyard.cli.jobs import JobView, Kind
from tuneyard.cli.manifest_files import STDIN, each_job, folder_of, read_jobs
from tuneyard.cli.options import ClusterOptions, for_cluster
from tuneyard.errors import Fault, ManifestError
from tuneyard.manifests.explain import name_problem
from tuneyard.planning.plan import plan_job

PAGE_SUFFIXES = (".html", ".htm")


class Place(NamedTuple):
    """The output of a job."""

    argument: str
    """The argument of the user, for messages."""
    uri: str
    manifest: Mapping[str, Any] | None = None
    """The job's manifest with its defaults. None: not known here."""


def _page(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    if value is None:
        return None
    if value.suffix.lower() not in PAGE_SUFFIXES:
        raise click.BadParameter(f"{value} is no page: name a file that ends in .html")
    if not value.resolve().parent.is_dir():
        raise click.BadParameter(f"there is no folder {value.parent}: make it, or name another")
    return value


@click.command()
@click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    "page",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_page,
    help="Also write a page, FILE.html, with the answers of all jobs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@for_cluster
def compare(
    jobs: Sequence[str],
    page: Path | None,
    as_json: bool,
    options: ClusterOptions,
    kinds: Sequence[Kind],
) -> None:
    """Compare finished jobs: metrics, settings and cost.

    JOB is the output folder of a job on this machine, the URL of an output in an object store, a
    manifest, which stands for each of its jobs, or the name of a job in the cluster whose output is
    in an object store. Two to eight jobs can be compared.

    A job is called better only if the 95% interval of the difference excludes 0. The difference is
    that of the same held-out rows, if both jobs have values for them.

    Exit codes: 0: the jobs are compared, whatever was found; 2: a JOB cannot be compared, with
    every reason.
    """
    places, faults = _places(jobs, options, kinds)
    with needs_extra("trainer", "compare jobs"):
        from tuneyard_trainer.comparison.compare import compare as compared
        from tuneyard_trainer.comparison.job_result import Named
    found = compared([Named(*place) for place in places], faults)
    if page is not None:
        from tuneyard_trainer.comparison.page import write

        try:
            write(found, page)
        except OSError as error:
            raise click.ClickException(f"{page} cannot be written: {error.strerror}") from error
    if as_json:
        click.echo(found.to_json(), nl=False)
        return
    console = stdout_console()
    for part in comparison_view(found):
        console.print(part)
    if page is not None:
        console.print(Text(f"\nwrote {page}"))


def _places(
    jobs: Sequence[str], options: ClusterOptions, kinds: Sequence[Kind]
) -> tuple[list[Place], list[Fault]]:
    """Return the outputs of all jobs, and the faults of those that have none."""
    places: list[Place] = []
    faults: list[Fault] = []
    for job in jobs:
        try:
            places += _of(job, options, kinds)
        except ManifestError as error:
            faults += error.faults
        except click.ClickException as error:
            faults.append(Fault("", error.message, None, job))
    return places, faults


def _of(job: str, options: ClusterOptions, kinds: Sequence[Kind]) -> Iterator[Place]:
    path = Path(job)
    if job.startswith("pvc://"):
        raise _on_claim(job)
    if "://" in job or path.is_dir():
        yield Place(job, job)
    elif path == STDIN or path.exists():
        plans = each_job(read_jobs(path), plan_job)
        for plan in plans:
            argument = job if len(plans) == 1 else f"{job}, {plan.job.name}"
            yield Place(argument, _output_of(plan, folder_of(path)), plan.manifest)
    elif "/" in job or path.suffix:
        raise click.ClickException("there is no manifest and no folder of this name")
    elif problem := name_problem(job):
        raise click.ClickException(problem)
    else:
        yield place_in_cluster(job, options.connect().find(job, kinds))


def _output_of(plan: Plan, base_dir: Path) -> str:
    uri = plan.output.uri
    if uri.startswith("pvc://"):
        raise _on_claim(uri)
    return str(base_dir / uri.removeprefix("file://")) if uri.startswith("file://") else uri


def place_in_cluster(argument: str, job: JobView) -> Place:
    """Return the output of a job in the cluster. Raises ClickException if it is not in an object
    store."""
    if not job.output_uri or job.output_uri.startswith(("pvc://", "file://")):
        raise _on_claim(job.output_uri)
    return Place(argument, job.output_uri)


def _on_claim(uri: str) -> click.ClickException:
    return click.ClickException(
        f"its output, {uri or 'which it does not name'}, exists on a cluster only: copy its "
        "folders stages and result to a folder of this machine and give the folder"
    )
