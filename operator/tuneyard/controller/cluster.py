"""The operator's requests to Kubernetes, apart from kopf's watches.

Objects are plain JSON: parsing them into the client's models costs more than all other work here.
No request is retried: the work queue retries whole decisions.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import getproxies

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from tuneyard.api.meta import FINALIZER, GROUP, VERSION
from tuneyard.controller import metrics
from tuneyard.errors import TuneyardError
from tuneyard.rendering.names import PREPARE_ROLE, ROLE_LABEL

Object = dict[str, Any]

MANAGER = "tuneyard"
"""The operator's name as a field manager and as the source of events."""
REQUEST_SECONDS = 30.0

_LEASES = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"
_MERGE = "application/merge-patch+json"
_APPLY = "application/apply-patch+yaml"
_METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
LIST_CHUNK = 500
"""Objects per page of a list of metadata."""
WATCHED_OBJECTS = {"rayjobs": "/apis/ray.io/v1", "jobs": "/apis/batch/v1", "pods": "/api/v1"}
"""The API of each kind of object that belongs to a job and is watched, by its plural."""
SELECTORS = {
    "rayjobs": f"{GROUP}/job",
    "jobs": f"{GROUP}/job,{ROLE_LABEL}={PREPARE_ROLE}",
    "pods": f"{GROUP}/job",
}
"""The label selectors of these objects: of Jobs (batch), only those that prepare data."""
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


@dataclass
class ApiError(TuneyardError):
    """A request that the API server refused or did not answer."""

    code: int
    """HTTP status; 0: no response."""
    reason: str
    """Kubernetes' reason."""
    message: str
    retry_after: float | None = None
    """Seconds in the Retry-After header; None: the response has none."""

    def __str__(self) -> str:
        return f"{self.code} {self.reason}: {self.message}"

    @property
    def is_refusal(self) -> bool:
        """Whether the same request would be refused again; any other error may be retried."""
        return self.code in (400, 403, 404, 405, 413, 422)


@dataclass(frozen=True)
class Key:
    """The identity of a job."""

    kind: str
    """FineTuneJob or AlignmentJob."""
    namespace: str
    name: str

    @property
    def path(self) -> str:
        plural = f"{self.kind.lower()}s"
        return f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{plural}/{quote(self.name)}"

    @property
    def selector(self) -> str:
        """The label selector of the job's objects."""
        return f"{GROUP}/kind={self.kind},{GROUP}/job={self.name}"


async def connect() -> Cluster:
    """Connect with the pod's service account or, outside a pod, the kubeconfig. Raises
    TuneyardError."""
    configuration = Configuration()
    try:
        config.load_incluster_config(configuration)
    except config.ConfigException:
        try:
            await config.load_kube_config(client_configuration=configuration)
        except config.ConfigException as error:
            message = (
                "there is no cluster: this process does not run in a pod, and the kubeconfig "
                f"cannot be used: {error}"
            )
            raise TuneyardError(message) from error
    configuration.connection_pool_maxsize = 64
    # Otherwise aiohttp reads ~/.netrc and searches proxies for each request: 1/8 of the run time.
    configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
    return Cluster(ApiClient(configuration))


class Cluster:
    """The operator's requests. Every method raises ApiError."""

    def __init__(self, api: ApiClient) -> None:
        self.api = api

    async def close(self) -> None:
        await self.api.close()

    # ---- jobs -------------------------------------------------------------------------------

    async def job(self, key: Key) -> Object | None:
        """Return the job; None: it does not exist."""
        found = await self._find(key.path)
        return found and without_managed_fields(found)

    async def jobs(self, kind: str, namespace: str | None) -> set[Key]:
        """Return all jobs of a kind in a namespace. None: in all namespaces."""
        scope = f"/namespaces/{namespace}" if namespace else ""
        path = f"/apis/{GROUP}/{VERSION}{scope}/{kind.lower()}s"
        found = set[Key]()
        async for item in self._each_listed(path, {}):
            found.add(Key(kind, item["metadata"]["namespace"], item["metadata"]["name"]))
        return found

    async def add_finalizer(self, job: Object, key: Key) -> Object:
        """Add the operator's finalizer; return the job with it."""
        return await self._set_finalizers(job, key, [*_finalizers(job), FINALIZER])

    async def remove_finalizer(self, job: Object, key: Key) -> Object:
        """Remove the operator's finalizer; return the job without it."""
        others = [name for name in _finalizers(job) if name != FINALIZER]
        return await self._set_finalizers(job, key, others)

    async def _set_finalizers(self, job: Object, key: Key, names: Sequence[str]) -> Object:
        metadata = {"finalizers": names, "resourceVersion": job["metadata"]["resourceVersion"]}
        return await self._patch(key.path, job, {"metadata": metadata})

    async def write_status(self, job: Object, key: Key, patch: Object, status: Object) -> Object:
        """Merge `patch` into the status; return the job with `status`, the result of the merge.
        Raises ApiError 409 if the job has changed since."""
        version = {"resourceVersion": job["metadata"]["resourceVersion"]}
        body = {"metadata": version, "status": patch}
        return {**await self._patch(f"{key.path}/status", job, body), "status": status}

    async def _patch(self, path: str, job: Object, patch: Object) -> Object:
        """Patch the job; return it with the metadata in the response. A response with the whole job
        would be ten times as long."""
        response = await self._call("PATCH", path, patch, type_=_MERGE, accept=_METADATA)
        return {**job, **without_managed_fields({"metadata": response["metadata"]})}

    async def delete_job(self, job: Object, key: Key) -> None:
        """Delete this version of the job, if it exists. Raises ApiError 409 if it has changed."""
        metadata = job["metadata"]
        await self._delete(key.path, uid=metadata["uid"], version=metadata["resourceVersion"])

    # ---- the objects of a job -------------------------------------------------------------------

    async def list_objects(self, collection: str, namespace: str | None) -> AsyncIterator[Object]:
        """Yield the metadata of all jobs' RayJobs, Jobs or pods in a namespace, page by page.
        `namespace` None: in all namespaces."""
        scope = f"/namespaces/{namespace}" if namespace else ""
        path = f"{WATCHED_OBJECTS[collection]}{scope}/{collection}"
        try:
            async for item in self._each_listed(path, {"labelSelector": SELECTORS[collection]}):
                yield item
        except ApiError as error:
            # Without KubeRay there is no such kind; the others have no such excuse.
            if error.code != 404 or collection != "rayjobs":
                raise

    async def apply(self, item: Object) -> Object:
        """Create or update an object by server-side apply; return it with its metadata alone."""
        query = {"fieldManager": MANAGER, "force": "true"}
        path = _path_of(item)
        return await self._call("PATCH", path, item, query, type_=_APPLY, accept=_METADATA)

    async def create(self, item: Object) -> Object:
        """Create an object; return it with the metadata that it got. Raises ApiError 409 if the
        name is taken: an apply would make an object of a deleted job this job's own."""
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict"}
        path = _path_of(item).rpartition("/")[0]
        created = await self._call("POST", path, item, query, accept=_METADATA)
        return {**item, "metadata": created["metadata"]}  # its kind is PartialObjectMetadata

    async def ensure(self, item: Object, *, is_new: bool) -> None:
        """Create an object, or update the one that the same job created before.

        `is_new`: it most likely does not exist yet. An object of a deleted job of the same name is
        deleted first: the garbage collector may take long, and after an outage of the API server it
        may never notice. Raises ApiError 409 if the object is another client's. An apply would take
        it over, or be refused for good, because an object has one controller.
        """
        if is_new:
            try:
                await self.create(item)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
            else:
                return
        path = _path_of(item)
        found = await self._find(path)
        if found is not None and controller_of(found) != controller_of(item):
            if not await self._is_of_deleted_job(found, item):
                name = f"{item['kind']} {item['metadata']['name']}"
                message = f"{name} already exists and belongs to another owner"
                raise ApiError(409, "AlreadyExists", message)
            metadata = found["metadata"]
            await self._delete(path, uid=metadata["uid"], version=metadata["resourceVersion"])
            await self.create(item)
            return
        await self.apply(item)

    async def _is_of_deleted_job(self, found: Object, item: Object) -> bool:
        """Return whether an object belongs to a former job of the name that the job of `item` has.
        The job is read: a replica that has lost the Lease may take a new job for the former one."""
        former, owner = _controller(found), _controller(item)
        if former is None or owner is None:
            return False
        if len(found["metadata"]["ownerReferences"]) > 1:  # the collector would leave it, too
            return False
        named = ("apiVersion", "kind", "name")
        if any(former.get(field) != owner.get(field) for field in named):
            return False
        job = await self.job(Key(owner["kind"], item["metadata"]["namespace"], owner["name"]))
        return job is not None and job["metadata"]["uid"] == owner["uid"]

    async def ray_jobs(self, key: Key) -> list[Object]:
        path = f"/apis/ray.io/v1/namespaces/{key.namespace}/rayjobs"
        try:
            return await self._list(path, {"labelSelector": key.selector})
        except ApiError as error:
            if error.code == 404:  # KubeRay is not installed
                return []
            raise

    async def delete_ray_job(self, namespace: str, name: str, *, uid: str, version: str) -> bool:
        """Delete this version of a RayJob after all objects that it owns; return whether it
        existed. Raises ApiError 409 if it has changed, or is another RayJob of this name."""
        path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs/{name}"
        return await self._delete(path, uid=uid, version=version, propagation="Foreground")

    async def preparations(self, key: Key) -> list[Object]:
        path = f"/apis/batch/v1/namespaces/{key.namespace}/jobs"
        selector = f"{key.selector},{ROLE_LABEL}={PREPARE_ROLE}"
        return await self._list(path, {"labelSelector": selector})

    async def delete_preparation(
        self, namespace: str, name: str, *, uid: str, version: str
    ) -> bool:
        """Delete this version of a Job after its pods; return whether it existed. Raises ApiError
        409 if it has changed, or is another Job of this name."""
        path = f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}"
        return await self._delete(path, uid=uid, version=version, propagation="Foreground")

    async def pods(self, key: Key) -> list[Object]:
        path = f"/api/v1/namespaces/{key.namespace}/pods"
        return await self._list(path, {"labelSelector": key.selector})

    async def pod(self, namespace: str, name: str) -> Object | None:
        return await self._find(f"/api/v1/namespaces/{namespace}/pods/{quote(name)}")

    async def config_map(self, namespace: str, name: str) -> Object | None:
        return await self._find(f"/api/v1/namespaces/{namespace}/configmaps/{quote(name)}")

    async def batch_job(self, namespace: str, name: str) -> Object | None:
        return await self._find(f"/apis/batch/v1/namespaces/{namespace}/jobs/{quote(name)}")

    async def warnings(self, namespace: str, name: str) -> list[str]:
        """Return the messages of the warning events of a RayCluster or a Job."""
        fields = f"involvedObject.name={name},type=Warning"
        items = await self._list(
            f"/api/v1/namespaces/{namespace}/events", {"fieldSelector": fields, "limit": "20"}
        )
        return [item.get("message") or "" for item in items]

    # ---- the operator's own objects -------------------------------------------------------------

    async def post_event(self, namespace: str, event: Object) -> None:
        await self._call("POST", f"/api/v1/namespaces/{namespace}/events", event)

    async def review_token(self, token: str, audience: str) -> Object:
        """Review a token; return the status of the TokenReview."""
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        spec = {"token": token, "audiences": [audience]}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        reviewed: Object = (await self._call("POST", path, body)).get("status") or {}
        return reviewed

    async def secret(self, namespace: str, name: str) -> Object | None:
        return await self._find(f"/api/v1/namespaces/{namespace}/secrets/{name}")

    async def create_secret(self, namespace: str, secret: Object) -> Object:
        return await self._call("POST", f"/api/v1/namespaces/{namespace}/secrets", secret)

    async def replace_secret(self, namespace: str, secret: Object) -> Object:
        path = f"/api/v1/namespaces/{namespace}/secrets/{secret['metadata']['name']}"
        return await self._call("PUT", path, secret)

    async def lease(self, namespace: str, name: str) -> Object | None:
        return await self._find(f"{_LEASES.format(namespace)}/{name}")

    async def put_lease(self, namespace: str, name: str, lease: Object) -> Object:
        """Create the Lease or replace the given version of it. Raises ApiError 409 if the Lease has
        changed since."""
        path = _LEASES.format(namespace)
        if "resourceVersion" in lease["metadata"]:
            return await self._call("PUT", f"{path}/{name}", lease)
        return await self._call("POST", path, lease)

    # ---- requests -------------------------------------------------------------------------------

    async def _find(self, path: str) -> Object | None:
        """Return an object; None: the API server says that it does not exist. Another 404, of a
        proxy or of an API server that does not serve the kind yet, is an error."""
        try:
            return await self._call("GET", path)
        except ApiError as error:
            if error.code == 404 and error.reason == "NotFound":
                return None
            raise

    async def _each_listed(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Object]:
        """Yield the metadata of each object of a collection, page by page."""
        page_query = {**query, "limit": str(LIST_CHUNK)}
        while True:
            page = await self._call("GET", path, query=page_query, accept=_METADATA_LIST)
            for item in page.get("items") or []:
                yield item
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return
            page_query["continue"] = token

    async def _list(self, path: str, query: Mapping[str, str]) -> list[Object]:
        items: list[Object] = (await self._call("GET", path, query=query)).get("items") or []
        return items

    async def _delete(
        self, path: str, *, uid: str, version: str, propagation: str = "Background"
    ) -> bool:
        """Delete an object as it was observed; return whether it existed. The preconditions keep a
        replica that has lost the Lease from deleting what its successor created."""
        preconditions = {"uid": uid, "resourceVersion": version}
        body = {"propagationPolicy": propagation, "preconditions": preconditions}
        try:
            await self._call("DELETE", path, body)
        except ApiError as error:
            if error.code != 404:
                raise
            return False
        return True

    async def _call(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        query: Mapping[str, str] | None = None,
        *,
        type_: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        configuration = self.api.configuration
        headers = {"Accept": accept, "Content-Type": type_, "User-Agent": MANAGER}
        for setting in (await configuration.auth_settings()).values():
            headers[setting["key"]] = setting["value"]
        url = f"{configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            response = await self.api.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=REQUEST_SECONDS
            )
            text = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            metrics.REQUESTS.labels(method, "none").inc()
            raise ApiError(0, "NoAnswer", str(error) or type(error).__name__) from error
        metrics.REQUESTS.labels(method, str(response.status)).inc()
        value = _json(text)
        if response.status < 400 and not value:  # an empty list would mean that no pod exists
            raise ApiError(0, "BadAnswer", f"{method} {path}: the answer was cut or is not JSON")
        if response.status >= 400:
            raise ApiError(
                response.status,
                str(value.get("reason") or response.reason),
                str(value.get("message") or text[:500].decode(errors="replace")),
                _seconds(response.headers.get("Retry-After")),
            )
        return value


def _json(text: bytes) -> Object:
    """Return a JSON object; {} for any other text, such as the error page of a proxy."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _seconds(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header; None: it is missing or is no number."""
    try:
        seconds = float(text) if text else None
    except ValueError:
        return None
    return seconds if seconds is not None and math.isfinite(seconds) else None


def without_managed_fields(item: Object) -> Object:
    """Return the object without the record of who set which field: nothing here reads it, and it is
    a large part of a job."""
    kept = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
    return {**item, "metadata": kept}


def _finalizers(job: Object) -> list[str]:
    return list(job["metadata"].get("finalizers") or [])


def has_finalizer(job: Object) -> bool:
    """Return whether a job has the operator's finalizer."""
    return FINALIZER in _finalizers(job)


def needs_finalizer(job: Object) -> bool:
    """Return whether a job's output is erased with it. All other objects of a job are removed by
    Kubernetes' garbage collector, for which a job needs no finalizer."""
    output = job["spec"].get("output") or {}
    return bool(output.get("deletionPolicy") == "Delete")


def controller_of(item: Mapping[str, Any]) -> str | None:
    """Return the UID of an object's controller; None: the object has none."""
    owner = _controller(item)
    return None if owner is None else str(owner["uid"])


def _controller(item: Mapping[str, Any]) -> Object | None:
    owners = item["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), None)


_PLURALS = {
    "ConfigMap": "configmaps",
    "NetworkPolicy": "networkpolicies",
    "RayJob": "rayjobs",
    "Job": "jobs",
}


def _path_of(item: Object) -> str:
    version, metadata = item["apiVersion"], item["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    kind = _PLURALS[item["kind"]]
    return f"{root}/namespaces/{metadata['namespace']}/{kind}/{quote(metadata['name'])}"
