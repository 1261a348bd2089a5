"""Adapt a plan to one cluster: apply its compute profile, locate the models of other jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tuneyard.api.compute import Compute
from tuneyard.api.exports import named_job, with_models
from tuneyard.api.meta import NAME_LENGTH, NAME_PATTERN
from tuneyard.api.plan import Plan, SourceInput
from tuneyard.errors import Fault, PlanError
from tuneyard.rendering.compute import compute_faults, with_profile
from tuneyard.rendering.plan_file import size_faults
from tuneyard.rendering.storage import storage_faults


def placed(
    plan: Plan, *, profiles: Mapping[str, Compute], jobs: Mapping[str, Plan] | None = None
) -> Plan:
    """Return the plan with its profile applied and its job:// sources replaced.

    `jobs`: the plans of the jobs that these sources name. Raises PlanError with every fault that
    keeps the plan from running on a cluster.
    """
    found = with_models(plan, jobs or {})
    faults = [*storage_faults(found), *compute_faults(plan.compute, profiles)]
    if faults:
        raise PlanError(faults)
    result = found.model_copy(update={"compute": with_profile(plan.compute, profiles)})
    if too_large := [*size_faults(result)]:
        raise PlanError(too_large)
    return result


def awaited_jobs(plan: Plan) -> dict[str, SourceInput]:
    """Return the jobs whose models the plan needs: by name, a source that names the job. Raises
    PlanError if a source names none: `..` would lead a request for it to another namespace."""
    inputs = (source for stage in plan.stages for source in stage.inputs.values())
    sources = (source for source in inputs if isinstance(source, SourceInput))
    found = {name: source for source in sources if (name := named_job(source)) is not None}
    faults = [
        Fault(source.path, f"{source.uri} names no job: write job://NAME of a job's metadata.name")
        for name, source in found.items()
        if len(name) > NAME_LENGTH or not re.fullmatch(NAME_PATTERN, name)
    ]
    if faults:
        raise PlanError(faults)
    return found
