"""A minimal kopf operator with kopf's default settings, the baseline of operator_burst.py.

One handler creates a RayJob for each new job; another writes the job's status when the RayJob
changes. The operator has no validation, no planning, no fencing, and no retries beyond kopf's own.
"""

from __future__ import annotations

from typing import Any

import kopf
from kubernetes.aio import client, config

JOBS: Any = ("tuneyard.io", "v1alpha1", "finetunejobs")
RAYJOBS: Any = ("ray.io", "v1", "rayjobs")
LABEL = "tuneyard.io/job"


def _is_new(spec: kopf.Spec, status: kopf.Status, **_: Any) -> bool:
    return "phase" not in status and not spec.get("runPolicy", {}).get("suspend")


@kopf.on.startup()
async def connect(memo: Any, **_: Any) -> None:
    await config.load_kube_config()  # type: ignore[no-untyped-call]
    memo.api = client.CustomObjectsApi()


@kopf.on.create(*JOBS, when=_is_new)
async def create_rayjob(
    name: str, namespace: str | None, body: kopf.Body, memo: Any, **_: Any
) -> None:
    rayjob = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": f"{name}-1", "labels": {LABEL: name}},
        "spec": {
            "entrypoint": "python -m tuneyard_trainer",
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "headGroupSpec": {"rayStartParams": {}, "template": _pod("head")},
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": 1,
                        "rayStartParams": {},
                        "template": _pod("worker"),
                    }
                ],
            },
        },
    }
    kopf.append_owner_reference(rayjob, owner=body)
    group, version, plural = RAYJOBS
    await memo.api.create_namespaced_custom_object(group, version, namespace, plural, rayjob)


@kopf.on.event(*RAYJOBS, labels={LABEL: kopf.PRESENT})
async def write_status(
    type: str,  # noqa: A002  kopf passes this name
    namespace: str | None,
    labels: kopf.Labels,
    status: kopf.Status,
    memo: Any,
    **_: Any,
) -> None:
    if type == "DELETED":
        return
    phase = "Running" if status.get("jobStatus") == "RUNNING" else "Pending"
    group, version, plural = JOBS
    await memo.api.patch_namespaced_custom_object_status(
        group, version, namespace, plural, labels[LABEL], {"status": {"phase": phase}}
    )


def _pod(name: str) -> dict[str, Any]:
    container = {
        "name": name,
        "image": "tuneyard-trainer",
        "resources": {"limits": {"cpu": "1", "memory": "4Gi"}},
    }
    return {"spec": {"containers": [container]}}
