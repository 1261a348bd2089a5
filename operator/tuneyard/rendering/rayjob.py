"""Render the Kubernetes objects of one attempt: an immutable ConfigMap, a NetworkPolicy, a RayJob,
and before it perhaps a Job that prepares the data.

Each pod gets what it needs and no more. The head runs the driver, which claims the output, reads
its records and hands the metrics to trackers: the head gets the plan, the progress token, the
trackers' tokens and the output. The workers get the models, the data, the output and the other
Secrets. The pod that prepares the data gets all of these, but no GPU. No pod has Kubernetes
permissions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tuneyard import __version__
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.compute import Compute
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import GROUP
from tuneyard.api.plan import Plan
from tuneyard.api.pods import (
    CA_VARIABLE,
    CLAIMS_FOLDER,
    GRACE_SECONDS,
    PREPARE_OPTION,
    PROGRESS_URL_VARIABLE,
    TOKEN_FILE_VARIABLE,
    WORKERS_VARIABLE,
)
from tuneyard.api.sources import SecretKeyRef
from tuneyard.rendering.compute import Workers, workers
from tuneyard.rendering.names import (
    PREPARE_ROLE,
    PRIORITY_LABEL,
    QUEUE_LABEL,
    ROLE_LABEL,
    UID_LABEL,
    audience,
    config_map_name,
    erasure_name,
    network_policy_name,
    plan_digest,
    prepare_job_name,
    progress_path,
    queue,
    ray_job_name,
    workload_priority,
)
from tuneyard.rendering.plan_file import plan_text
from tuneyard.rendering.storage import Storage, storage

Object = dict[str, Any]

DEFAULT_IMAGE = f"tuneyard-trainer:{__version__}"
RAY_VERSION = "2.60.0"
PLAN_FOLDER = "/etc/tuneyard"
PLAN_FILE = f"{PLAN_FOLDER}/plan.json"
TOKEN_FOLDER = "/var/run/secrets/tuneyard"  # noqa: S105  a folder, not a secret
TOKEN_SECONDS = 3600
"""Lifetime of the token; the kubelet renews it at 80%."""
TTL_SECONDS = 60
"""How long the cluster of a finished RayJob stays, for the operator to read its state."""
DASHBOARD_PORT = 8265
"""Port of Ray's dashboard and job API on the head."""
_KUBERAY = {"app.kubernetes.io/component": "kuberay-operator"}
"""The label of KubeRay's operator in its Helm chart and in its kustomize manifests."""
OBJECT_STORE_BYTES = 256 << 20
"""Size of Ray's object store, which batches never pass through. The default, 30% of memory, would
not fit into /dev/shm, and Ray would then use the disk."""
ERASE_SECONDS = 1800
"""Limit of the erasure of an output, from the creation of its Job. Deleting a million objects takes
minutes; a pod that no node takes would wait without end."""
ERASE_TTL_SECONDS = 3600
"""How long a finished erasure stays, for the operator to read its state."""
SMALL_TMP = "10Gi"
"""Limit on /tmp in pods that hold neither a model nor data: Ray's logs, and records of the output.
Without a limit, a pod could fill its node's disk, and the kubelet would evict other pods too."""
CPU_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""For workers without a GPU: the C library gives tensors of over 1 MiB back to the system when they
are freed. By default it keeps up to a third of the peak for later (LoRA: 3.5 in place of 2.4 GiB),
for which a pod is killed. The page faults make training about 12% slower (2 cores, glibc 2.36)."""
USER = 1000
"""The pods' user and group; volumes are made writable for it."""

_FOREIGN_LABELS = (
    "app.kubernetes.io/",
    "argocd.argoproj.io/",
    "helm.sh/",
    "kueue.x-k8s.io/",
    "ray.io/",
    f"{GROUP}/",
)
"""Prefixes of labels that other controllers act on. Labels with these prefixes are not copied; the
RayJob gets Kueue's labels, and so does the Job that prepares the data if it has a queue."""


class Reporting(NamedTuple):
    """The status server that the head pod of an attempt posts progress to."""

    url: str
    """The operator's status server, without a path."""
    ca: str
    """The authorities of the server's certificate, in PEM; they are public."""


class Rendered(NamedTuple):
    """The objects of one attempt, in the order in which they are created."""

    config_map: Object
    """Named by its content, so that attempts with one plan share it."""
    network_policy: Object
    """Named by the job: all attempts share it."""
    ray_job: Object
    """`<job>-<attempt>`."""


def render(
    plan: Plan,
    job: FineTuneJob | AlignmentJob,
    *,
    attempt: int,
    image: str = DEFAULT_IMAGE,
    reporting: Reporting | None = None,
    reduced_to: int | None = None,
) -> Rendered:
    """Return the objects of an attempt of a plan that `placement.placed` returned. `reporting`
    None: no progress is posted. `reduced_to`: the workers of an elastic attempt that cannot have
    all."""
    compute, policy = plan.compute, job.spec.run_policy
    config_map = _config_map(plan, job)
    mount = _plan_mount(config_map["metadata"]["name"])
    pods = _Pods(
        image=compute.image or image,
        labels=_labels(job, attempt),
        priority_class=compute.priority_class,
    )
    store, group = storage(plan), workers(compute)
    token, env = _reporting(job, reporting)
    if reduced_to is not None:
        group = group._replace(num_workers=reduced_to)
        env = [*env, {"name": WORKERS_VARIABLE, "value": str(reduced_to)}]
    head = _head(pods, store, [mount, *token], env)
    spec = {
        "submissionMode": "K8sJobMode",
        "entrypoint": " ".join(_driver(job, attempt)),
        "entrypointNumCpus": 0,
        "backoffLimit": 0,
        # The submitter must not start the driver again on the replacement of a lost head.
        "submitterConfig": {"backoffLimit": 0},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": TTL_SECONDS,
        "preRunningDeadlineSeconds": policy.start_deadline_seconds,
        "submitterPodTemplate": _submitter(pods),
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            # KubeRay creates the token's Secret and gives it to the head, workers and submitter.
            "authOptions": {"mode": "token"},
            "headGroupSpec": head,
            "workerGroupSpecs": [_worker_group(pods, store, group, compute)],
        },
    }
    return Rendered(config_map, _network_policy(job), _ray_job(plan, job, attempt, spec))


def render_preparation(
    plan: Plan,
    job: FineTuneJob | AlignmentJob,
    *,
    attempt: int,
    image: str = DEFAULT_IMAGE,
    reporting: Reporting | None = None,
) -> Object:
    """Return the Job whose pod runs the leading stages of an attempt, which need no GPU, before the
    attempt's RayJob exists. `reporting` None: no progress is posted.

    Its pod has the CPUs and the memory of a worker. Like the head it is not bound to the workers'
    nodes, which have the GPUs.
    """
    compute, policy = plan.compute, job.spec.run_policy
    labels = {**_labels(job, attempt), ROLE_LABEL: PREPARE_ROLE}
    store, group = storage(plan), workers(compute)
    token, env = _reporting(job, reporting)
    container = {
        "name": PREPARE_ROLE,
        "command": [*_driver(job, attempt), PREPARE_OPTION],
        "lifecycle": _drain_hook(),
        # The end of the log holds the outcome, in case that no post reached the operator.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": _guaranteed_resources({"cpu": group.cpus, "memory": group.memory}),
        "env": [
            *_environment(),
            *_variables(CPU_ENVIRONMENT),
            *_secret_env(store.tokens | store.tracker_tokens),
            *env,
        ],
        "envFrom": _env_from(store.credentials),
    }
    mounts = [
        _plan_mount(config_map_name(plan.job.name, plan_digest(plan))),
        *token,
        _shared_memory(group.shared_memory),
        *_claims(store.claims | store.tracker_claims),
    ]
    pods = _Pods(compute.image or image, labels, compute.priority_class)
    template = _template(pods, container, mounts, tmp=group.temporary_storage)
    metadata = _metadata(job, prepare_job_name(job.kind, plan.job.name, attempt), labels)
    if policy.prepare_queue:
        metadata["labels"] |= _queue_labels(policy.prepare_queue, workload_priority(job))
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        # The operator retries, not this Job: a pod that is lost ends the attempt.
        "spec": {"backoffLimit": 0, "template": template},
    }


def render_erasure(
    plan: Plan, job: FineTuneJob | AlignmentJob, *, image: str = DEFAULT_IMAGE
) -> Object:
    """Return the Job that removes a deleted job's output. Its pod gets only the plan and the
    output."""
    store, labels = storage(plan), _labels(job, attempt=None)
    mount = _plan_mount(config_map_name(plan.job.name, plan_digest(plan)))
    container = {
        "name": "erase",
        "command": [*_MODULE, "tuneyard_trainer.erase", "--plan", PLAN_FILE],
        "args": ["--job-uid", job.metadata.uid or ""],
        "resources": _small_resources("100m", "500m", "1Gi"),
        "env": _environment(),
        "envFrom": _env_from(store.output_credentials),
    }
    pods = _Pods(image=plan.compute.image or image, labels=labels, priority_class=None)
    template = _template(pods, container, [mount, *_claims(store.output_claims)])
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, erasure_name(job), labels),
        "spec": {
            "backoffLimit": 3,
            "activeDeadlineSeconds": ERASE_SECONDS,
            "ttlSecondsAfterFinished": ERASE_TTL_SECONDS,
            "template": template,
        },
    }


# ---- objects ----------------------------------------------------------------------------------

_MODULE = ("python", "-m")


def _driver(job: FineTuneJob | AlignmentJob, attempt: int) -> list[str]:
    """Return the command of an attempt's driver."""
    command = [*_MODULE, "tuneyard_trainer", "--plan", PLAN_FILE, "--attempt", str(attempt)]
    return [*command, "--job-uid", job.metadata.uid] if job.metadata.uid else command


def _plan_mount(config_map: str) -> _Mount:
    return _Mount("plan", PLAN_FOLDER, {"configMap": {"name": config_map}})


def _config_map(plan: Plan, job: FineTuneJob | AlignmentJob) -> Object:
    name = config_map_name(plan.job.name, plan_digest(plan))
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, name, _labels(job, attempt=None)),
        "immutable": True,
        "data": {"plan.json": plan_text(plan)},
    }


def _ray_job(plan: Plan, job: FineTuneJob | AlignmentJob, attempt: int, spec: Object) -> Object:
    labels = _labels(job, attempt) | _queue_labels(queue(job), workload_priority(job))
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(job, ray_job_name(job.kind, plan.job.name, attempt), labels),
        "spec": spec,
    }


def _network_policy(job: FineTuneJob | AlignmentJob) -> Object:
    """Return the policy that only pods of the same job reach the job's pods. KubeRay's operator
    asks the dashboard for the state of the Ray job."""
    labels = _labels(job, attempt=None)
    pods = {"matchLabels": {key: labels[key] for key in (f"{GROUP}/kind", f"{GROUP}/job")}}
    kuberay = {"namespaceSelector": {}, "podSelector": {"matchLabels": dict(_KUBERAY)}}
    dashboard = {"port": DASHBOARD_PORT, "protocol": "TCP"}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, network_policy_name(job.kind, job.metadata.name), labels),
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": copy.deepcopy(pods)}]},
                {"from": [kuberay], "ports": [dashboard]},
            ],
        },
    }


def _metadata(job: FineTuneJob | AlignmentJob, name: str, labels: Mapping[str, str]) -> Object:
    metadata: Object = {"name": name, "labels": dict(labels)}
    if job.metadata.namespace:
        metadata["namespace"] = job.metadata.namespace
    if job.metadata.uid:
        owner = {
            "apiVersion": job.api_version,
            "kind": job.kind,
            "name": job.metadata.name,
            "uid": job.metadata.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
        metadata["ownerReferences"] = [owner]
    return metadata


def _labels(job: FineTuneJob | AlignmentJob, attempt: int | None) -> dict[str, str]:
    """Return the user's and the operator's labels. `attempt` None: attempts share the object."""
    labels = {
        key: value
        for key, value in sorted(job.metadata.labels.items())
        if not key.startswith(_FOREIGN_LABELS)
    }
    labels["app.kubernetes.io/managed-by"] = "tuneyard"
    labels[f"{GROUP}/kind"] = job.kind
    labels[f"{GROUP}/job"] = job.metadata.name
    if job.metadata.uid:
        labels[UID_LABEL] = job.metadata.uid
    if attempt is not None:
        labels[f"{GROUP}/attempt"] = str(attempt)
    return labels


def _queue_labels(queue: str | None, priority: str | None) -> dict[str, str]:
    """Return Kueue's labels of an object. None: the object gets no such label."""
    labels = {QUEUE_LABEL: queue, PRIORITY_LABEL: priority}
    return {key: value for key, value in labels.items() if value}


# ---- pods -------------------------------------------------------------------------------------


class _Mount(NamedTuple):
    """A volume and its mount path."""

    name: str
    path: str
    source: Object
    read_only: bool = True


class _Pods(NamedTuple):
    """The settings that all pods of an attempt share."""

    image: str
    labels: dict[str, str]
    priority_class: str | None


def _head(pods: _Pods, store: Storage, mounts: Iterable[_Mount], env: list[Object]) -> Object:
    container = {
        "name": "ray-head",
        "lifecycle": _drain_hook(),
        "resources": _small_resources("250m", "1", "4Gi"),
        "env": [*_environment(), *_secret_env(store.tracker_tokens), *env],
        "envFrom": _env_from(store.output_credentials),
    }
    mounts = [_shared_memory("512Mi"), *mounts]
    mounts += _claims(store.output_claims | store.tracker_claims)
    return {
        "rayStartParams": {
            "dashboard-host": "0.0.0.0",  # noqa: S104  the submitter's pod reaches it
            "num-cpus": "0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "template": _template(pods, container, mounts),
    }


def _worker_group(pods: _Pods, store: Storage, group: Workers, compute: Compute) -> Object:
    resources = {"cpu": group.cpus, "memory": group.memory}
    start = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    if group.gpus:
        # Ray counts nvidia.com/gpu by default, but not the resource of a MIG slice.
        resources[group.gpu_resource] = start["num-gpus"] = str(group.gpus)
    computing = [] if group.gpus else _variables(CPU_ENVIRONMENT)
    container = {
        "name": "ray-worker",
        "lifecycle": _drain_hook(),
        "resources": _guaranteed_resources(resources),
        "env": [*_environment(), *computing, *_secret_env(store.tokens)],
        "envFrom": _env_from(store.credentials),
    }
    mounts = [_shared_memory(group.shared_memory), *_claims(store.claims)]
    template = _template(pods, container, mounts, tmp=group.temporary_storage)
    # KubeRay's init container is a shell. As the pod's first process it would ignore SIGTERM for
    # the whole grace period: after the loss of a worker, the next attempt waited until the
    # replacement worker ended.
    template["spec"]["shareProcessNamespace"] = True
    template["spec"] |= _placement(compute)
    return {
        "groupName": "workers",
        "replicas": group.num_workers,
        "minReplicas": group.min_workers,
        "maxReplicas": group.num_workers,
        "rayStartParams": start,
        "template": template,
    }


def _submitter(pods: _Pods) -> Object:
    container = {
        "name": "ray-job-submitter",
        "resources": _small_resources("100m", "500m", "1Gi"),
        "env": _environment(),
        "envFrom": [],
    }
    return _template(pods, container, [])


def _template(
    pods: _Pods, container: Object, mounts: Iterable[_Mount], *, tmp: str = SMALL_TMP
) -> Object:
    """Return a pod template that satisfies the restricted Pod Security Standard. Its root file
    system is read-only; /tmp is writable. `tmp`: the limit on its size."""
    source = {"emptyDir": {"sizeLimit": tmp}}
    mounts = [_Mount("tmp", "/tmp", source, read_only=False), *mounts]  # noqa: S108  the pod's own
    container = {
        "image": pods.image,
        **{key: value for key, value in container.items() if value},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [_volume_mount(mount) for mount in mounts],
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": mount.name, **mount.source} for mount in mounts],
    }
    if pods.priority_class:
        spec["priorityClassName"] = pods.priority_class
    return {"metadata": {"labels": dict(pods.labels)}, "spec": spec}


def _volume_mount(mount: _Mount) -> Object:
    value: Object = {"name": mount.name, "mountPath": mount.path}
    return {**value, "readOnly": True} if mount.read_only else value


def _guaranteed_resources(resources: Mapping[str, str]) -> Object:
    """Return requests equal to limits, so that the pod is among the last to be evicted."""
    return {"requests": dict(resources), "limits": dict(resources)}


def _drain_hook() -> Object:
    """Return a preStop hook. The hook runs before SIGTERM, which makes `ray start` end the driver
    or the worker at once."""
    return {"preStop": {"exec": {"command": [*_MODULE, "tuneyard_trainer.drain"]}}}


def _small_resources(cpu: str, cpu_limit: str, memory: str) -> Object:
    """Return the resources of a container that mostly waits."""
    return {
        "requests": {"cpu": cpu, "memory": memory},
        "limits": {"cpu": cpu_limit, "memory": memory},
    }


def _placement(compute: Compute) -> Object:
    placement: Object = {}
    if compute.node_selector:
        placement["nodeSelector"] = dict(sorted(compute.node_selector.items()))
    if compute.tolerations:
        placement["tolerations"] = [
            toleration.model_dump(mode="json", by_alias=True, exclude_none=True)
            for toleration in compute.tolerations
        ]
    return placement


# ---- volumes and environment ------------------------------------------------------------------


def _shared_memory(size: str) -> _Mount:
    source = {"emptyDir": {"medium": "Memory", "sizeLimit": size}}
    return _Mount("shared-memory", "/dev/shm", source, read_only=False)  # noqa: S108


def _claims(claims: Mapping[str, bool]) -> list[_Mount]:
    """Return the mount of each claim. The value of a claim is whether it is written to."""
    return [
        _Mount(
            f"pvc-{index}",
            f"{CLAIMS_FOLDER}/{claim}",
            {"persistentVolumeClaim": {"claimName": claim, "readOnly": not writable}},
            read_only=not writable,
        )
        for index, (claim, writable) in enumerate(claims.items())
    ]


def _reporting(
    job: FineTuneJob | AlignmentJob, reporting: Reporting | None
) -> tuple[list[_Mount], list[Object]]:
    """Return the mounts and variables for posting progress: the token, the URL and the
    authority."""
    if reporting is None:
        return [], []
    namespace = job.metadata.namespace or "default"
    token = {
        "audience": audience(job.kind, namespace, job.metadata.name),
        "expirationSeconds": TOKEN_SECONDS,
        "path": "token",
    }
    source = {"projected": {"sources": [{"serviceAccountToken": token}]}}
    path = progress_path(job.kind, namespace, job.metadata.name)
    env = [
        {"name": PROGRESS_URL_VARIABLE, "value": f"{reporting.url.rstrip('/')}{path}"},
        {"name": TOKEN_FILE_VARIABLE, "value": f"{TOKEN_FOLDER}/token"},
        {"name": CA_VARIABLE, "value": reporting.ca},
    ]
    return [_Mount("token", TOKEN_FOLDER, source)], env


def _environment() -> list[Object]:
    values = {
        # HOME and USER replace a home folder and an entry in /etc/passwd.
        "HOME": "/tmp",  # noqa: S108
        "USER": "tuneyard",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default, 15, yields to any other process.
        "RAY_worker_niceness": "0",
        # After the preStop hook nothing is left to wait for. Ray's default, 30 s, exceeds the rest
        # of the grace period.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    return _variables(values)


def _variables(values: Mapping[str, str]) -> list[Object]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _secret_env(tokens: Mapping[str, SecretKeyRef]) -> list[Object]:
    return [
        {
            "name": variable,
            "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}},
        }
        for variable, secret in tokens.items()
    ]


def _env_from(secrets: Iterable[str]) -> list[Object]:
    return [{"secretRef": {"name": name}} for name in secrets]
