"""Adapt a plan to one cluster: apply its compute profile, locate the models of other jobs."""

from __future__ import annotations

from collections.abc import Mapping

from tuneyard.api.compute import Compute
from tuneyard.api.exports import named_job, with_models
from tuneyard.api.plan import Plan, SourceInput
from tuneyard.errors import PlanError
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
    """Return the jobs whose models the plan needs: by name, a source that names the job."""
    inputs = (source for stage in plan.stages for source in stage.inputs.values())
    sources = (source for source in inputs if isinstance(source, SourceInput))
    return {name: source for source in sources if (name := named_job(source))}
