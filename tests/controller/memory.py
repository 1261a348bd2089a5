"""An API server in memory for tests of the reconciler: versions, UIDs, preconditions, finalizers.

    api = MemoryApi()
    api.add(job("tuned"))
    async with operated(api) as operator:
        await eventually(lambda: "tuned-1" in api.names(RAY_JOBS))

It answers the requests of `tuneyard.controller.cluster` alone, at the level of HTTP.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qs, urlsplit

from kubernetes.aio.client import ApiClient

from tuneyard.controller.cluster import Cluster, Key
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings
from tuneyard.controller.watch import Watches
from tuneyard.rendering.names import PREPARE_ROLE, ROLE_LABEL

Object = dict[str, Any]

NAMESPACE = "team"
JOBS = f"/apis/tuneyard.io/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"
RAY_JOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
PREPARATIONS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
POLICIES = f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies"
LISTED_AT_START = frozenset(("/apis/ray.io/v1/rayjobs", "/apis/batch/v1/jobs", "/api/v1/pods"))
"""What an operator lists when it starts, if it watches all namespaces."""
_COLLECTION = re.compile(r"(/api/v1|/apis/[^/]+/[^/]+)(/namespaces/[^/]+)?/[a-z]+")
_PLURALS = {
    "FineTuneJob": JOBS,
    "RayJob": RAY_JOBS,
    "Job": PREPARATIONS,
    "Pod": PODS,
    "ConfigMap": CONFIG_MAPS,
    "NetworkPolicy": POLICIES,
}


class Request(NamedTuple):
    """A request as the server received it."""

    method: str
    path: str
    """Of a created object, with its name."""
    body: Any


Fault = Callable[[Request], tuple[int, str] | None]
"""Returns the status and the message of an error; None: the request is served."""


class MemoryApi:
    """The server and its objects, by path."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.requests: list[Request] = []
        self.fault: Fault = lambda _: None
        self.on_change: Callable[[Object, bool], None] = lambda _, __: None
        """Called with each new version of an object and with whether it is the last."""
        self._version = self._num_objects = 0
        client = SimpleNamespace(
            configuration=SimpleNamespace(host="", auth_settings=_no_settings), rest_client=self
        )
        self.cluster = Cluster(cast("ApiClient", client))

    # ---- for tests --------------------------------------------------------------------------

    def add(self, item: Object) -> Object:
        """Create an object and return it as stored."""
        name = item["metadata"]["name"]
        return self._store(f"{_PLURALS[item['kind']]}/{name}", copy.deepcopy(item), new=True)

    def remove(self, path: str) -> None:
        """Remove an object, whatever its finalizers."""
        self._removed(path)

    def change(self, path: str, **fields: Any) -> Object:
        """Replace fields of an object, for example its status."""
        return self._store(path, {**self.objects[path], **fields})

    def status(self, name: str) -> Object:
        status: Object = self.objects[f"{JOBS}/{name}"].get("status") or {}
        return status

    def names(self, collection: str) -> list[str]:
        return sorted(path.rpartition("/")[2] for path in self._paths(collection))

    def uid(self, path: str) -> str | None:
        """Return the UID of an object; None: it does not exist."""
        found = self.objects.get(path)
        return found["metadata"]["uid"] if found else None

    # ---- the interface of the client --------------------------------------------------------

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: Any, **_: Any
    ) -> _Response:
        await asyncio.sleep(0)  # a loop of requests must not stop the test's own timeout
        address = urlsplit(url)
        path = address.path
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
        asked = Request(method, path, copy.deepcopy(body))
        self.requests.append(asked)
        if refusal := self.fault(asked):
            return _Response(*refusal)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        match method:
            case "GET":
                return self._get(path, query)
            case "POST" if path in self.objects:
                return _Response(409, f"{path} already exists", "AlreadyExists")
            case "POST":
                stored = self._store(path, asked.body, new=True)
                if "as=PartialObjectMetadata" in headers.get("Accept", ""):
                    stored = {"kind": "PartialObjectMetadata", "metadata": stored["metadata"]}
                return _answer(stored)
            case "DELETE":
                return self._delete(path, body)
            case _ if "apply" in headers["Content-Type"]:
                return self._apply(path, asked.body)
        return self._patch(path.removesuffix("/status"), asked.body)

    def _get(self, path: str, query: Mapping[str, str]) -> _Response:
        if path in self.objects:
            return _answer(self.objects[path])
        if not _COLLECTION.fullmatch(path):
            return _Response(404, f"{path} not found", "NotFound")
        wanted = [part.partition("=") for part in query.get("labelSelector", "").split(",") if part]
        found = [self.objects[each] for each in self._paths(path)]
        items = [item for item in found if all(_has(_labels(item), *each) for each in wanted)]
        first = int(query.get("continue") or 0)
        end = first + int(query.get("limit") or len(items))
        more = {"continue": str(end)} if end < len(items) else {}
        return _answer({"metadata": more, "items": items[first:end]})

    def _apply(self, path: str, item: Object) -> _Response:
        """Create or replace an object. The owners that another request set stay: a POST and an
        apply of one client are two field managers, and owners are a map by their UID."""
        known = self.objects.get(path)
        if known is None:
            return _answer(self._store(path, item, new=True))
        metadata = {**known["metadata"], **item["metadata"]}
        owners = {o["uid"]: o for one in (known, item) for o in _owners(one)}
        metadata["ownerReferences"] = list(owners.values())
        if sum(bool(owner.get("controller")) for owner in owners.values()) > 1:
            message = "Only one reference can have Controller set to true"
            return _Response(422, message, "Invalid")
        return _answer(self._store(path, {**known, **item, "metadata": metadata}))

    def _patch(self, path: str, patch: Object) -> _Response:
        known = self.objects.get(path)
        if known is None:
            return _Response(404, f"{path} not found", "NotFound")
        expected = patch.get("metadata", {}).pop("resourceVersion", None)
        if expected not in (None, known["metadata"]["resourceVersion"]):
            return _Response(409, "the object has been modified", "Conflict")
        changed = _merged(known, patch)
        is_last = "deletionTimestamp" in changed["metadata"] and not _finalizers(changed)
        return _answer(self._removed(path) if is_last else self._store(path, changed))

    def _delete(self, path: str, options: Object) -> _Response:
        known = self.objects.get(path)
        if known is None:
            return _Response(404, f"{path} not found", "NotFound")
        for name, value in (options.get("preconditions") or {}).items():
            if known["metadata"][name] != value:
                return _Response(409, f"precondition failed: {name} {value}", "Conflict")
        if not _finalizers(known):
            return _answer(self._removed(path))
        metadata = {**known["metadata"], "deletionTimestamp": "2030-01-01T00:00:00Z"}
        return _answer(self._store(path, {**known, "metadata": metadata}))

    # ---- the store --------------------------------------------------------------------------

    def _store(self, path: str, item: Object, *, new: bool = False) -> Object:
        self._version += 1
        metadata = {**item["metadata"], "resourceVersion": str(self._version)}
        if new:
            self._num_objects += 1
            created = f"2030-01-01T00:{self._num_objects // 60:02d}:{self._num_objects % 60:02d}Z"
            metadata = {"uid": f"uid-{self._num_objects}", "creationTimestamp": created, **metadata}
        stored = self.objects[path] = {**item, "metadata": metadata}
        self.on_change(copy.deepcopy(stored), False)
        return stored

    def _removed(self, path: str) -> Object:
        self._version += 1
        item = self.objects.pop(path)
        item["metadata"]["resourceVersion"] = str(self._version)
        self.on_change(copy.deepcopy(item), True)
        return item

    def _paths(self, collection: str) -> list[str]:
        return [path for path in self.objects if path.rpartition("/")[0] == collection]


class _Response:
    """A response of the server; `message` of an error, or `body`."""

    def __init__(self, status: int, message: str, reason: str = "", body: Any = None) -> None:
        self.status, self.reason = status, reason or "InternalError"
        self.headers: Mapping[str, str] = {}
        self._body = body or {"reason": self.reason, "message": message}

    async def read(self) -> bytes:
        return json.dumps(self._body).encode()


def _answer(item: Object) -> _Response:
    return _Response(200, "", body=item)


async def _no_settings() -> Object:
    return {}


def _labels(item: Object) -> Object:
    return item["metadata"].get("labels") or {}


def _has(labels: Object, name: str, is_given: str, value: str) -> bool:
    """Return whether labels match one part of a selector: NAME or NAME=VALUE."""
    return name in labels and (not is_given or labels[name] == value)


def _owners(item: Object) -> list[Object]:
    return item["metadata"].get("ownerReferences") or []


def _finalizers(item: Object) -> list[str]:
    return item["metadata"].get("finalizers") or []


def _merged(before: Object, patch: Object) -> Object:
    """Return the result of a merge patch (RFC 7386)."""
    merged = {name: value for name, value in before.items() if name not in patch}
    for name, value in patch.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[name] = _merged(old, value)
        elif value is not None:
            merged[name] = value
    return merged


# ---- objects ------------------------------------------------------------------------------------


def key(name: str) -> Key:
    return Key("FineTuneJob", NAMESPACE, name)


def job(name: str, **policy: Any) -> Object:
    """Return the manifest of a job."""
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": NAMESPACE, "generation": 1},
        "spec": {
            "model": {"uri": "pvc://models/base"},
            "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
            "output": {"uri": f"pvc://models/{name}"},
            "runPolicy": policy,
        },
    }


def preparing_pod(preparation: Object, **status: Any) -> Object:
    """Return the pod of a Job that prepares data, as Kubernetes creates it from its template."""
    labels = preparation["spec"]["template"]["metadata"]["labels"]
    name = f"{preparation['metadata']['name']}-abcde"
    metadata = {"name": name, "namespace": NAMESPACE, "labels": labels}
    return {"kind": "Pod", "metadata": metadata, "status": {"phase": "Running", **status}}


def pod(ray_job: Object, role: str, **status: Any) -> Object:
    """Return a pod of a RayJob, as KubeRay creates it from the RayJob's template."""
    spec = ray_job["spec"]["rayClusterSpec"]
    group = spec["headGroupSpec"] if role == "head" else spec["workerGroupSpecs"][0]
    labels = {**group["template"]["metadata"]["labels"], "ray.io/node-type": role}
    name = f"{ray_job['metadata']['name']}-{role}"
    metadata = {"name": name, "namespace": NAMESPACE, "labels": labels}
    return {"kind": "Pod", "metadata": metadata, "status": {"phase": "Running", **status}}


# ---- the operator -------------------------------------------------------------------------------


class Operator:
    """A running reconciler, its clock and its watches."""

    def __init__(self, api: MemoryApi, settings: Settings) -> None:
        self.late = timedelta()
        """How far its clock is ahead."""
        self.reconciler = Reconciler(api.cluster, settings, clock=self._now)
        self._watches = Watches(self.reconciler)

    def _now(self) -> datetime:
        return datetime.now(UTC) + self.late

    def see(self, item: Object, deleted: bool = False) -> None:
        """Pass a watch event to the operator."""
        handlers = {
            "FineTuneJob": self._watches.job,
            "RayJob": self._watches.ray_job,
            "Job": self._watches.preparation,
            "Pod": self._watches.pod,
        }
        is_other_job = item.get("kind") == "Job" and _labels(item).get(ROLE_LABEL) != PREPARE_ROLE
        if is_other_job:  # the selector of the watch leaves it out
            return
        if handler := handlers.get(item.get("kind", "")):
            handler(item, deleted)


@asynccontextmanager
async def operated(
    api: MemoryApi, settings: Settings | None = None, *, seen: bool = True
) -> AsyncIterator[Operator]:
    """Run a reconciler whose watches see each change at once. `seen`: they have reported the
    objects that exist."""
    operator = Operator(api, settings or Settings())
    for item in list(api.objects.values()) if seen else ():
        operator.see(copy.deepcopy(item))
    api.on_change = operator.see
    running = asyncio.create_task(operator.reconciler.run())
    try:
        yield operator
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def eventually(condition: Callable[[], object], context: object = "") -> None:
    """Wait until the condition holds."""
    try:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        shown = context() if callable(context) else context
        raise AssertionError(f"the condition did not become true: {shown}") from None
