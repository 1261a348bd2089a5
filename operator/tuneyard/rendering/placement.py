"""Adapt a plan to one cluster: apply its compute profile, locate the models of other jobs."""

from __future__ import annotations

from collections.abc import Mapping

from tuneyard.api.compute import Compute
from tuneyard.api.plan import Plan, SourceInput
from tuneyard.errors import PlanError
from tuneyard.rendering.compute import compute_faults, with_profile
from tuneyard.rendering.plan_file import size_faults
from tuneyard.rendering.storage import storage_faults

JOB = "job://"


def placed(
    plan: Plan, *, profiles: Mapping[str, Compute], models: Mapping[str, str] | None = None
) -> Plan:
    """Return the plan with its profile applied and its job:// sources replaced.

    `models`: the URI of each finished job's model, by job name. Raises PlanError with every fault
    that keeps the plan from running on a cluster.
    """
    found = _with_models(plan, models or {})
    faults = [*storage_faults(found), *compute_faults(plan.compute, profiles)]
    if faults:
        raise PlanError(faults)
    result = found.model_copy(update={"compute": with_profile(plan.compute, profiles)})
    if too_large := [*size_faults(result)]:
        raise PlanError(too_large)
    return result


def awaited_jobs(plan: Plan) -> list[str]:
    """Return the names of the jobs whose models the plan needs, each once."""
    return list(dict.fromkeys(name for source in _sources(plan) if (name := _job_of(source))))


def _sources(plan: Plan) -> list[SourceInput]:
    inputs = (source for stage in plan.stages for source in stage.inputs.values())
    return [source for source in inputs if isinstance(source, SourceInput)]


def _job_of(source: SourceInput) -> str | None:
    """Return the job that a job:// source names; None: another scheme."""
    return source.uri.removeprefix(JOB) if source.uri.startswith(JOB) else None


def _with_models(plan: Plan, models: Mapping[str, str]) -> Plan:
    stages = []
    for stage in plan.stages:
        inputs = dict(stage.inputs)
        for role, source in inputs.items():
            if isinstance(source, SourceInput) and (uri := models.get(_job_of(source) or "")):
                inputs[role] = source.model_copy(update={"uri": uri})
        stages.append(stage.model_copy(update={"inputs": inputs}))
    return plan.model_copy(update={"stages": stages})
