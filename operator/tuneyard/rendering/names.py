"""Names of a job's objects, its queue, its progress path and its token audience."""

from __future__ import annotations

from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import GROUP
from tuneyard.api.plan import Plan, digest
from tuneyard.api.progress import PROGRESS_ROUTE

UID_LABEL = f"{GROUP}/job-uid"
"""The UID of the job that an object belongs to: a deleted job may have had the same name."""
ROLE_LABEL = f"{GROUP}/role"
PREPARE_ROLE = "prepare"
"""The value of ROLE_LABEL of the Job that prepares an attempt's data, and of its pod; the name
of the pod's container."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"


_PREPARE = "-prepare"


def queue(job: FineTuneJob | AlignmentJob) -> str | None:
    """Return the Kueue LocalQueue that admits the job: runPolicy.queue, else the job's label. None:
    neither names one."""
    return job.spec.run_policy.queue or job.metadata.labels.get(QUEUE_LABEL) or None


def workload_priority(job: FineTuneJob | AlignmentJob) -> str | None:
    """Return the Kueue WorkloadPriorityClass of the job: runPolicy.workloadPriority, else the job's
    label. None: neither names one."""
    policy = job.spec.run_policy
    return policy.workload_priority or job.metadata.labels.get(PRIORITY_LABEL) or None


def ray_job_name(kind: str, name: str, attempt: int) -> str:
    """Return the name of an attempt's RayJob, at most KubeRay's 47 characters up to attempt 99999.
    The two kinds of jobs never share a name: `x-1` belongs to a FineTuneJob, `x-a1` to an
    AlignmentJob."""
    return f"{name}-{'a' if kind == 'AlignmentJob' else ''}{attempt}"


def prepare_job_name(kind: str, name: str, attempt: int) -> str:
    """Return the name of the Job that prepares the data of an attempt."""
    return f"{ray_job_name(kind, name, attempt)}{_PREPARE}"


def ray_job_of(prepare_job: str) -> str:
    """Return the name of the RayJob of an attempt whose data this Job prepares."""
    return prepare_job.removesuffix(_PREPARE)


def config_map_name(name: str, plan_digest: str) -> str:
    """Return the name of a plan's ConfigMap, which all attempts with this plan share."""
    return f"{name}-plan-{plan_digest.removeprefix('sha256:')[:10]}"


def network_policy_name(kind: str, name: str) -> str:
    """Return the name of the NetworkPolicy of a job's pods, which all attempts share."""
    return f"{name}-{'a' if kind == 'AlignmentJob' else ''}pods"


def erasure_name(job: FineTuneJob | AlignmentJob) -> str:
    """Return the name of the Job that removes the output."""
    return f"{job.metadata.name}-{'a' if job.kind == 'AlignmentJob' else ''}erase"


def audience(kind: str, namespace: str, name: str) -> str:
    """Return the audience of a progress token, which is valid for one job."""
    return f"{GROUP}/{namespace}/{kind.lower()}s/{name}"


def progress_path(kind: str, namespace: str, name: str) -> str:
    """Return the path on the status server that a job's attempts post to."""
    return PROGRESS_ROUTE.format(namespace=namespace, plural=f"{kind.lower()}s", name=name)


def plan_digest(plan: Plan) -> str:
    """Return the digest that the status and the ConfigMap's name identify a plan by."""
    return digest(plan.model_dump(mode="json", by_alias=True))
