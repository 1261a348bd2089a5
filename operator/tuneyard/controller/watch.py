"""kopf's watches, feeding the work queue. Handlers do nothing but remember and enqueue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf

from tuneyard.api.meta import GROUP, VERSION
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.world import Object, key_of_job, key_of_part, key_of_ray_job

LIST_CHUNK = 250
"""Objects per page of a first listing: a page of jobs is about 2 MB of JSON."""


def registry(reconciler: Reconciler) -> kopf.OperatorRegistry:
    """Everything that is watched."""
    handlers = kopf.OperatorRegistry()
    world, queue = reconciler.world, reconciler.queue

    @kopf.on.login(registry=handlers)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        in_cluster: kopf.ConnectionInfo | None = kopf.login_with_service_account(**arguments)
        return in_cluster or kopf.login_with_kubeconfig(**arguments)

    @_on_each(("finetunejobs", "alignmentjobs"), handlers)
    def job_seen(body: Object, *, deleted: bool) -> None:
        key = key_of_job(body)
        if deleted:
            world.forget(key)
            queue.forget(key)
        elif _is_idle(body):
            world.rest(key)
            world.count_phase(key, body["status"]["phase"])
            _plan_deletion(reconciler, body)
        else:
            world.see_job(key, body)
            queue.add(key)

    @kopf.on.event("ray.io", "v1", "rayjobs", registry=handlers)
    async def ray_job_seen(event: Any, **_: Any) -> None:
        body: Object = event["object"]
        if key := key_of_part(body):
            world.see_ray_job(key, body, deleted=event["type"] == "DELETED")
            queue.add(key)

    @kopf.on.event("v1", "pods", registry=handlers)
    async def pod_seen(event: Any, **_: Any) -> None:
        body: Object = event["object"]
        if key := key_of_part(body):
            world.see_pod(key, body, deleted=event["type"] == "DELETED")
            queue.add(key)

    @kopf.on.event("kueue.x-k8s.io", "workloads", registry=handlers)
    async def workload_seen(event: Any, **_: Any) -> None:
        body: Object = event["object"]
        for owner in body["metadata"].get("ownerReferences") or ():
            key = key_of_ray_job(body["metadata"]["namespace"], owner["name"])
            if owner.get("kind") == "RayJob" and key in world.entries:
                deleted = event["type"] == "DELETED"
                world.see_workload(key, owner["name"], body, deleted=deleted)
                queue.add(key)

    return handlers


def settings() -> kopf.OperatorSettings:
    """kopf as a watcher only: it writes nothing."""
    result = kopf.OperatorSettings()
    result.posting.enabled = False
    result.peering.standalone = True
    result.watching.chunk_size = LIST_CHUNK
    result.queueing.idle_timeout = 0.5
    ours = f"{GROUP}/job"
    result.watching.label_selectors["pods"] = ours
    result.watching.label_selectors["rayjobs"] = ours
    return result


def _on_each(
    plurals: tuple[str, ...], handlers: kopf.OperatorRegistry
) -> Callable[[Callable[..., None]], None]:
    """Subscribes a function to the events of our own kinds."""

    def subscribe(function: Callable[..., None]) -> None:
        for plural in plurals:

            @kopf.on.event(GROUP, VERSION, plural, registry=handlers, id=f"{plural}-seen")
            async def handler(event: Any, **_: Any) -> None:
                function(event["object"], deleted=event["type"] == "DELETED")

    return subscribe


def _is_idle(body: Object) -> bool:
    """Whether nothing can be left to do for a job, as far as its own text says."""
    status = body.get("status") or {}
    ended = status.get("phase") in ("Succeeded", "Failed") and "planDigest" in status
    return ended and "deletionTimestamp" not in body["metadata"]


def _plan_deletion(reconciler: Reconciler, body: Object) -> None:
    """Wakes a finished job at the end of its time to live."""
    policy = body["spec"].get("runPolicy") or {}
    if policy.get("ttlSecondsAfterFinished") is not None:
        reconciler.queue.add(key_of_job(body))
