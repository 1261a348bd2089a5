"""Names of the objects of a job, and of the routes and audiences that belong to it."""

from __future__ import annotations

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import GROUP
from tuneyard.api.plan import Plan, digest
from tuneyard.api.progress import PROGRESS_ROUTE


def ray_job_name(kind: str, name: str, attempt: int) -> str:
    """At most 45 of KubeRay's 47 characters. The two kinds never share a name: `x-1` is a
    FineTuneJob's, `x-a1` an AlignmentJob's, and no job's name ends the other way round."""
    return f"{name}-{'a' if kind == 'AlignmentJob' else ''}{attempt}"


def config_map_name(name: str, plan_digest: str) -> str:
    """Named by its content, so that attempts with one plan share it."""
    return f"{name}-plan-{plan_digest.removeprefix('sha256:')[:10]}"


def erasure_name(job: FineTuneJob | AlignmentJob) -> str:
    """The Job that removes the output."""
    return f"{job.metadata.name}-{'a' if job.kind == 'AlignmentJob' else ''}erase"


def audience(kind: str, namespace: str, name: str) -> str:
    """What a progress token is good for: one job."""
    return f"{GROUP}/{namespace}/{kind.lower()}s/{name}"


def progress_path(kind: str, namespace: str, name: str) -> str:
    """Where an attempt of a job posts to, on the status server."""
    return PROGRESS_ROUTE.format(namespace=namespace, plural=f"{kind.lower()}s", name=name)


def plan_digest(plan: Plan) -> str:
    """What the status and the ConfigMap's name know a plan by."""
    return digest(plan.model_dump(mode="json", by_alias=True))
