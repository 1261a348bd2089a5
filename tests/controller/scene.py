"""A namespace of a real API server and the operator that serves it. The test acts as KubeRay.

    job = scene.create("first")
    attempt = job.attempt(1)      # waits until its RayJob exists
    attempt.run()                 # its pods exist and its driver runs
    attempt.end(FAILED)

The operator has the permissions of the chart and no others. It reaches the API server through a
proxy that can fail; the tests reach it directly, as the cluster's administrator.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import urllib3
import yaml
from kubernetes import client, config
from rig.ports import Reservation

from tests.chart.rendering import Chart
from tests.controller.faults import FaultProxy, on
from tests.controller.running import COMMAND, Operator
from tuneyard.api.pods import CA_VARIABLE, OUTCOME_PREFIX, PROGRESS_URL_VARIABLE

if TYPE_CHECKING:
    from rig.plugin import Cluster

CRDS = Path(__file__).parents[2] / "crds"
ROLES = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
PLURALS = {"FineTuneJob": "finetunejobs", "AlignmentJob": "alignmentjobs"}
PATIENCE_SECONDS = 90.0
POLL_SECONDS = 0.1
QUIET_SECONDS = 2.5
HOLD = "tests.tuneyard.io/hold"
"""A finalizer: an object that has it is not removed."""
TOKEN_SECONDS = 3600
MERGE = "application/merge-patch+json"

Object = dict[str, Any]
T = TypeVar("T")

SPECS: Mapping[str, Object] = {
    "FineTuneJob": {
        "model": {"uri": "hf://org/model"},
        "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
    },
    "AlignmentJob": {
        "model": {"uri": "hf://org/model"},
        "preferences": {"data": [{"uri": "pvc://data/pairs.jsonl"}]},
        "optimize": {"dpo": {}},
    },
}


def eventually(
    condition: Callable[[], T], seconds: float = PATIENCE_SECONDS, *, context: object = ""
) -> T:
    """Return the first true value of the condition. `context`, a value or a function that returns
    one, explains a failure."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            shown = context() if callable(context) else context
            raise AssertionError(f"the condition did not become true: {shown}")
        time.sleep(POLL_SECONDS)
    return value


def consistently(condition: Callable[[], object], seconds: float = QUIET_SECONDS) -> None:
    """Assert that the condition stays true for so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert condition(), "the condition became false"
        time.sleep(POLL_SECONDS)


# ---- posts and outcomes of a driver -------------------------------------------------------------


def outcome(state: str, reason: str = "", *, retryable: bool = False, **more: Any) -> Object:
    failure = {"failure": {"reason": reason, "message": f"it was {reason}"}} if reason else {}
    return {"state": state, "retryable": retryable, **failure, **more}


SUCCEEDED = outcome("Succeeded", result={"uri": "pvc://models/out/result", "digest": "sha256:d"})
INTERRUPTED = outcome("Interrupted", retryable=True)


def post(attempt: int, step: int = 0, *, loss: float = 1.5, **report: Any) -> Object:
    """Return the body of a progress post of a job with 100 steps."""
    metrics = [{"name": "loss", "value": loss}, {"name": "learningRate", "value": "0.0002"}]
    report = {
        "attempt": attempt,
        "stage": "sft",
        "step": step,
        "totalSteps": 100,
        **report,
    }
    status = {"progressPercentage": step, "metrics": metrics}
    return {"trainerStatus": status, "tuneyard": report}


# ---- the API server -----------------------------------------------------------------------------


class RefusedError(Exception):
    """A refusal by the API server."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(f"{status}: {message}")


class Api:
    """Requests in JSON with the permissions of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        connect: Callable[[str], Any] = config.new_client_from_config
        connection: client.ApiClient = connect(str(kubeconfig))
        self._url = connection.configuration.host
        self._headers = {
            setting["key"]: setting["value"]
            for setting in connection.configuration.auth_settings().values()
        }
        self._pool = connection.rest_client.pool_manager

    def __call__(self, method: str, path: str, body: Any = None, type_: str = "") -> Any:
        """Send a request and return the response. Raises RefusedError."""
        headers = {**self._headers, "Content-Type": type_ or "application/json"}
        data = None if body is None else json.dumps(body)
        answer = self._pool.request(method, self._url + path, headers=headers, body=data)
        if answer.status >= 400:
            raise RefusedError(answer.status, answer.data.decode()[:2000])
        return json.loads(answer.data)

    def find(self, path: str) -> Any:
        """Return the object; None: it does not exist."""
        try:
            return self("GET", path)
        except RefusedError as refused:
            if refused.status != 404:
                raise
            return None

    def list(self, path: str, **query: str) -> list[Any]:
        items: list[Any] = self("GET", f"{path}?{urlencode(query)}")["items"]
        return items

    def changes(self, path: str, since: str) -> list[Any]:
        """Return the watch events of a collection since a resource version."""
        query = urlencode({"watch": "true", "resourceVersion": since, "timeoutSeconds": "1"})
        answer = self._pool.request("GET", f"{self._url}{path}?{query}", headers=self._headers)
        return [json.loads(line) for line in answer.data.splitlines()]

    def merge(self, path: str, patch: Object) -> Any:
        return self("PATCH", path, patch, MERGE)


# ---- the namespace ------------------------------------------------------------------------------


@dataclass
class Scene:
    """A namespace and its clients."""

    cluster: Cluster
    namespace: str
    kubeconfig: Path
    """With the operator's own permissions."""
    api: Api = field(init=False)

    def __post_init__(self) -> None:
        self.api = Api(self.cluster.kubeconfig)

    def create(
        self, name: str, kind: str = "FineTuneJob", policy: Object | None = None, **changes: Any
    ) -> Job:
        """Create a job; `changes` replace fields of its spec."""
        output = {"uri": f"pvc://models/{kind.lower()}-{name}"}
        spec = {**SPECS[kind], "output": output, "runPolicy": policy or {}, **changes}
        job = Job(self, kind, name)
        collection = job.path.removesuffix(f"/{name}")
        self.api("POST", collection, job.manifest(spec))
        return job

    def create_object(self, path: str, body: Object) -> Any:
        """Create an object, by the collection's path within the namespace."""
        return self.api("POST", f"/api/v1/namespaces/{self.namespace}/{path}", body)

    def token_of(self, pod: str, audience: str) -> str:
        """Return a token as the kubelet projects it into the pod."""
        reference = {"kind": "Pod", "apiVersion": "v1", "name": pod}
        return self.token("default", audience, boundObjectRef=reference)

    def token(self, account: str, audience: str = "", **spec: Any) -> str:
        """Return a token of a service account; `audience` "": the API server itself."""
        audiences = {"audiences": [audience]} if audience else {}
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": TOKEN_SECONDS, **audiences, **spec},
        }
        created = self.create_object(f"serviceaccounts/{account}/token", body)
        token: str = created["status"]["token"]
        return token


@dataclass
class OperatedScene(Scene):
    """A scene with a running operator."""

    proxy: FaultProxy = field(kw_only=True)
    operator: Operator = field(kw_only=True)

    def status_writes(self, job: Job) -> list[Object]:
        """Return the bodies of all status writes of a job so far."""
        return [
            request.json() for request in self.proxy.requests(on("PATCH", f"{job.path}/status$"))
        ]

    def restart(self) -> None:
        """Kill the operator and start it again."""
        self.operator.kill()
        self.operator.start()
        self.operator.wait_until_active()


@contextmanager
def namespace(cluster: Cluster, chart: Chart, name: str, folder: Path) -> Iterator[Scene]:
    """Make a namespace with the chart's service account and permissions for its own operator."""
    cluster.kubectl("create", "namespace", name)
    rendered = chart.render({"watchNamespaces": [name]}, namespace=name)
    roles = [item for item in rendered if item["kind"] in ROLES]
    for item in roles:
        if not item["kind"].startswith("Cluster"):
            item["metadata"]["namespace"] = name
    cluster.kubectl("apply", "--filename=-", input=yaml.safe_dump_all(roles))
    scene = Scene(cluster, name, folder / f"{name}.kubeconfig")
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    eventually(lambda: scene.api.find(account))
    configured = _with_token(cluster.kubeconfig, scene.token("tuneyard"))
    scene.kubeconfig.write_text(json.dumps(configured))
    try:
        yield scene
    finally:
        _clear(scene)


@contextmanager
def operated(
    scene: Scene, folder: Path, command: Sequence[str] = COMMAND, **options: str
) -> Iterator[OperatedScene]:
    """Run an operator behind a proxy in the scene; its log is in the folder."""
    with (
        FaultProxy(scene.kubeconfig, folder) as proxy,
        operator_of(scene, proxy.kubeconfig, folder, command, **options) as operator,
    ):
        operator.wait_until_active()
        yield OperatedScene(
            scene.cluster, scene.namespace, scene.kubeconfig, proxy=proxy, operator=operator
        )


@contextmanager
def operator_of(
    scene: Scene,
    kubeconfig: Path,
    folder: Path,
    command: Sequence[str] = COMMAND,
    **options: str,
) -> Iterator[Operator]:
    """Start an operator that serves the namespace alone."""
    with Reservation() as ports:
        port = str(ports.take())
        place = {"namespaces": scene.namespace, "own_namespace": scene.namespace}
        progress = {"progress_port": port, "progress_url": f"https://127.0.0.1:{port}"}
        options = {**place, **progress, **options}
        with Operator(kubeconfig, folder, command, **options) as operator:
            yield operator


def _with_token(kubeconfig: Path, token: str) -> Object:
    configured: Object = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    for user in configured["users"]:
        user["user"] = {"token": token}
    return configured


def _clear(scene: Scene) -> None:
    """Delete everything, in any state that a test may leave."""
    for path in (
        "apis/tuneyard.io/v1alpha1|finetunejobs",
        "apis/tuneyard.io/v1alpha1|alignmentjobs",
        "apis/ray.io/v1|rayjobs",
        "api/v1|pods",
    ):
        root, _, plural = path.partition("|")
        collection = f"/{root}/namespaces/{scene.namespace}/{plural}"
        for item in scene.api.list(collection):
            if item["metadata"].get("finalizers"):
                patch = {"metadata": {"finalizers": None}}
                scene.api.merge(f"{collection}/{item['metadata']['name']}", patch)
    scene.cluster.kubectl("delete", "namespace", scene.namespace, "--wait=false")
    roles = f"{scene.namespace}-tuneyard"
    scene.cluster.kubectl("delete", "clusterrole,clusterrolebinding", roles)


# ---- a job --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job by its name, whether it exists or not."""

    scene: Scene
    kind: str
    name: str

    @property
    def path(self) -> str:
        namespace = self.scene.namespace
        return f"/apis/tuneyard.io/v1alpha1/namespaces/{namespace}/{PLURALS[self.kind]}/{self.name}"

    def manifest(self, spec: Object) -> Object:
        metadata = {"name": self.name, "namespace": self.scene.namespace}
        api_version = "tuneyard.io/v1alpha1"
        return {"apiVersion": api_version, "kind": self.kind, "metadata": metadata, "spec": spec}

    # ---- its state ------------------------------------------------------------------------------

    @property
    def body(self) -> Object:
        body: Object = self.scene.api("GET", self.path)
        return body

    @property
    def exists(self) -> bool:
        return self.scene.api.find(self.path) is not None

    @property
    def version(self) -> str:
        version: str = self.body["metadata"]["resourceVersion"]
        return version

    @property
    def status(self) -> Object:
        status: Object = self.body.get("status") or {}
        return status

    @property
    def phase(self) -> str | None:
        return self.status.get("phase")

    @property
    def attempts(self) -> list[Object]:
        return self.status.get("attempts") or []

    @property
    def reasons(self) -> list[str | None]:
        """The reasons of its attempts, in order; None: the attempt runs."""
        return [attempt.get("reason") for attempt in self.attempts]

    @property
    def failure(self) -> str | None:
        reason: str | None = (self.status.get("failure") or {}).get("reason")
        return reason

    def why(self, type_: str) -> str:
        """Return the status and reason of a condition."""
        for condition in self.status.get("conditions") or ():
            if condition["type"] == type_:
                return f"{condition['status']} {condition['reason']}"
        return "absent"

    def event_reasons(self) -> Counter[str]:
        """Return the reasons of its events and their counts."""
        events = self._objects("api/v1", "events", fieldSelector=f"involvedObject.name={self.name}")
        return Counter(
            item["reason"]
            for item in events
            for _ in range(item["count"])
            if item["involvedObject"]["kind"] == self.kind
        )

    def _objects(self, root: str, plural: str, **query: str) -> list[Object]:
        return self.scene.api.list(f"/{root}/namespaces/{self.scene.namespace}/{plural}", **query)

    def ray_jobs(self) -> list[str]:
        items = self._objects("apis/ray.io/v1", "rayjobs", labelSelector=self._selector)
        return sorted(item["metadata"]["name"] for item in items)

    def pods(self) -> list[str]:
        items = self._objects("api/v1", "pods", labelSelector=self._selector)
        return sorted(item["metadata"]["name"] for item in items)

    def config_maps(self) -> list[str]:
        items = self._objects("api/v1", "configmaps", labelSelector=self._selector)
        return sorted(item["metadata"]["name"] for item in items)

    @property
    def _selector(self) -> str:
        return f"tuneyard.io/kind={self.kind},tuneyard.io/job={self.name}"

    def until(self, condition: Callable[[Job], T], seconds: float = PATIENCE_SECONDS) -> T:
        return eventually(lambda: condition(self), seconds, context=self._description)

    def until_phase(self, phase: str, seconds: float = PATIENCE_SECONDS) -> None:
        self.until(lambda job: job.phase == phase, seconds)

    def until_gone(self) -> None:
        self.until(lambda job: not job.exists)

    def _description(self) -> str:
        body = self.scene.api.find(self.path) or {}
        about = [body.get("status"), self.ray_jobs(), self.pods()]
        return f"{self.name}: {json.dumps(about, indent=1)}"

    # ---- changes --------------------------------------------------------------------------------

    def set(self, **policy: Any) -> None:
        """Change the run policy."""
        self.scene.api.merge(self.path, {"spec": {"runPolicy": policy}})

    def delete(self, propagation: str = "Background") -> None:
        self.scene.api("DELETE", self.path, {"propagationPolicy": propagation})

    def attempt(self, number: int) -> Attempt:
        """Wait until the attempt's RayJob exists."""
        attempt = Attempt(self, number)
        self.until(lambda _: attempt.exists)
        return attempt

    def preparation(self, number: int) -> Preparation:
        """Wait until the Job exists that prepares the attempt's data."""
        found = Preparation(self, number)
        self.until(lambda _: found.exists)
        return found


# ---- KubeRay's part -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """An attempt's RayJob. Its methods do what KubeRay, the kubelet and the driver do."""

    job: Job
    number: int

    @property
    def name(self) -> str:
        return f"{self.job.name}-{'a' if self.job.kind == 'AlignmentJob' else ''}{self.number}"

    @property
    def path(self) -> str:
        return f"/apis/ray.io/v1/namespaces/{self.job.scene.namespace}/rayjobs/{self.name}"

    @property
    def body(self) -> Object:
        body: Object = self.job.scene.api("GET", self.path)
        return body

    @property
    def exists(self) -> bool:
        return self.job.scene.api.find(self.path) is not None

    @property
    def uid(self) -> str | None:
        """The RayJob's uid, in one read, since it may be deleted meanwhile. None: none exists."""
        found = self.job.scene.api.find(self.path)
        return found["metadata"]["uid"] if found else None

    @property
    def head(self) -> str:
        return f"{self.name}-head"

    @property
    def worker(self) -> str:
        return f"{self.name}-worker"

    def set(self, **status: Any) -> None:
        self.job.scene.api.merge(f"{self.path}/status", {"status": status})

    def start(self) -> None:
        """Create the cluster: its pods exist and do not run yet."""
        self.set(jobDeploymentStatus="Initializing", rayClusterName=f"{self.name}-x")
        body = self.body
        cluster = body["spec"]["rayClusterSpec"]
        self._add_pod(body, "head", cluster["headGroupSpec"]["template"])
        self._add_pod(body, "worker", cluster["workerGroupSpecs"][0]["template"])

    def _add_pod(self, owner: Object, role: str, template: Object) -> None:
        labels = {**template["metadata"]["labels"], "ray.io/node-type": role}
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        metadata = {"name": f"{self.name}-{role}", "labels": labels, "ownerReferences": [reference]}
        # No scheduler may report that there are no nodes.
        spec = {**template["spec"], "schedulerName": "nobody"}
        self.job.scene.create_object("pods", {"metadata": metadata, "spec": spec})

    def run(self) -> Attempt:
        """Run the driver and wait until the operator has noticed."""
        self.start()
        self.set(jobDeploymentStatus="Running", jobStatus="RUNNING")
        self.job.until(lambda job: job.attempts[-1].get("runningAt"))
        return self

    def end(self, reported: Object | None = None) -> None:
        """End the driver without a post; KubeRay copies the tail of its log."""
        succeeded = reported is not None and reported["state"] == "Succeeded"
        line = f"a line before\n{OUTCOME_PREFIX}{json.dumps(reported)}\n" if reported else ""
        if succeeded:
            self.set(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", message=line)
        else:
            status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}
            self.set(**status, reason="AppFailed", message=line)

    # ---- pods -----------------------------------------------------------------------------------

    def _pod(self, name: str) -> str:
        return f"/api/v1/namespaces/{self.job.scene.namespace}/pods/{name}"

    def hold(self, pod: str) -> None:
        """Keep the pod from being removed, as on a node that does not respond."""
        self.job.scene.api.merge(self._pod(pod), {"metadata": {"finalizers": [HOLD]}})

    def let_go(self, pod: str) -> None:
        self.job.scene.api.merge(self._pod(pod), {"metadata": {"finalizers": None}})

    def set_pod(self, pod: str, **status: Any) -> None:
        self.job.scene.api.merge(f"{self._pod(pod)}/status", {"status": status})

    def remove_pod(self, pod: str) -> None:
        self.job.scene.api("DELETE", self._pod(pod))

    # ---- the driver's posts ---------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the head's container."""
        template = self.body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        return {
            each["name"]: each.get("value", "") for each in template["spec"]["containers"][0]["env"]
        }

    @property
    def audience(self) -> str:
        """The audience of the token that is projected into the head."""
        template = self.body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        volume = next(v for v in template["spec"]["volumes"] if v["name"] == "token")
        audience: str = volume["projected"]["sources"][0]["serviceAccountToken"]["audience"]
        return audience

    def driver(self) -> Driver:
        """Return the driver in the head pod, with the head's environment and token."""
        given = self.environment
        token = self.job.scene.token_of(self.head, self.audience)
        return Driver(given[PROGRESS_URL_VARIABLE], given[CA_VARIABLE], token, self.number)


@dataclass(frozen=True)
class Preparation:
    """The Job that prepares an attempt's data. Kubernetes' Job controller makes its pod; the
    methods do what the kubelet and the driver do."""

    job: Job
    number: int

    @property
    def path(self) -> str:
        name = Attempt(self.job, self.number).name
        return f"/apis/batch/v1/namespaces/{self.job.scene.namespace}/jobs/{name}-prepare"

    @property
    def exists(self) -> bool:
        return self.job.scene.api.find(self.path) is not None

    @property
    def pod(self) -> Object:
        """The pod; waits until it exists."""
        name = self.path.rpartition("/")[2]
        pods = f"/api/v1/namespaces/{self.job.scene.namespace}/pods"
        chosen = f"batch.kubernetes.io/job-name={name}"
        found: Object = eventually(lambda: self.job.scene.api.list(pods, labelSelector=chosen))[0]
        return found

    def set_pod(self, **status: Any) -> None:
        pods = f"/api/v1/namespaces/{self.job.scene.namespace}/pods"
        path = f"{pods}/{self.pod['metadata']['name']}/status"
        self.job.scene.api.merge(path, {"status": status})

    def driver(self) -> Driver:
        """Return the driver in the pod, with the pod's environment and token."""
        pod = self.pod
        container = pod["spec"]["containers"][0]
        given = {each["name"]: each.get("value", "") for each in container["env"]}
        volume = next(v for v in pod["spec"]["volumes"] if v["name"] == "token")
        audience = volume["projected"]["sources"][0]["serviceAccountToken"]["audience"]
        token = self.job.scene.token_of(pod["metadata"]["name"], audience)
        return Driver(given[PROGRESS_URL_VARIABLE], given[CA_VARIABLE], token, self.number)


class Answered:
    """The status server's response."""

    def __init__(self, answer: urllib3.BaseHTTPResponse) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self.body: Any = json.loads(answer.data) if answer.data.startswith(b"{") else {}


class Driver:
    """Posts progress over TLS, as a training pod does."""

    def __init__(self, url: str, ca: str, token: str, attempt: int) -> None:
        self.url, self.token, self.attempt = url, token, attempt
        self._pool = urllib3.PoolManager(ca_cert_data=ca, retries=False)

    def send(self, body: Any, **headers: str) -> Answered:
        """Send a post. `body` is sent as JSON unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return Answered(
            self._pool.request("POST", self.url, body=data, headers={**given, **headers})
        )

    def post(self, step: int = 0, **more: Any) -> Answered:
        return self.send(post(self.attempt, step, **more))

    def end(self, reported: Object, step: int = 100) -> Answered:
        return self.post(step, outcome=reported)
