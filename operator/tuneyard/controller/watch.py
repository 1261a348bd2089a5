"""kopf's watches. A handler stores the object in the cache and adds the job to the work queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf

from tuneyard.api.meta import GROUP, VERSION
from tuneyard.controller.cluster import SELECTORS, Key, has_finalizer, needs_finalizer
from tuneyard.controller.job_cache import Object, key_from_labels, key_of_job, key_of_owner
from tuneyard.controller.reconciler import Reconciler

LIST_CHUNK = 250
"""Objects per page of a first listing: a page of jobs is about 2 MB of JSON."""
UNKNOWN_SECONDS = 5.0
"""How long a RayJob, a Job or a pod waits for the watch of jobs to report its job: after a start,
the watches report thousands of objects in any order."""


def registry(reconciler: Reconciler) -> kopf.OperatorRegistry:
    """Return kopf's registry with a handler for each watched resource."""
    handlers, watches = kopf.OperatorRegistry(), Watches(reconciler)
    kopf.on.login(registry=handlers)(_login)
    for plural in ("finetunejobs", "alignmentjobs"):
        _on_event(handlers, watches.job, GROUP, VERSION, plural)
    _on_event(handlers, watches.ray_job, "ray.io", "v1", "rayjobs")
    _on_event(handlers, watches.preparation, "batch", "v1", "jobs")
    _on_event(handlers, watches.pod, "v1", "pods")
    _on_event(handlers, watches.workload, "kueue.x-k8s.io", "workloads")
    return handlers


def _login(**arguments: Any) -> kopf.ConnectionInfo | None:
    in_cluster: kopf.ConnectionInfo | None = kopf.login_with_service_account(**arguments)
    return in_cluster or kopf.login_with_kubeconfig(**arguments)


def _on_event(
    handlers: kopf.OperatorRegistry, on_event: Callable[[Object, bool], None], *resource: str
) -> None:
    """Call `on_event` with each object of a resource and with whether it was deleted."""

    async def handler(event: Any, **_: Any) -> None:
        on_event(event["object"], event["type"] == "DELETED")

    kopf.on.event(*resource, registry=handlers, id=f"{resource[-1]}-event")(handler)


class Watches:
    """The handlers, one for each kind of object."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._cache, self._queue = reconciler.cache, reconciler.queue

    def job(self, body: Object, deleted: bool) -> None:
        key = key_of_job(body)
        if deleted:
            if self._cache.forget(key, body["metadata"]["uid"]):
                self._queue.forget(key)
            if key in self._cache.jobs:  # its objects are still to be removed
                self._queue.add(key)
        elif _is_idle(body):
            self._cache.evict(key)
            policy = body["spec"].get("runPolicy") or {}
            expires = policy.get("ttlSecondsAfterFinished") is not None
            if expires or key in self._cache.jobs:  # or objects of the job still exist
                self._cache.update_job(key, body)
            self._cache.count_phase(key, body["status"]["phase"])
            if expires:
                self._queue.add(key)
        elif self._cache.update_job(key, body):
            self._queue.add(key)

    def ray_job(self, body: Object, deleted: bool) -> None:
        key = key_from_labels(body)
        if key and self._cache.update_ray_job(key, body, deleted=deleted):
            self._add(key)

    def preparation(self, body: Object, deleted: bool) -> None:
        key = key_from_labels(body)
        if key and self._cache.update_preparation(key, body, deleted=deleted):
            self._add(key)

    def pod(self, body: Object, deleted: bool) -> None:
        key = key_from_labels(body)
        if key and self._cache.update_pod(key, body, deleted=deleted):
            self._add(key)

    def _add(self, key: Key) -> None:
        """Add a job whose object has changed. A job that no watch has reported yet is read from the
        API server, unless its watch reports it within UNKNOWN_SECONDS."""
        self._queue.add_after(key, 0.0 if self._cache.job(key).uid else UNKNOWN_SECONDS)

    def workload(self, body: Object, deleted: bool) -> None:
        for owner in body["metadata"].get("ownerReferences") or ():
            namespace = body["metadata"]["namespace"]
            key = key_of_owner(namespace, owner.get("kind") or "", owner["name"])
            if key is not None and key in self._cache.jobs:
                self._cache.update_workload(key, owner["uid"], body, deleted=deleted)
                self._queue.add(key)


class _NothingKept(kopf.DiffBaseStorage, kopf.ProgressStorage):
    """Keep kopf from storing state on the objects. No handler here needs a difference or progress,
    and computing them took a sixth of the operator's time."""

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
    """Return settings that let kopf watch and never write."""
    result = kopf.OperatorSettings()
    # Scanning namespaces and CRDs needs permissions for the whole cluster. Without them kopf
    # retries for a minute and watches nothing meanwhile.
    result.scanning.disabled = not clusterwide
    result.posting.enabled = False
    result.peering.standalone = True
    result.watching.chunk_size = LIST_CHUNK
    result.queueing.idle_timeout = 0.5
    result.persistence.diffbase_storage = result.persistence.progress_storage = _NothingKept()
    for plural, selector in SELECTORS.items():
        result.watching.label_selectors[plural] = selector
    return result


def _is_idle(body: Object) -> bool:
    """Return whether a job's own content shows that no work is left for it."""
    status = body.get("status") or {}
    ended = status.get("phase") in ("Succeeded", "Failed") and "planDigest" in status
    is_needless = has_finalizer(body) and not needs_finalizer(body)  # set by 0.2
    return ended and not is_needless and "deletionTimestamp" not in body["metadata"]
