"""Why an attempt ended, or does not start: one reason, one sentence, one remedy.

The driver's own word comes first, since it knows the stage and the row; then what Kubernetes says
of the pods, since a killed process says nothing; KubeRay's word is last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from pydantic import ValidationError

from tuneyard.api.pods import OUTCOME_PREFIX
from tuneyard.api.progress import Outcome
from tuneyard.api.status import Failure
from tuneyard.status.observed import Obstacle, Pod, RayJob, Seen, Trouble

WORDLESS = ("WorkerDied", "HeadLost")
"""Reasons of somebody who saw only that a process was gone: Kubernetes may know why."""


class Cause(NamedTuple):
    """Why."""

    reason: str
    message: str
    advice: str = ""
    retryable: bool = False

    @property
    def failure(self) -> Failure:
        return Failure(reason=self.reason, message=self.message, advice=self.advice)


_REASON = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}\Z")
"""A reason that a condition may carry."""
_WORST = ("OutOfMemory", "Evicted", "Preempted")

PREEMPTED = Cause("Preempted", "its pods were preempted", retryable=True)
_MEMORY_ADVICE = (
    "Raise compute.memory, or lower training.microBatchTokens or data.maxLength; "
    "training.gradientCheckpointing: true saves memory too."
)


def last_words(ray_job: RayJob | None) -> Outcome | None:
    """How the driver ended by its log's last line; None if it did not say."""
    text = ray_job.message if ray_job else ""
    _, mark, rest = text.rpartition(OUTCOME_PREFIX)
    if not mark:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(rest)
        return Outcome.model_validate(value)
    except (json.JSONDecodeError, ValidationError):
        return None


def of_ending(outcome: Outcome) -> Cause:
    """The cause that a driver gives which did not succeed."""
    failure = outcome.failure
    if outcome.state == "Interrupted":
        return PREEMPTED._replace(message=failure.message) if failure else PREEMPTED
    if failure is None:
        return Cause("DriverError", "the driver failed without a word", retryable=outcome.retryable)
    if not _REASON.match(failure.reason):
        message = f"{failure.reason}: {failure.message}"
        return Cause("DriverError", message, failure.advice, outcome.retryable)
    return Cause(failure.reason, failure.message, failure.advice, outcome.retryable)


def of_end(ray_job: RayJob | None, seen: Seen, outcome: Outcome | None) -> Cause:
    """Why an attempt ended that did not succeed. Of `ray_job` and `ending` one may be None."""
    told = of_ending(outcome) if outcome else None
    if ray_job is None or (told and told.reason not in WORDLESS):
        return told or PREEMPTED
    return of_killing(seen, ray_job.attempt) or told or _by_kuberay(ray_job, seen)


def of_loss(seen: Seen, attempt: int) -> Cause:
    """Why an attempt's RayJob is not there any more."""
    return of_killing(seen, attempt) or Cause(
        "RayJobDeleted", "its RayJob was deleted by somebody else", retryable=True
    )


def of_killing(seen: Seen, attempt: int) -> Cause | None:
    """What Kubernetes says of an attempt's killed pods, the worst first; None: nothing."""
    pods = [pod for pod in (*seen.gone, *seen.pods) if pod.attempt == attempt]
    return min(_killed(pods), key=lambda c: (_WORST.index(c.reason), c.message), default=None)


_NODE_GONE = ("Terminated", "Shutdown", "NodeShutdown", "NodeLost")


def _killed(pods: Iterable[Pod]) -> Iterator[Cause]:
    for pod in pods:
        if pod.role not in ("head", "worker"):
            continue
        for trouble in pod.troubles:
            cause = _of_killing(pod, trouble)
            if cause:
                yield cause


def _of_killing(pod: Pod, trouble: Trouble) -> Cause | None:
    where = f"container {trouble.container} of pod {pod.name}"
    if trouble.reason == "OOMKilled":
        if pod.role == "head":
            advice = "The head's memory is fixed: tell the platform team."
        else:
            advice = _MEMORY_ADVICE
        return Cause("OutOfMemory", f"{where} was killed: out of memory", advice, retryable=False)
    if trouble.reason in ("DisruptionTarget", "Preempting", *_NODE_GONE):
        return PREEMPTED._replace(message=f"pod {pod.name} was preempted: {trouble.message}")
    if trouble.reason == "Evicted":
        return Cause(
            "Evicted",
            f"pod {pod.name} was evicted: {trouble.message}",
            "If the node ran out of memory or disk, raise compute.memory or choose other nodes.",
            retryable=True,
        )
    return None


_HEAD_LOST = ("JobStatusCheckTimeoutExceeded", "JobDeploymentStatusTransitionGracePeriodExceeded")


def _by_kuberay(ray_job: RayJob, seen: Seen) -> Cause:
    reason, line = ray_job.reason, _last_line(ray_job.message)
    if reason == "PreRunningDeadlineExceeded":  # its pods may be gone by now
        return of_waiting(ray_job, replace(seen, pods=(*seen.pods, *seen.gone)))
    if ray_job.deployment_status == "ValidationFailed" or reason == "ValidationFailed":
        return Cause("RayJobRefused", f"KubeRay refused the RayJob: {line}")
    if reason in _HEAD_LOST or "Ray job not found" in line:
        return Cause("HeadLost", f"the head pod does not answer: {line}", retryable=True)
    if reason == "SubmissionFailed" and ray_job.job_status == "RUNNING":
        return Cause("HeadLost", f"the driver was lost: {line}", retryable=True)
    if reason == "SubmissionFailed":
        return Cause("SubmissionFailed", f"the driver could not be started: {line}", retryable=True)
    if ray_job.job_status == "STOPPED":
        return Cause("Stopped", "the Ray job was stopped by somebody else", retryable=True)
    return Cause("DriverError", line or "the driver ended without a word", retryable=True)


def _last_line(text: str) -> str:
    """The last line that says something, of a log's tail."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


# ---- attempts that do not start -----------------------------------------------------------------


def of_obstacle(obstacle: Obstacle) -> Cause:
    """Why the API server did not take the attempt's objects."""
    text = obstacle.message
    if obstacle.reason == "PlanLost":
        return Cause("PlanLost", text, "Create the job anew, under the same name: it goes on.")
    if (obstacle.code == 404 and "namespace" in text.lower()) or "being terminated" in text:
        return Cause("NamespaceGone", f"the namespace is going away: {text}")
    if obstacle.code == 404:
        return Cause(
            "KubeRayMissing",
            "the cluster does not know RayJobs",
            "Ask the platform team to install KubeRay 1.6 or later.",
        )
    if "exceeded quota" in text:
        return _quota(text)
    if obstacle.code == 429 or obstacle.code >= 500:
        return Cause(
            "ClusterUnavailable",
            f"the cluster could not take the attempt's objects: {text}",
            "Ask the platform team: the API server or an admission webhook does not answer.",
            retryable=True,
        )
    if obstacle.code == 403:
        return Cause(
            "Forbidden",
            f"the cluster refused the attempt's objects: {text}",
            "Ask the platform team: a policy or the operator's rights stand in the way.",
        )
    return Cause("RayJobRefused", f"the cluster refused the attempt's objects: {text}")


def of_waiting(ray_job: RayJob | None, seen: Seen) -> Cause:
    """What keeps an attempt from starting; reason StartTimeout where nothing is known."""
    attempt = ray_job.attempt if ray_job else 0
    for pod in sorted(seen.pods, key=lambda pod: pod.name):
        if pod.attempt == attempt:
            for trouble in pod.troubles:
                cause = _of_waiting_pod(pod, trouble)
                if cause:
                    return cause
    killed = of_killing(seen, attempt)
    if killed and killed.reason == "OutOfMemory":  # KubeRay puts a new pod in its place for ever
        return killed
    texts = [*([ray_job.cluster_failure] if ray_job else []), *seen.warnings]
    for text in filter(None, texts):
        if "exceeded quota" in text:
            return _quota(text)
    for text in filter(None, texts):
        return Cause(
            "PodsRefused",
            f"the cluster refused the job's pods: {text[:500]}",
            "Ask the platform team: a policy of the namespace stands in the way.",
        )
    return Cause("StartTimeout", "the job's pods did not start in time")


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


def _of_waiting_pod(pod: Pod, trouble: Trouble) -> Cause | None:
    text = trouble.message
    if claim := _CLAIM.search(text):
        return Cause(
            "VolumeMissing",
            f"there is no PersistentVolumeClaim {claim[1]} in the namespace",
            f"Create it, or change the pvc://{claim[1]}/ paths of the manifest.",
        )
    if secret := _SECRET.search(text):
        return Cause(
            "SecretMissing",
            f"there is no Secret {secret[1]} in the namespace",
            "Create it, or change tokenSecret or credentials.",
        )
    if trouble.reason == "CreateContainerConfigError":
        return Cause(
            "SecretMissing",
            f"pod {pod.name} cannot be configured: {text}",
            "Correct the Secret that tokenSecret or credentials names.",
        )
    if trouble.reason in _IMAGE:
        return Cause(
            "ImagePullFailed",
            f"the image of pod {pod.name} cannot be pulled: {text or trouble.reason}",
            "Correct compute.image, or ask the platform team for the operator's trainer image.",
        )
    if "unbound immediate PersistentVolumeClaims" in text:
        return Cause(
            "VolumePending",
            f"a PersistentVolumeClaim of the job is not bound: {text}",
            "Check the claim's StorageClass, or change the pvc:// paths of the manifest.",
        )
    if trouble.reason == "Unschedulable":
        return Cause(
            "Unschedulable",
            f"no node can take the {pod.role} pod: {text}",
            "Lower compute.gpusPerWorker, cpusPerWorker or memory, or correct nodeSelector and "
            "tolerations.",
        )
    if trouble.reason in ("CrashLoopBackOff", "RunContainerError", "StartError"):
        return Cause(
            "ContainerBroken",
            f"container {trouble.container} of pod {pod.name} does not start: {text}",
            "Correct compute.image: it must be built on the trainer image.",
        )
    return None
