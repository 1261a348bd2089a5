"""From a job to its plan."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import API_VERSION
from tuneyard.api.plan import JobRef, Plan
from tuneyard.planning import alignment
from tuneyard.planning.drafts import (
    fingerprinted,
)
from tuneyard.planning.finetuning import fine_tuning_stages


def plan_job(job: FineTuneJob | AlignmentJob) -> Plan:
    """A job's stages, in order. Raises PlanError with every part that cannot be carried out."""
    drafts, notes = (
        alignment.draft(job.spec) if isinstance(job, AlignmentJob) else fine_tuning_stages(job.spec)
    )
    return Plan(
        api_version=API_VERSION,
        job=JobRef(kind=job.kind, name=job.metadata.name, namespace=job.metadata.namespace),
        stages=fingerprinted(drafts),
        output=job.spec.output,
        compute=job.spec.compute,
        manifest=_manifest(job),
        notes=notes,
    )


# ---- stages -----------------------------------------------------------------------------------


# ---- what the user is told --------------------------------------------------------------------


def _manifest(job: FineTuneJob | AlignmentJob) -> dict[str, Any]:
    """The job as a manifest: no status, nothing that only a cluster knows, no empty fields."""
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
    """`model_dump`, without the fields that are None by default: a None that overrides a default
    (`maxGradientNorm: null`) must survive."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            field.alias or name: _dump(getattr(value, name))
            for name, field in fields.items()
            if getattr(value, name) is not None or field.default is not None
        }
    if isinstance(value, list):
        return [_dump(item) for item in value]
    return value
