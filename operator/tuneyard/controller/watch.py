"""kopf's watches, feeding the work queue. Handlers do nothing but remember and enqueue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf

from tuneyard.api.meta import GROUP, VERSION
from tuneyard.controller.job_cache import Object, key_of_job, key_of_part, key_of_ray_job
from tuneyard.controller.reconciler import Reconciler

LIST_CHUNK = 250
"""Objects per page of a first listing: a page of jobs is about 2 MB of JSON."""


def registry(reconciler: Reconciler) -> kopf.OperatorRegistry:
    """Everything that is watched."""
    handlers, watches = kopf.OperatorRegistry(), _Watches(reconciler)
    kopf.on.login(registry=handlers)(_login)
    for plural in ("finetunejobs", "alignmentjobs"):
        _on_event(handlers, watches.job, GROUP, VERSION, plural)
    _on_event(handlers, watches.ray_job, "ray.io", "v1", "rayjobs")
    _on_event(handlers, watches.pod, "v1", "pods")
    _on_event(handlers, watches.workload, "kueue.x-k8s.io", "workloads")
    return handlers


def _login(**arguments: Any) -> kopf.ConnectionInfo | None:
    in_cluster: kopf.ConnectionInfo | None = kopf.login_with_service_account(**arguments)
    return in_cluster or kopf.login_with_kubeconfig(**arguments)


def _on_event(
    handlers: kopf.OperatorRegistry, see: Callable[[Object, bool], None], *resource: str
) -> None:
    """Subscribes a function of an object, and whether it was deleted."""

    async def handler(event: Any, **_: Any) -> None:
        see(event["object"], event["type"] == "DELETED")

    kopf.on.event(*resource, registry=handlers, id=f"{resource[-1]}-seen")(handler)


class _Watches:
    """What each kind of object tells."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._world, self._queue = reconciler.world, reconciler.queue

    def job(self, body: Object, deleted: bool) -> None:
        key = key_of_job(body)
        if deleted:
            self._world.forget(key)
            self._queue.forget(key)
        elif _is_idle(body):
            self._world.rest(key)
            self._world.count_phase(key, body["status"]["phase"])
            if (body["spec"].get("runPolicy") or {}).get("ttlSecondsAfterFinished") is not None:
                self._queue.add(key)
        elif self._world.see_job(key, body):
            self._queue.add(key)

    def ray_job(self, body: Object, deleted: bool) -> None:
        key = key_of_part(body)
        if key and self._world.see_ray_job(key, body, deleted=deleted):
            self._queue.add(key)

    def pod(self, body: Object, deleted: bool) -> None:
        key = key_of_part(body)
        if key and self._world.see_pod(key, body, deleted=deleted):
            self._queue.add(key)

    def workload(self, body: Object, deleted: bool) -> None:
        for owner in body["metadata"].get("ownerReferences") or ():
            key = key_of_ray_job(body["metadata"]["namespace"], owner["name"])
            if owner.get("kind") == "RayJob" and key in self._world.entries:
                self._world.see_workload(key, owner["name"], body, deleted=deleted)
                self._queue.add(key)


class _NothingKept(kopf.DiffBaseStorage, kopf.ProgressStorage):
    """kopf remembers nothing on the objects: no handler of ours asks for a difference or has
    progress, and working them out took a sixth of the operator's time."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence


def settings(*, clusterwide: bool) -> kopf.OperatorSettings:
    """kopf as a watcher only: it writes nothing."""
    result = kopf.OperatorSettings()
    # Namespaces and definitions may be looked for with rights on the whole cluster only; kopf asks
    # for a minute before it takes no for an answer, and watches nothing meanwhile.
    result.scanning.disabled = not clusterwide
    result.posting.enabled = False
    result.peering.standalone = True
    result.watching.chunk_size = LIST_CHUNK
    result.queueing.idle_timeout = 0.5
    result.persistence.diffbase_storage = result.persistence.progress_storage = _NothingKept()
    ours = f"{GROUP}/job"
    result.watching.label_selectors["pods"] = ours
    result.watching.label_selectors["rayjobs"] = ours
    return result


def _is_idle(body: Object) -> bool:
    """Whether nothing can be left to do for a job, as far as its own text says."""
    status = body.get("status") or {}
    ended = status.get("phase") in ("Succeeded", "Failed") and "planDigest" in status
    return ended and "deletionTimestamp" not in body["metadata"]
