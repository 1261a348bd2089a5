"""The resources of a job's workers: the job's own fields, then its profile's, then the defaults."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tuneyard.api.compute import Compute
from tuneyard.errors import Fault


class Workers(NamedTuple):
    """The worker group, with every default filled in."""

    num_workers: int
    min_workers: int
    """Equal to `num_workers` unless the job is elastic."""
    gpus: int
    """GPUs of each worker."""
    gpu_resource: str
    """The extended resource that stands for one GPU."""
    cpus: str
    """CPU of each worker, a Kubernetes quantity."""
    memory: str
    """Memory of each worker, a Kubernetes quantity."""
    shared_memory: str
    """Size of /dev/shm, a Kubernetes quantity."""
    temporary_storage: str
    """Limit on the size of /tmp, a Kubernetes quantity."""


def compute_faults(compute: Compute, profiles: Mapping[str, Compute]) -> Iterator[Fault]:
    """Yield the faults of a compute that no cluster can provide."""
    if compute.profile is not None and compute.profile not in profiles:
        yield Fault("spec.compute.profile", _unknown(compute.profile, profiles))
        return
    group = workers(with_profile(compute, profiles))
    if group.min_workers > group.num_workers:
        yield Fault(
            "spec.compute.minWorkers",
            f"minWorkers is {group.min_workers}, above the {group.num_workers} workers: "
            "lower minWorkers or raise workers",
        )


def with_profile(compute: Compute, profiles: Mapping[str, Compute]) -> Compute:
    """Return the job's compute, completed by its profile. A field with its default value counts as
    unset."""
    if compute.profile is None:
        return compute
    own = {
        name: getattr(compute, name)
        for name, field in Compute.model_fields.items()
        if getattr(compute, name) != field.default
    }
    return profiles[compute.profile].model_copy(update=own)


def workers(compute: Compute) -> Workers:
    """Return the worker group of a compute whose profile has been applied."""
    num_workers = compute.workers or 1
    return Workers(
        num_workers=num_workers,
        min_workers=compute.min_workers or num_workers,
        gpus=compute.gpus_per_worker or 0,
        gpu_resource=compute.gpu_resource,
        cpus=compute.cpus_per_worker or "4",
        memory=compute.memory or "16Gi",
        shared_memory=compute.shared_memory or "2Gi",
        temporary_storage=compute.temporary_storage or "200Gi",
    )


def _unknown(profile: str, profiles: Mapping[str, Compute]) -> str:
    if not profiles:
        return (
            f"profile {profile} is defined in the operator's settings, which are unknown here: "
            "set workers, gpusPerWorker, cpusPerWorker and memory instead"
        )
    close = difflib.get_close_matches(profile, profiles, n=1)
    hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(sorted(profiles))}"
    return f"there is no profile {profile}: {hint}"
