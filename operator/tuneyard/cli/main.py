"""The command line, with the commands that need no cluster; `cluster_commands` holds the others.

Exit codes: 0: success; 1: the job failed while it ran, or generated files are out of date; 2: bad
input; 130: interrupted. `gate` has codes of its own for its verdicts (`cli.gates`). Only `run`
imports the trainer with torch and Ray, and `data`, `compare` and `merge` import parts of it; only
`operator` and the commands for a cluster import a Kubernetes client.
"""

from __future__ import annotations

import errno
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from rich.console import Console
from rich.text import Text

from tuneyard import __version__
from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard.api.model_config import UnknownModelError
from tuneyard.api.plan import Plan, prepares_first
from tuneyard.cli import cluster_commands, data_commands, gates
from tuneyard.cli.compare import compare
from tuneyard.cli.errors import needs_extra
from tuneyard.cli.jobs import Kind
from tuneyard.cli.manifest_files import FILE, STDIN, each_job, folder_of, read_jobs
from tuneyard.cli.memory_view import memory_lines, print_memory
from tuneyard.cli.merge import merge
from tuneyard.cli.model_files import model_facts
from tuneyard.cli.options import ClusterOptions, for_cluster
from tuneyard.cli.plan_view import print_plan
from tuneyard.cli.views import gates_table
from tuneyard.errors import Fault, ManifestError, TuneyardError
from tuneyard.manifests import crd, starter
from tuneyard.manifests.explain import name_problem
from tuneyard.manifests.manifest import Job
from tuneyard.planning import decision
from tuneyard.planning import fit as fitting
from tuneyard.planning.hardware import Gpu, UnknownGpuError, declared_gpu, gpu_of, unknown_gpu
from tuneyard.planning.memory.lengths import Lengths
from tuneyard.planning.plan import plan_job
from tuneyard.rendering import rayjob
from tuneyard.rendering.placement import placed

_Command = TypeVar("_Command", bound=Callable[..., Any])

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the user's share of it, or the largest file that the user may write."""


def main() -> None:
    """Run the `tuneyard` command."""
    sys.exit(call(sys.argv[1:]))


def call(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Faults go to standard error, one a line."""
    is_gate = list(arguments[:1]) == ["gate"]
    bad_input, failed = (gates.UNREADABLE,) * 2 if is_gate else (BAD_INPUT, FAILED)
    try:
        code = tuneyard.main(list(arguments), prog_name="tuneyard", standalone_mode=False)
    except ManifestError as error:
        for fault in error.faults:
            click.echo(str(fault), err=True)
        return bad_input
    except TuneyardError as error:
        click.echo(str(error), err=True)
        return failed
    except click.ClickException as error:
        error.show()
        return bad_input
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        remedy = "Free some space, or name another folder for temporary files in TMPDIR."
        click.echo(f"The disk is full: {error}. {remedy}", err=True)
        return failed
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tuneyard", message="%(prog)s %(version)s")
def tuneyard() -> None:
    """Fine-tune language models from one manifest, on Kubernetes or on this machine.

    FILE is a manifest of one or several YAML documents; `-` reads standard input.
    """


for command in (starter.init, data_commands.data, compare, merge, *cluster_commands.COMMANDS):
    tuneyard.add_command(command)


@tuneyard.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
def validate(files: Sequence[Path]) -> None:
    """Check manifests and print every fault with its line and field."""
    faults: list[Fault] = []
    for file in files:
        try:
            given = read_jobs(file)
        except ManifestError as error:
            faults += error.faults
        else:
            for job in given.jobs:
                click.echo(f"{given.source}: {job.kind} {job.metadata.name} is valid")
    if faults:
        raise ManifestError(faults)


def _gpu(_: click.Context, __: click.Parameter, value: str | None) -> Gpu | None:
    try:
        return None if value is None else gpu_of(value)
    except UnknownGpuError as error:
        raise click.BadParameter(str(error)) from error


@tuneyard.command("plan")
@click.argument("file", type=FILE)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the plan as JSON, as the trainer reads it."
)
@click.option(
    "--gpu", metavar="NAME", callback=_gpu, help="Show the memory on this GPU, e.g. H100."
)
@click.option(
    "--model-config", type=FILE, help="Read the model's shape from this config.json, not its URI."
)
def show_plan(file: Path, as_json: bool, gpu: Gpu | None, model_config: Path | None) -> None:
    """Show the stages of a job and the defaults that were chosen.

    With --gpu, or if compute.gpu is set, also show what each stage takes on each GPU, whether the
    job fits, and what would make it fit. NAME is a GPU such as H100, A100-80GB or L40S, or its
    memory, such as 48Gi.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    for plan in each_job(read_jobs(file), plan_job):
        if as_json:
            click.echo(plan.to_json(), nl=False)
            continue
        print_plan(console, plan)
        device = gpu or declared_gpu(plan.compute)
        if device is not None:
            _print_memory(console, plan, device, folder_of(file), model_config)
        elif name := plan.compute.gpu:
            why = f"\nThe memory is not known: compute.gpu {unknown_gpu(name)}."
            console.print(Text(why, overflow="fold"))


def _print_memory(
    console: Console, plan: Plan, gpu: Gpu, base_dir: Path, config: Path | None
) -> None:
    """Print the memory of a job, or one line that says why it is not known."""
    try:
        facts = model_facts(plan, base_dir, config)
    except UnknownModelError as error:
        console.print(Text(f"\nThe memory is not known: {error}.", overflow="fold"))
        return
    compute = plan.compute
    devices = (compute.workers or 1) * (compute.gpus_per_worker or 1)
    job = fitting.Job(plan, facts, gpu, devices, Lengths.of(plan, facts))
    print_memory(console, job, fitting.fit(job))


@tuneyard.command()
@click.argument("file", type=FILE)
@click.option(
    "--attempt",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of the attempt of the RayJob.",
)
def render(file: Path, attempt: int) -> None:
    """Print the ConfigMap, the NetworkPolicy and the RayJob of a job.

    If its workers have GPUs, the Job that prepares the data comes before the RayJob.
    """
    rendered = each_job(read_jobs(file), lambda job: _rendered(job, attempt))
    objects = [item for one in rendered for item in one]
    text = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)
    click.echo(text, nl=False)


@tuneyard.command()
@click.argument("file", type=FILE)
def run(file: Path) -> int:
    """Run the jobs of a manifest on this machine, one after another.

    Finished stages are not repeated: a second run of the same manifest changes nothing, and an
    interrupted run continues from its last checkpoint.
    """
    plans = each_job(read_jobs(file), plan_job)
    with needs_extra("trainer", "run jobs on this machine"):
        from tuneyard_trainer.local.run import run as run_locally
    return run_locally(plans, folder_of(file), _decide)


def _decide(plan: Plan, facts: JobFacts) -> tuple[FitAnswer, list[str]]:
    """Return whether and how a job trains on this machine, and lines that say what it takes."""
    job = decision.job_of(plan, facts)
    if job is None:
        return FitAnswer(), [f"The memory of the job is not known: {facts.unknown_model}."]
    found = fitting.fit(job)
    return decision.answer_of(job, found), list(memory_lines(job, found))


@tuneyard.command()
@click.argument("job", metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
@for_cluster
def gate(job: str, as_json: bool, options: ClusterOptions, kinds: Sequence[Kind]) -> int:
    """Show the verdicts on a job's gates, with their evidence.

    JOB is a manifest, the output folder of a job on this machine, or the name of a job in the
    cluster.

    Exit codes: 0: all required gates are met; 1: one is missed, or its metric is missing; 2: one
    has too little evidence; 3: there are no verdicts, or JOB cannot be read.
    """
    found = _gates(job, options, kinds)
    if as_json:
        values = [
            {
                "job": each.name,
                "gates": [r.model_dump(mode="json", by_alias=True) for r in each.results],
            }
            for each in found
        ]
        click.echo(json.dumps(values, indent=2))
        return gates.exit_code(found)
    console = cluster_commands.stdout_console()
    for each in found:
        if len(found) > 1:
            console.print(Text(f"{each.name}:", style="bold"))
        console.print(gates_table(each.results))
        for result in each.results:
            if not result.passed:
                console.print(Text(f"{result.sentence}. {result.remedy}", overflow="fold"))
    return gates.exit_code(found)


def _gates(job: str, options: ClusterOptions, kinds: Sequence[Kind]) -> list[gates.JobGates]:
    """Return the verdicts of each job that `gate` was given."""
    path = Path(job)
    if path.is_dir():
        return [gates.of_output(job)]
    if path == STDIN or path.exists():
        plans = each_job(read_jobs(path), plan_job)
        return [gates.of_plan(plan, folder_of(path)) for plan in plans]
    if "/" in job or path.suffix:
        raise click.BadParameter(f"there is no manifest and no folder {job}", param_hint="JOB")
    if problem := name_problem(job):
        raise click.BadParameter(problem, param_hint="JOB")
    return [gates.of_job(options.connect().find(job, kinds))]


@tuneyard.command()
@click.argument("folder", metavar="[DIR]", default="crds", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a file is out of date.")
def crds(folder: Path, check: bool) -> int:
    """Write the CustomResourceDefinitions to DIR (default: crds)."""
    texts = {folder / name: crd.to_yaml(value) for name, value in crd.crds().items()}
    if check:
        stale = [
            path
            for path, text in texts.items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        for path in stale:
            click.echo(f"{path} is out of date: run `tuneyard crds {folder}`", err=True)
        return FAILED if stale else 0
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        click.echo(f"wrote {path}")
    return 0


def _setting(name: str, **options: Any) -> Callable[[_Command], _Command]:
    """Return an option of the operator that can also be set by an environment variable."""
    variable = f"TUNEYARD_{name.upper().replace('-', '_')}"
    return click.option(f"--{name}", envvar=variable, show_envvar=True, **options)


@tuneyard.command("operator")
@_setting("namespaces", default="", help="Namespaces to watch, comma-separated. [default: all]")
@_setting("image", default=rayjob.DEFAULT_IMAGE, help="Trainer image of jobs that name none.")
@_setting("profiles", type=FILE, help="Compute profiles: a YAML mapping of names to fields.")
@_setting("progress-url", help="URL of the status server for training pods.")
@_setting("progress-port", type=int, default=8443, help="Port of the status server.")
@_setting("metrics-port", type=int, default=8080, help="Port of /metrics, /healthz and /readyz.")
@_setting("own-namespace", default="default", help="Namespace of the Lease and the certificates.")
@_setting("identity", default=platform.node, help="Name of this replica. [default: the host's]")
@_setting("lease", default="tuneyard-operator", help="Lease that the active replica holds.")
@_setting("tls-secret", default="tuneyard-tls", help="Secret of the certificates.")
@_setting("job-network-policies", is_flag=True, help="Create a NetworkPolicy for each job.")
@_setting("concurrency", type=click.IntRange(1, 256), default=16, help="Jobs reconciled at a time.")
@_setting(
    "progress-writes",
    type=click.IntRange(1, 1000),
    default=20,
    help="Writes of progress per second, over all jobs.",
)
def operator(namespaces: str, profiles: Path | None, **settings: Any) -> int:
    """Run the operator in this process."""
    with needs_extra("operator", "run the operator"):
        from tuneyard.controller import app
        from tuneyard.controller.settings import Settings, read_profiles
    names = tuple(namespaces.replace(",", " ").split())
    compute_profiles = read_profiles(profiles) if profiles else {}
    return app.main(Settings(namespaces=names, profiles=compute_profiles, **settings))


def _rendered(job: Job, attempt: int) -> list[rayjob.Object]:
    """Return a job's objects. Only the operator knows profiles and other jobs' models."""
    plan = placed(plan_job(job), profiles={})
    *shared, ray_job = rayjob.render(plan, job, attempt=attempt)
    if not prepares_first(plan):
        return [*shared, ray_job]
    return [*shared, rayjob.render_preparation(plan, job, attempt=attempt), ray_job]


# ---- printing ---------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """A YAML writer for people: texts of several lines are blocks, and there are no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _string)
