"""A namespace of a real API server and the operator that serves it; KubeRay is operated by hand.

    job = scene.create("first")
    attempt = job.attempt(1)      # waits until its RayJob is there
    attempt.run()                 # its pods are there and its driver runs
    attempt.end(FAILED)

The operator has the rights of the chart and no others, and reaches the API server through a proxy
that can fail. Tests go past that proxy, as the cluster's administrator.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from tests.controller.running import Operator

if TYPE_CHECKING:
    from rig.plugin import Cluster

CRDS = Path(__file__).parents[2] / "crds"
ROLES = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
PLURALS = {"FineTuneJob": "finetunejobs", "AlignmentJob": "alignmentjobs"}
PATIENCE_SECONDS = 90.0
POLL_SECONDS = 0.1
QUIET_SECONDS = 2.5
HOLD = "tests.tuneyard.io/hold"
"""A finalizer: whatever has it stays."""
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
    """The first value of the condition that is true. `context` is shown when there is none: a
    value, or a function that gives it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain: {context() if callable(context) else context}")
        time.sleep(POLL_SECONDS)
    return value


def consistently(condition: Callable[[], object], seconds: float = QUIET_SECONDS) -> None:
    """The condition holds, and goes on holding."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert condition(), "it held, and then no more"
        time.sleep(POLL_SECONDS)


# ---- what a driver says -------------------------------------------------------------------------


def outcome(state: str, reason: str = "", *, retryable: bool = False, **more: Any) -> Object:
    failure = {"failure": {"reason": reason, "message": f"it was {reason}"}} if reason else {}
    return {"state": state, "retryable": retryable, **failure, **more}


SUCCEEDED = outcome("Succeeded", result={"uri": "pvc://models/out/result", "digest": "sha256:d"})
INTERRUPTED = outcome("Interrupted", retryable=True)


def post(attempt: int, step: int = 0, *, loss: float = 1.5, **picture: Any) -> Object:
    """The body of a progress post, 100 steps being the whole job."""
    metrics = [{"name": "loss", "value": loss}, {"name": "learningRate", "value": "0.0002"}]
    picture = {
        "attempt": attempt,
        "stage": "sft",
        "step": step,
        "totalSteps": 100,
        **picture,
    }
    status = {"progressPercentage": step, "metrics": metrics}
    return {"trainerStatus": status, "tuneyard": picture}


# ---- the API server -----------------------------------------------------------------------------


class RefusedError(Exception):
    """What the API server said instead."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(f"{status}: {message}")


class Api:
    """JSON in, JSON out, with the rights of a kubeconfig."""

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
        """Raises RefusedError."""
        headers = {**self._headers, "Content-Type": type_ or "application/json"}
        data = None if body is None else json.dumps(body)
        answer = self._pool.request(method, self._url + path, headers=headers, body=data)
        if answer.status >= 400:
            raise RefusedError(answer.status, answer.data.decode()[:2000])
        return json.loads(answer.data)

    def find(self, path: str) -> Any:
        """None: it is not there."""
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
        """Everything that happened in a collection after a resource version, as watches tell it."""
        query = urlencode({"watch": "true", "resourceVersion": since, "timeoutSeconds": "1"})
        answer = self._pool.request("GET", f"{self._url}{path}?{query}", headers=self._headers)
        return [json.loads(line) for line in answer.data.splitlines()]

    def merge(self, path: str, patch: Object) -> Any:
        return self("PATCH", path, patch, MERGE)


# ---- the namespace ------------------------------------------------------------------------------


@dataclass
class Scene:
    """A namespace, and who acts in it."""

    cluster: Cluster
    namespace: str
    kubeconfig: Path
    """With the operator's own rights."""
    api: Api = field(init=False)

    def __post_init__(self) -> None:
        self.api = Api(self.cluster.kubeconfig)

    def create(
        self, name: str, kind: str = "FineTuneJob", policy: Object | None = None, **changes: Any
    ) -> Job:
        """A job that is new; `changes` replace parts of its spec."""
        output = {"uri": f"pvc://models/{kind.lower()}-{name}"}
        spec = {**SPECS[kind], "output": output, "runPolicy": policy or {}, **changes}
        job = Job(self, kind, name)
        collection = job.path.removesuffix(f"/{name}")
        self.api("POST", collection, job.manifest(spec))
        return job

    def create_object(self, path: str, body: Object) -> Any:
        """Something of the namespace, by the collection's path within it."""
        return self.api("POST", f"/api/v1/namespaces/{self.namespace}/{path}", body)

    def token_of(self, pod: str, audience: str) -> str:
        """As the kubelet projects it into the pod."""
        reference = {"kind": "Pod", "apiVersion": "v1", "name": pod}
        return self.token("default", audience, boundObjectRef=reference)

    def token(self, account: str, audience: str = "", **spec: Any) -> str:
        """For a service account; `audience` "": the API server itself."""
        audiences = {"audiences": [audience]} if audience else {}
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": TOKEN_SECONDS, **audiences, **spec},
        }
        made = self.create_object(f"serviceaccounts/{account}/token", body)
        token: str = made["status"]["token"]
        return token


@dataclass
class OperatedScene(Scene):
    """A scene with its operator at work."""

    proxy: FaultProxy = field(kw_only=True)
    operator: Operator = field(kw_only=True)

    def status_writes(self, job: Job) -> list[Object]:
        """The bodies of all that were asked for so far."""
        return [
            request.json() for request in self.proxy.requests(on("PATCH", f"{job.path}/status$"))
        ]

    def restart(self) -> None:
        """Killed and started again."""
        self.operator.kill()
        self.operator.start()
        self.operator.wait_until_active()


@contextmanager
def namespace(cluster: Cluster, chart: Chart, name: str, folder: Path) -> Iterator[Scene]:
    """A namespace with the chart's service account and rights for an operator of its own."""
    cluster.kubectl("create", "namespace", name)
    rendered = chart.render({"watchNamespaces": [name]}, namespace=name)
    ours = [item for item in rendered if item["kind"] in ROLES]
    for item in ours:
        if not item["kind"].startswith("Cluster"):
            item["metadata"]["namespace"] = name
    cluster.kubectl("apply", "--filename=-", input=yaml.safe_dump_all(ours))
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
def operated(scene: Scene, folder: Path, **options: str) -> Iterator[OperatedScene]:
    """The scene with an operator behind a proxy; its log is in the folder."""
    with (
        FaultProxy(scene.kubeconfig, folder) as proxy,
        operator_of(scene, proxy.kubeconfig, folder, **options) as operator,
    ):
        operator.wait_until_active()
        module_scene = OperatedScene(
            scene.cluster, scene.namespace, scene.kubeconfig, proxy=proxy, operator=operator
        )
        yield module_scene


@contextmanager
def operator_of(scene: Scene, kubeconfig: Path, folder: Path, **options: str) -> Iterator[Operator]:
    """An operator that serves the namespace alone; started."""
    with Reservation() as ports:
        port = str(ports.take())
        here = {"namespaces": scene.namespace, "own_namespace": scene.namespace}
        progress = {"progress_port": port, "progress_url": f"https://127.0.0.1:{port}"}
        with Operator(kubeconfig, folder, **{**here, **progress, **options}) as operator:
            yield operator


def _with_token(kubeconfig: Path, token: str) -> Object:
    configured: Object = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    for user in configured["users"]:
        user["user"] = {"token": token}
    return configured


def _clear(scene: Scene) -> None:
    """Lets everything go, in whatever state the test left it."""
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
    """A job by its name, whether it is there or not."""

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

    # ---- what it says ---------------------------------------------------------------------------

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
        """Why its attempts ended, one after the other; None: it runs."""
        return [attempt.get("reason") for attempt in self.attempts]

    @property
    def failure(self) -> str | None:
        reason: str | None = (self.status.get("failure") or {}).get("reason")
        return reason

    def why(self, type_: str) -> str:
        """A condition's status and reason."""
        for condition in self.status.get("conditions") or ():
            if condition["type"] == type_:
                return f"{condition['status']} {condition['reason']}"
        return "absent"

    def event_reasons(self) -> Counter[str]:
        """The reasons of its events."""
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

    @property
    def _selector(self) -> str:
        return f"tuneyard.io/kind={self.kind},tuneyard.io/job={self.name}"

    def until(self, condition: Callable[[Job], T], seconds: float = PATIENCE_SECONDS) -> T:
        return eventually(lambda: condition(self), seconds, context=self._all_about_it)

    def until_phase(self, phase: str, seconds: float = PATIENCE_SECONDS) -> None:
        self.until(lambda job: job.phase == phase, seconds)

    def until_gone(self) -> None:
        self.until(lambda job: not job.exists)

    def _all_about_it(self) -> str:
        body = self.scene.api.find(self.path) or {}
        about = [body.get("status"), self.ray_jobs(), self.pods()]
        return f"{self.name}: {json.dumps(about, indent=1)}"

    # ---- what is done to it ---------------------------------------------------------------------

    def set(self, **policy: Any) -> None:
        """Changes the run policy."""
        self.scene.api.merge(self.path, {"spec": {"runPolicy": policy}})

    def delete(self, propagation: str = "Background") -> None:
        self.scene.api("DELETE", self.path, {"propagationPolicy": propagation})

    def attempt(self, number: int) -> Attempt:
        """Waits until its RayJob is there."""
        made = Attempt(self, number)
        self.until(lambda _: made.exists)
        return made


# ---- KubeRay's part -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """An attempt's RayJob, to which the test does what KubeRay, the kubelet and the driver do."""

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
    def head(self) -> str:
        return f"{self.name}-head"

    @property
    def worker(self) -> str:
        return f"{self.name}-worker"

    def set(self, **status: Any) -> None:
        self.job.scene.api.merge(f"{self.path}/status", {"status": status})

    def start(self) -> None:
        """KubeRay has made the cluster: there are pods, which do not run yet."""
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
        # No scheduler says of them that there are no nodes.
        spec = {**template["spec"], "schedulerName": "nobody"}
        self.job.scene.create_object("pods", {"metadata": metadata, "spec": spec})

    def run(self) -> Attempt:
        """Its driver runs, and the operator knows."""
        self.start()
        self.set(jobDeploymentStatus="Running", jobStatus="RUNNING")
        self.job.until(lambda job: job.attempts[-1].get("runningAt"))
        return self

    def end(self, told: Object | None = None) -> None:
        """The driver ends and has not been able to post; KubeRay copies its log's tail."""
        is_well = told is not None and told["state"] == "Succeeded"
        line = f"a line before\nTUNEYARD-OUTCOME {json.dumps(told)}\n" if told else ""
        if is_well:
            self.set(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", message=line)
        else:
            status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}
            self.set(**status, reason="AppFailed", message=line)

    # ---- pods -----------------------------------------------------------------------------------

    def _pod(self, name: str) -> str:
        return f"/api/v1/namespaces/{self.job.scene.namespace}/pods/{name}"

    def hold(self, pod: str) -> None:
        """The pod does not go: its node does not answer, say."""
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
        """What the head's container is told."""
        template = self.body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        return {
            each["name"]: each.get("value", "") for each in template["spec"]["containers"][0]["env"]
        }

    @property
    def audience(self) -> str:
        """Of the token that is projected into the head."""
        template = self.body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        volume = next(v for v in template["spec"]["volumes"] if v["name"] == "token")
        audience: str = volume["projected"]["sources"][0]["serviceAccountToken"]["audience"]
        return audience

    def driver(self) -> Driver:
        """The head pod's process, with what it was given."""
        given = self.environment
        token = self.job.scene.token_of(self.head, self.audience)
        return Driver(given["TUNEYARD_PROGRESS_URL"], given["TUNEYARD_CA"], token, self.number)


class Answered:
    """The status server's answer."""

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
        """`body` is JSON, unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return Answered(
            self._pool.request("POST", self.url, body=data, headers={**given, **headers})
        )

    def post(self, step: int = 0, **more: Any) -> Answered:
        return self.send(post(self.attempt, step, **more))

    def end(self, told: Object, step: int = 100) -> Answered:
        return self.post(step, outcome=told)
