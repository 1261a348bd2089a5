"""Jobs with the statuses that an operator writes, at a fixed time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.manifests.manifests import MINIMAL, PPO, changed
from tuneyard.api.meta import GROUP, VERSION
from tuneyard.cli.jobs import KINDS

if TYPE_CHECKING:
    from rig.plugin import Cluster

CRDS = Path(__file__).parents[2] / "crds"

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)

Object = dict[str, Any]


def before(minutes: float, now: datetime = NOW) -> str:
    """Return the time that many minutes ago, in RFC 3339."""
    return (now - timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%SZ")


def manifest(kind: str, name: str, **changes: Any) -> Object:
    """Return a manifest. A change's key is a field's path, joined by `__`."""
    base = MINIMAL if kind == "FineTuneJob" else PPO
    paths = {path.replace("__", "."): value for path, value in changes.items()}
    return changed(base, {"metadata.name": name, **paths})


def item(kind: str, name: str, status: Object, **changes: Any) -> Object:
    """Return a job as the API server returns it."""
    server = {
        "metadata__namespace": "team-a",
        "metadata__uid": "u-1",
        "metadata__generation": 1,
        "metadata__creationTimestamp": before(90),
        "status": status,
    }
    return manifest(kind, name, **{**server, **changes})


def condition(type_: str, status: str, reason: str, message: str, minutes: float = 5) -> Object:
    return {
        "type": type_,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": before(minutes),
        "observedGeneration": 1,
    }


def attempt(number: int, began: float, ended: float | None = None, **more: Any) -> Object:
    value = {
        "number": number,
        "rayJob": f"support-bot-{number}",
        "startedAt": before(began),
        "runningAt": before(began - 1),
        **more,
    }
    return value if ended is None else {**value, "finishedAt": before(ended)}


PLANNED: Object = {"observedGeneration": 1, "planDigest": "sha256:0"}
IS_PLANNED = condition("Planned", "True", "Planned", "4 stages", 90)

LOST = attempt(
    1,
    89,
    36,
    reason="WorkerDied",
    message="worker pod support-bot-1-worker is gone",
    stage="sft",
    lastStep=400,
    stepsLost=40,
)
MEMORY: Object = {
    "device": "NVIDIA L40S",
    "capacityBytes": 44_276_056_883,
    "stages": [
        {
            "name": "sft",
            "moment": "gradient of the loss",
            "totalBytes": 40_000_000_000,
            "parts": [
                {"name": "weights", "bytes": 16_200_000_000},
                {"name": "gradients", "bytes": 160_000_000},
                {"name": "optimizer", "bytes": 320_000_000},
                {"name": "activations", "bytes": 17_000_000_000},
                {"name": "logits", "bytes": 6_320_000_000},
            ],
        },
    ],
}
RUNNING: Object = {
    **PLANNED,
    "memory": MEMORY,
    "phase": "Running",
    "conditions": [
        IS_PLANNED,
        condition("Admitted", "True", "NoQueue", "the job names no queue", 90),
        condition("Running", "True", "Running", "attempt 2 runs", 34),
    ],
    "stages": [
        {
            "name": "prepare",
            "kind": "prepare",
            "state": "Skipped",
            "startedAt": before(89),
            "finishedAt": before(88.8),
            "metrics": {"rows": 1234.0, "tokens": 901233.0},
        },
        {"name": "sft", "kind": "sft", "state": "Running", "startedAt": before(34), "metrics": {}},
        {"name": "export", "kind": "export", "state": "Pending", "metrics": {}},
    ],
    "progress": {
        "stage": "sft",
        "step": 430,
        "totalSteps": 1200,
        "percentage": 41,
        "estimatedRemainingSeconds": 2040,
        "cost": {"totalSeconds": 4080, "gpuHours": 9.07, "price": 27.4},
        "metrics": {"loss": 1.2345678, "learningRate": 0.000187, "tokensPerSecond": 12345.6},
        "lastUpdatedTime": before(0.2),
    },
    "attempts": [LOST, attempt(2, 35, stage="sft", lastStep=430)],
}
WAITING: Object = {
    **PLANNED,
    "phase": "Pending",
    "conditions": [
        IS_PLANNED,
        condition("Running", "False", "Unschedulable", "no node can take the worker pod"),
    ],
    "attempts": [{"number": 1, "rayJob": "support-bot-1", "startedAt": before(3)}],
}
SUCCEEDED: Object = {
    **PLANNED,
    "phase": "Succeeded",
    "conditions": [
        IS_PLANNED,
        condition("Succeeded", "True", "Succeeded", "the result is at s3://models/out/result"),
    ],
    "stages": [
        {
            "name": "sft",
            "kind": "sft",
            "state": "Succeeded",
            "startedAt": before(88),
            "finishedAt": before(10),
            "metrics": {"tokens": 9e6, "loss": 1.1, "validationLoss": 1.25},
        }
    ],
    "progress": {**RUNNING["progress"], "percentage": 100, "estimatedRemainingSeconds": 0},
    "attempts": [attempt(1, 89, 5, reason="Succeeded", message="all stages are done")],
    "result": {
        "uri": "s3://models/out/result",
        "digest": "sha256:abc",
        "metrics": {"validationLoss": 1.21, "lossReduction": 0.4123},
    },
}
FAILED: Object = {
    **PLANNED,
    "phase": "Failed",
    "conditions": [
        IS_PLANNED,
        condition("Failed", "True", "OutOfMemory", "the worker was killed: out of memory"),
    ],
    "attempts": [attempt(1, 89, 5, reason="OutOfMemory", message="the worker was killed")],
    "failure": {
        "reason": "OutOfMemory",
        "message": "the worker was killed: out of memory",
        "advice": "Raise compute.memory.",
    },
}


PLURALS = {kind.name: kind.plural for kind in KINDS.values()}


class JobNamespace:
    """A namespace of a real API server, where the test writes statuses as an operator does."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        from kubernetes import client, config

        self.cluster, self.name = cluster, name
        connection = config.new_client_from_config(str(cluster.kubeconfig))
        self.core = client.CoreV1Api(connection)
        self._jobs = client.CustomObjectsApi(connection)

    def create(
        self, name: str, status: Object | None = None, kind: str = "FineTuneJob", **changes: Any
    ) -> None:
        body = manifest(kind, name, **changes)
        self._jobs.create_namespaced_custom_object(*self._at(kind), body)
        if status is not None:
            self.set_status(name, status, kind)

    def set_status(self, name: str, status: Object, kind: str = "FineTuneJob") -> None:
        body = [{"op": "add", "path": "/status", "value": status}]
        patch = self._jobs.patch_namespaced_custom_object_status
        patch(*self._at(kind), name, body, _content_type="application/json-patch+json")

    def get(self, name: str, kind: str = "FineTuneJob") -> Any:
        return self._jobs.get_namespaced_custom_object(*self._at(kind), name)

    def delete(self, name: str) -> None:
        self._jobs.delete_namespaced_custom_object(*self._at("FineTuneJob"), name)

    def remove_finalizers(self, name: str) -> None:
        """Remove the finalizers of a job that is being deleted."""
        body = [{"op": "remove", "path": "/metadata/finalizers"}]
        patch = self._jobs.patch_namespaced_custom_object
        patch(*self._at("FineTuneJob"), name, body, _content_type="application/json-patch+json")

    def remove_pod(self, name: str) -> None:
        """Delete a pod together with its finalizers."""
        self.core.patch_namespaced_pod(name, self.name, {"metadata": {"finalizers": None}})
        self.core.delete_namespaced_pod(name, self.name, grace_period_seconds=0)

    def policy(self, name: str) -> Any:
        return self.get(name)["spec"]["runPolicy"]

    def _at(self, kind: str) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.name, PLURALS[kind]
