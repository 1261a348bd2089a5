"""Adapt a plan to one cluster: apply its compute profile, locate the models of other jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from tuneyard.api.compute import MIN_SHARDS, Compute
from tuneyard.api.exports import named_job, with_models
from tuneyard.api.meta import NAME_LENGTH, NAME_PATTERN
from tuneyard.api.plan import Plan, PlannedStage, SourceInput
from tuneyard.api.stage_settings import DistillSettings, GrpoSettings
from tuneyard.errors import Fault, PlanError
from tuneyard.rendering.compute import compute_faults, with_profile, workers
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
    faults = [
        *storage_faults(found),
        *compute_faults(plan.compute, profiles),
        *_sharding_faults(plan, profiles),
        *_division_faults(plan, profiles),
    ]
    if faults:
        raise PlanError(faults)
    compute = with_profile(plan.compute, profiles)
    stages = [_with_sharding(stage, compute) for stage in found.stages]
    result = found.model_copy(update={"compute": compute, "stages": stages})
    if too_large := [*size_faults(result)]:
        raise PlanError(too_large)
    return result


def _with_sharding(stage: PlannedStage, compute: Compute) -> PlannedStage:
    """Return the stage with the sharding of its job's profile, if it can be sharded and the job
    leaves it open. `compute`: with the profile applied."""
    if stage.runtime.sharding != "auto":
        return stage
    runtime = stage.runtime.model_copy(update={"sharding": compute.sharding})
    return stage.model_copy(update={"runtime": runtime})


def _sharding_faults(plan: Plan, profiles: Mapping[str, Compute]) -> Iterator[Fault]:
    """Yield a fault for each reason why the job cannot be sharded as its profile asks, and for a
    profile with too few workers. A job without a profile was checked when it was planned."""
    name = plan.compute.profile
    if name is None or name not in profiles:
        return
    compute = with_profile(plan.compute, profiles)
    if compute.sharding != "fsdp":
        return
    if all(stage.runtime.sharding == "none" for stage in plan.stages):
        yield Fault(
            "spec.compute.profile",
            f"profile {name} shares a model among the workers (sharding fsdp), which needs a "
            "FineTuneJob, or an AlignmentJob of dpo, grpo or rloo without models beside the "
            "policy, with training.engine trl and adapter.lora (not decomposed) or no adapter: "
            "set these, set compute.sharding to none, or choose another profile",
        )
        return
    group, each = workers(compute), compute.processes_per_worker
    if group.num_workers * each < MIN_SHARDS:
        yield Fault(
            "spec.compute.workers",
            f"fsdp needs at least {MIN_SHARDS} workers or GPUs, and with profile {name} the job "
            f"has {group.num_workers}: set compute.workers, or compute.sharding to none",
        )
    elif group.min_workers * each < MIN_SHARDS:
        yield Fault(
            "spec.compute.minWorkers",
            f"fsdp needs at least {MIN_SHARDS} workers or GPUs, and the job may continue with "
            f"{group.min_workers}: raise minWorkers, or set compute.sharding to none",
        )


def _division_faults(plan: Plan, profiles: Mapping[str, Compute]) -> Iterator[Fault]:
    """Yield a fault for each batch of TRL's samplers that a profile's workers cannot share equally.
    A job without a profile was checked when it was planned."""
    name = plan.compute.profile
    if name is None or name not in profiles:
        return
    compute = with_profile(plan.compute, profiles)
    batches: dict[str, int] = {}  # one for each method, whatever the number of rounds
    for settings in (stage.settings for stage in plan.stages):
        if isinstance(settings, DistillSettings):
            batches["distill"] = settings.training.batch_size
        elif isinstance(settings, GrpoSettings) and settings.training.engine == "trl":
            batches[settings.estimator] = settings.training.batch_size
    for kind, size in batches.items():
        if uneven := compute.uneven_workers(size):
            yield Fault(
                f"spec.optimize.{kind}.training.batchSize",
                f"TRL needs equally many rows on each process, and {size} cannot be divided among "
                f"the {uneven * compute.processes_per_worker} of {uneven} workers, a number that "
                f"profile {name} allows: set a multiple, or compute.workers and "
                "compute.minWorkers",
            )


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
