"""Plan a job."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import API_VERSION, yaml_fields
from tuneyard.api.plan import JobRef, Plan
from tuneyard.planning.alignment import alignment_stages
from tuneyard.planning.drafts import fingerprinted
from tuneyard.planning.finetuning import fine_tuning_stages


def plan_job(job: FineTuneJob | AlignmentJob) -> Plan:
    """Return a job's plan. Raises PlanError with everything that this version cannot run."""
    if isinstance(job, AlignmentJob):
        drafts, notes = alignment_stages(job.spec)
    else:
        drafts, notes = fine_tuning_stages(job.spec)
    return Plan(
        api_version=API_VERSION,
        job=JobRef(kind=job.kind, name=job.metadata.name, namespace=job.metadata.namespace),
        stages=fingerprinted(drafts),
        output=job.spec.output,
        compute=job.spec.compute,
        tracking=job.spec.tracking,
        manifest=_manifest(job),
        notes=notes,
    )


def _manifest(job: FineTuneJob | AlignmentJob) -> dict[str, Any]:
    """Return a job as a manifest, without its status, its run policy, empty fields and the metadata
    that a cluster adds."""
    metadata = {
        "name": job.metadata.name,
        "namespace": job.metadata.namespace,
        "labels": job.metadata.labels,
    }
    return {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "metadata": {key: value for key, value in metadata.items() if value},
        "spec": {key: value for key, value in _dump(job.spec).items() if key != "runPolicy"},
    }


def _dump(value: Any) -> Any:
    """Return a model's fields by YAML names, except those that are None by default, and those that
    a plan leaves out at their default.

    `model_dump(exclude_none=True)` would also drop a None that overrides a default, as
    `maxGradientNorm: null` does.
    """
    if isinstance(value, BaseModel):
        names = zip(yaml_fields(type(value)).items(), type(value).model_fields, strict=True)
        return {
            alias: _dump(getattr(value, name))
            for (alias, info), name in names
            if not _is_left_out(info, getattr(value, name))
        }
    if isinstance(value, list):
        return [_dump(item) for item in value]
    return value


def _is_left_out(info: FieldInfo, value: Any) -> bool:
    if info.exclude_if is not None and info.exclude_if(value):
        return True
    return value is None and info.default is None
