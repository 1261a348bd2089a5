"""Why an attempt ended or does not start: a reason, a message and advice.

The sources in order of preference: the driver, which knows the stage and the row; Kubernetes'
pods, because a killed process reports nothing; KubeRay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from pydantic import ValidationError

from tuneyard.api.pods import OUTCOME_PREFIX, STALE_ATTEMPT, UNKNOWN_OPTION
from tuneyard.api.progress import Outcome
from tuneyard.api.status import Failure
from tuneyard.rendering.names import PREPARE_ROLE
from tuneyard.status.observed import (
    CreateError,
    ObservedState,
    Pod,
    PodProblem,
    Preparation,
    RayJob,
)

UNEXPLAINED = ("WorkerDied", "HeadLost")
"""Reasons that state only the loss of a process: Kubernetes may report the cause later."""


class Cause(NamedTuple):
    """Why an attempt or a job ended, or does not start."""

    reason: str
    message: str
    advice: str = ""
    retryable: bool = False

    @property
    def failure(self) -> Failure:
        return Failure(reason=self.reason, message=self.message, advice=self.advice)

    @property
    def text(self) -> str:
        """The message and the advice."""
        end = "" if self.message.endswith((".", "!", "?")) or not self.advice else "."
        return f"{self.message}{end} {self.advice}".strip()


_REASON = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}\Z")
"""The reasons that a condition may carry."""
_WORST = ("OutOfMemory", "Evicted", "Preempted")

PREEMPTED = Cause("Preempted", "the attempt's pods were preempted", retryable=True)
_MEMORY_ADVICE = (
    "Raise compute.memory, or lower training.microBatchTokens or data.maxLength; "
    "training.gradientCheckpointing: true saves memory too."
)


def logged_outcome(ray_job: RayJob | None) -> Outcome | None:
    """Return the outcome in the driver's log, whose tail KubeRay copies into the RayJob; None: the
    tail holds none."""
    return _logged(ray_job.message if ray_job else "")


def logged_preparation(observed: ObservedState, attempt: int) -> Outcome | None:
    """Return the outcome in the log of a pod that prepared an attempt's data, whose tail the
    kubelet copies into the pod's status; None: the tail holds none."""
    found = (_logged(problem.message) for problem in _preparing_problems(observed, attempt))
    return next(filter(None, found), None)


def _logged(text: str) -> Outcome | None:
    _, prefix, rest = text.rpartition(OUTCOME_PREFIX)
    if not prefix:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(rest)
        return Outcome.model_validate(value)
    except (json.JSONDecodeError, RecursionError, ValidationError):
        return None


def of_outcome(outcome: Outcome) -> Cause:
    """Return the cause that the driver reports for an attempt that did not succeed."""
    failure = outcome.failure
    if outcome.state == "Interrupted":
        return PREEMPTED._replace(message=failure.message) if failure else PREEMPTED
    if failure is None:
        return Cause(
            "DriverError", "the driver failed and gave no reason", retryable=outcome.retryable
        )
    if not _REASON.match(failure.reason):
        message = f"{failure.reason}: {failure.message}"
        return Cause("DriverError", message, failure.advice, outcome.retryable)
    # An attempt is judged while it is the newest, so only a mistake can have made it stale: an
    # operator before 0.3 that could not read the job told its driver so.
    retryable = outcome.retryable or failure.reason == STALE_ATTEMPT
    return Cause(failure.reason, failure.message, failure.advice, retryable)


def of_end(ray_job: RayJob | None, observed: ObservedState, outcome: Outcome | None) -> Cause:
    """Return why an attempt did not succeed. One of `ray_job` and `outcome` may be None."""
    reported = of_outcome(outcome) if outcome else None
    if ray_job is None or (reported and reported.reason not in UNEXPLAINED):
        return reported or PREEMPTED
    return of_killed_pods(observed, ray_job.attempt) or reported or _by_kuberay(ray_job, observed)


def of_missing_ray_job(observed: ObservedState, attempt: int) -> Cause:
    """Return why an attempt's RayJob does not exist any more."""
    return of_killed_pods(observed, attempt) or Cause(
        "RayJobDeleted", "the attempt's RayJob was deleted by another client", retryable=True
    )


def of_preparation(
    preparation: Preparation | None, observed: ObservedState, attempt: int, outcome: Outcome | None
) -> Cause:
    """Return why an attempt's data could not be prepared. One of `preparation` and `outcome` may be
    None."""
    reported = of_outcome(outcome) if outcome else None
    if preparation is None or (reported and reported.reason not in UNEXPLAINED):
        return reported or PREEMPTED
    if cause := of_killed_pods(observed, attempt) or reported:
        return cause
    texts = [problem.message for problem in _preparing_problems(observed, attempt)]
    line = _last_line("\n".join([preparation.message, *texts]))
    return Cause("DriverError", line or "the driver ended and gave no reason", retryable=True)


def of_missing_preparation(observed: ObservedState, attempt: int) -> Cause:
    """Return why the Job that prepares an attempt's data does not exist any more."""
    return of_killed_pods(observed, attempt) or Cause(
        "PrepareJobDeleted",
        "the Job that prepares the attempt's data was deleted by another client",
        retryable=True,
    )


def cannot_prepare(observed: ObservedState, attempt: int) -> bool:
    """Return whether the driver of an attempt's Job does not know how to prepare data: its image is
    of an earlier release."""
    ends = ((end.container, end.exit_code) for end in _preparing_problems(observed, attempt))
    return (PREPARE_ROLE, UNKNOWN_OPTION) in ends  # other clients add containers to pods


def _preparing_problems(observed: ObservedState, attempt: int) -> Iterator[PodProblem]:
    for pod in _pods_of(observed, attempt):
        if pod.role == PREPARE_ROLE:
            yield from pod.problems


def of_killed_pods(observed: ObservedState, attempt: int) -> Cause | None:
    """Return the worst cause that Kubernetes reports for an attempt's killed pods; None: none."""
    pods = _pods_of(observed, attempt)
    return min(_killed(pods), key=lambda c: (_WORST.index(c.reason), c.message), default=None)


def _pods_of(observed: ObservedState, attempt: int) -> list[Pod]:
    return [pod for pod in (*observed.deleted_pods, *observed.pods) if pod.attempt == attempt]


_NODE_LOST = ("Terminated", "Shutdown", "NodeShutdown", "NodeLost")


def _killed(pods: Iterable[Pod]) -> Iterator[Cause]:
    for pod in pods:
        if pod.role not in ("head", "worker", PREPARE_ROLE):
            continue
        for problem in pod.problems:
            cause = _of_killing(pod, problem)
            if cause:
                yield cause


def _of_killing(pod: Pod, problem: PodProblem) -> Cause | None:
    where = f"container {problem.container} of pod {pod.name}"
    if problem.reason == "OOMKilled":
        if pod.role == "head":
            advice = "The head pod's memory is fixed: tell the platform team."
        elif pod.role == PREPARE_ROLE:
            advice = "Raise compute.memory, or split the data into several jobs."
        else:
            advice = _MEMORY_ADVICE
        return Cause("OutOfMemory", f"{where} was killed: out of memory", advice, retryable=False)
    if problem.reason in ("DisruptionTarget", "Preempting", *_NODE_LOST):
        return PREEMPTED._replace(message=f"pod {pod.name} was preempted: {problem.message}")
    if problem.reason == "Evicted":
        return Cause(
            "Evicted",
            f"pod {pod.name} was evicted: {problem.message}",
            'If the volume "tmp" exceeded its limit, raise compute.temporaryStorage. If the node '
            "ran out of memory or disk, raise compute.memory or choose other nodes.",
            retryable=True,
        )
    return None


_HEAD_LOST = ("JobStatusCheckTimeoutExceeded", "JobDeploymentStatusTransitionGracePeriodExceeded")


def _by_kuberay(ray_job: RayJob, observed: ObservedState) -> Cause:
    reason, line = ray_job.reason, _last_line(ray_job.message)
    if reason == "PreRunningDeadlineExceeded":  # its pods may have been deleted
        return of_waiting(ray_job, replace(observed, pods=(*observed.pods, *observed.deleted_pods)))
    if ray_job.deployment_status == "ValidationFailed" or reason == "ValidationFailed":
        return Cause("RayJobRefused", f"KubeRay refused the RayJob: {line}")
    if reason in _HEAD_LOST or "Ray job not found" in line:
        return Cause("HeadLost", f"the head pod does not respond: {line}", retryable=True)
    if reason == "SubmissionFailed" and ray_job.job_status == "RUNNING":
        return Cause("HeadLost", f"the driver was lost: {line}", retryable=True)
    if reason == "SubmissionFailed":
        return Cause("SubmissionFailed", f"the driver could not be started: {line}", retryable=True)
    if ray_job.job_status == "STOPPED":
        return Cause("Stopped", "the Ray job was stopped by another client", retryable=True)
    return Cause("DriverError", line or "the driver ended and gave no reason", retryable=True)


def _last_line(text: str) -> str:
    """Return the last line with text, at most 500 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


# ---- attempts that do not start -----------------------------------------------------------------


def of_create_error(create_error: CreateError) -> Cause:
    """Return why the API server refused the attempt's objects."""
    text = create_error.message
    if create_error.reason == "PlanLost":
        return Cause(
            "PlanLost", text, "Create the job again with the same name: it resumes from its output."
        )
    if create_error.reason == "PlanUnreadable":
        return Cause(
            "PlanUnreadable",
            text,
            "Ask the platform team to run that version of the operator again, or create the job "
            "again with the same name: it resumes from its output.",
        )
    if (create_error.code == 404 and "namespace" in text.lower()) or "being terminated" in text:
        return Cause("NamespaceGone", f"the namespace is being deleted: {text}")
    if create_error.code == 404:
        return Cause(
            "KubeRayMissing",
            "the cluster has no RayJob resource",
            "Ask the platform team to install KubeRay 1.6 or later.",
        )
    if "exceeded quota" in text:
        return _quota(text)
    if create_error.code in (0, 429) or create_error.code >= 500:
        return Cause(
            "ClusterUnavailable",
            f"the cluster could not create the attempt's objects: {text}",
            "Ask the platform team: the API server or an admission webhook fails or does not "
            "respond.",
            retryable=True,
        )
    if create_error.reason == "AlreadyExists":
        return Cause(
            "RayJobRefused",
            f"another object has the name of one of the attempt's objects: {text}",
            "Delete that object, or create the job under another name.",
            retryable=True,
        )
    if create_error.code == 403:
        return Cause(
            "Forbidden",
            f"the cluster refused the attempt's objects: {text}",
            "Ask the platform team: a policy or the operator's permissions forbid these objects.",
        )
    return Cause("RayJobRefused", f"the cluster refused the attempt's objects: {text}")


def of_waiting(owner: RayJob | Preparation | None, observed: ObservedState) -> Cause:
    """Return why an attempt does not start; reason StartTimeout: unknown. `owner`: the object whose
    pods are awaited."""
    attempt = owner.attempt if owner else 0
    for pod in sorted(observed.pods, key=lambda pod: pod.name):
        if pod.attempt == attempt:
            for problem in pod.problems:
                cause = _of_waiting_pod(pod, problem)
                if cause:
                    return cause
    killed = of_killed_pods(observed, attempt)
    if killed and killed.reason == "OutOfMemory":  # KubeRay replaces the pod again and again
        return killed
    failures = [owner.cluster_failure] if isinstance(owner, RayJob) else []
    texts = [*failures, *observed.warnings]
    for text in filter(None, texts):
        if "exceeded quota" in text:
            return _quota(text)
    for text in filter(None, texts):
        return Cause(
            "PodsRefused",
            f"the cluster refused the job's pods: {text[:500]}",
            "Ask the platform team: a policy of the namespace forbids these pods.",
        )
    return Cause("StartTimeout", "the job's pods did not start in time")


def of_missing_workers(ray_job: RayJob, observed: ObservedState, placed: int, waited: int) -> Cause:
    """Return why an elastic attempt gives way to one with the workers that have a node."""
    why = of_waiting(ray_job, observed)
    text = f": {why.message}" if why.reason != "StartTimeout" else ""
    return Cause(
        "FewerWorkers",
        f"{placed} of {ray_job.workers} workers have a node, and no other got one for "
        f"{waited} s{text}",
        retryable=True,
    )


def _quota(text: str) -> Cause:
    return Cause(
        "QuotaExceeded",
        f"the namespace's quota is used up: {text[:500]}",
        "Lower compute.workers, compute.gpusPerWorker or compute.memory, or wait for other jobs.",
    )


_IMAGE = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
)
_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
_SECRET = re.compile(r'secret "([^"]+)" not found')
_ON_OTHER_NODES = ("volume node affinity conflict", "ReadWriteOncePod access mode")
"""In the scheduler's message: a claim that not all nodes, or not all pods, can use at once."""


def _of_waiting_pod(pod: Pod, problem: PodProblem) -> Cause | None:
    text = problem.message
    if claim := _CLAIM.search(text):
        return Cause(
            "VolumeMissing",
            f"the namespace has no PersistentVolumeClaim {claim[1]}",
            f"Create the claim, or change the pvc://{claim[1]}/ paths of the manifest or "
            "compute.cacheClaim.",
        )
    if secret := _SECRET.search(text):
        return Cause(
            "SecretMissing",
            f"the namespace has no Secret {secret[1]}",
            "Create the Secret, or change tokenSecret or credentials.",
        )
    if problem.reason == "CreateContainerConfigError":
        return Cause(
            "SecretMissing",
            f"pod {pod.name} cannot be configured: {text}",
            "Correct the Secret that tokenSecret or credentials names.",
        )
    if problem.reason in _IMAGE:
        return Cause(
            "ImagePullFailed",
            f"the image of pod {pod.name} cannot be pulled: {text or problem.reason}",
            "Correct compute.image, or ask the platform team for the operator's trainer image.",
        )
    if "unbound immediate PersistentVolumeClaims" in text:
        return Cause(
            "VolumePending",
            f"a PersistentVolumeClaim of the job is not bound: {text}",
            "Check the claim's StorageClass, or change the pvc:// paths of the manifest or "
            "compute.cacheClaim.",
        )
    if any(conflict in text for conflict in _ON_OTHER_NODES):
        return Cause(
            "Unschedulable",
            f"no node can take the {pod.role} pod, since a PersistentVolumeClaim of the job can be "
            f"used on other nodes only: {text}",
            "Use claims with the access mode ReadWriteMany in the pvc:// paths of the manifest and "
            "in compute.cacheClaim, or correct nodeSelector.",
        )
    if problem.reason == "Unschedulable":
        return Cause(
            "Unschedulable",
            f"no node can take the {pod.role} pod: {text}",
            "Lower compute.gpusPerWorker, cpusPerWorker or memory, or correct nodeSelector and "
            "tolerations.",
        )
    if problem.reason in ("CrashLoopBackOff", "RunContainerError", "StartError"):
        return Cause(
            "ContainerBroken",
            f"container {problem.container} of pod {pod.name} does not start: {text}",
            "Correct compute.image: it must be built on the trainer image.",
        )
    return None
