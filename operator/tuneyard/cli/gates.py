"""The verdicts on a job's gates: from the output of a run on this machine, or from its status."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from tuneyard.api.currency import EVALUATED, PATTERNS, changed_after_evaluation
from tuneyard.api.evaluation import Gate
from tuneyard.api.gates import GateResult, overall
from tuneyard.api.plan import Plan, StageInput
from tuneyard.cli.errors import needs_extra
from tuneyard.cli.jobs import JobView

PASSED, MISSED, UNCLEAR, UNREADABLE = 0, 1, 2, 3
"""The exit codes of `tuneyard gate`. Its code 2 is no bad input, which is UNREADABLE."""


@dataclass(frozen=True)
class JobGates:
    """The verdicts on the gates of one job."""

    name: str
    """Name of the job, or its output."""
    results: Sequence[GateResult]


def exit_code(jobs: Iterable[JobGates]) -> int:
    """Return PASSED if all required gates are met, MISSED after a breach or a missing metric, else
    UNCLEAR."""
    verdict = overall(result for job in jobs for result in job.results)
    codes = {None: PASSED, "pass": PASSED, "insufficientEvidence": UNCLEAR}
    return codes.get(verdict, MISSED)


def of_job(job: JobView) -> JobGates:
    """Return the verdicts in the status of a job. Raises ClickException if there are none."""
    stages = job.status.stages if job.status else []
    results = [result for stage in stages for result in stage.gates]
    if not results:
        raise click.ClickException(
            f"{job.name} has no verdicts on gates, and its phase is {job.phase}: a job has them "
            "once it has evaluated a model, if evaluate.gates is set"
        )
    return JobGates(job.name, results)


def of_plan(plan: Plan, base_dir: Path) -> JobGates:
    """Return the verdicts in the output of a job. `base_dir`: the folder of its manifest. Raises
    ClickException if there are none, or if they are on other gates."""
    gates: list[Gate] = [
        gate for stage in plan.stages for gate in getattr(stage.settings, "gates", ())
    ]
    if not gates:
        raise click.ClickException(f"{plan.job.name} has no gates: set spec.evaluate.gates")
    uri = plan.output.uri
    if uri.startswith("pvc://"):
        raise click.ClickException(
            f"the output of {plan.job.name}, {uri}, exists on a cluster only: run `tuneyard gate "
            f"{plan.job.name}`"
        )
    if uri.startswith("file://"):
        uri = str(base_dir / uri.removeprefix("file://"))
    results = of_output(uri, plan).results
    if len(results) != len(gates) or not all(map(GateResult.is_of, results, gates)):
        raise click.ClickException(
            f"spec.evaluate.gates of {plan.job.name} has changed since its evaluation: run the job "
            "again, which repeats only the evaluation"
        )
    return JobGates(plan.job.name, results)


def of_output(uri: str, plan: Plan | None = None) -> JobGates:
    """Return the verdicts in an output. `uri`: a folder, or a URL that fsspec reads. `plan`: of the
    job. None: it is not known. Raises ClickException if there are none, or if the model has changed
    since."""
    files = _remote(uri) if "://" in uri else _local(Path(uri))
    evaluations = [value for path, value in files.items() if path.endswith(EVALUATED)]
    if not evaluations:
        raise click.ClickException(
            f"{uri} has no evaluation: run the job, whose stage evaluate checks the gates"
        )
    _refuse_outdated(uri, files, plan)
    values = [value for found in evaluations for value in found.get("gates") or ()]
    if not values:
        raise click.ClickException(
            f"the evaluation in {uri} has no verdicts: set spec.evaluate.gates, or run the job "
            "again if an earlier version evaluated it"
        )
    try:
        return JobGates(uri, [GateResult.model_validate(value) for value in values])
    except ValidationError as error:
        raise click.ClickException(
            f"the evaluation in {uri} cannot be read: use the version of tuneyard that wrote it"
        ) from error


def _refuse_outdated(uri: str, files: Mapping[str, Any], plan: Plan | None) -> None:
    """Raise ClickException if the model or the data changed after the evaluation."""
    sources = {
        stage.name: {
            role: source.stage
            for role, source in stage.inputs.items()
            if isinstance(source, StageInput)
        }
        for stage in (plan.stages if plan else ())
    }
    changed = changed_after_evaluation(files, sources)
    if changed:
        raise click.ClickException(
            f"{', '.join(changed)} in {uri} changed after the evaluation: run the job, "
            "which evaluates the new model"
        )


def _local(folder: Path) -> dict[str, Any]:
    """Return the JSON files of an output that tell about its evaluation, by relative path."""
    found = [path for pattern in PATTERNS for path in folder.glob(pattern)]
    try:
        texts = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
    except OSError as error:
        raise click.ClickException(f"{folder} cannot be read: {error.strerror}") from error
    return {path: _parsed(path, text) for path, text in texts.items()}


def _remote(uri: str) -> dict[str, Any]:
    with needs_extra("trainer", f"read {uri}"):
        import fsspec
    try:
        fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        prefix = f"{root.rstrip('/')}/"
        found = [path for pattern in PATTERNS for path in fs.glob(f"{prefix}{pattern}")]
        texts = {path.removeprefix(prefix): fs.cat_file(path) for path in found}
    except Exception as error:  # each kind of store has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise click.ClickException(
            f"{uri} cannot be read: {reason}: give this command access to the store by the "
            "environment, as the store's own tools expect it"
        ) from error
    return {path: _parsed(path, text) for path, text in texts.items()}


def _parsed(path: str, text: bytes) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.ClickException(f"{path} is damaged and cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}
