"""A cluster with the operator, two volumes, and pods that can read the volumes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.chart.rendering import NAMESPACE as OPERATOR_NAMESPACE
from tests.chart.rendering import Chart

if TYPE_CHECKING:
    from rig.plugin import Cluster

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
NAMESPACE = "tuning"
DATA = [ROOT / "examples" / "data" / name for name in ("support", "alignment")]
TINY_MODEL = Path(__file__).parent / "tiny_model.py"
VOLUMES = ("data", "models")


@dataclass(frozen=True)
class Platform:
    """A user's access to the cluster."""

    cluster: Cluster
    namespace: str = NAMESPACE
    kind: str = "ftj"
    """Short name of the kind of jobs: ftj or aj."""

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, input=input).stdout

    def apply(self, *objects: Object) -> None:
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(objects))

    def job(self, name: str) -> Object:
        job: Object = json.loads(self.kubectl("get", self.kind, name, "-o", "json"))
        return job

    def status(self, name: str) -> Object:
        return dict(self.job(name).get("status") or {})

    def items(self, kind: str, selector: str = "") -> list[Object]:
        arguments = ["get", kind, "-o", "json", *(["-l", selector] if selector else [])]
        items: list[Object] = json.loads(self.kubectl(*arguments))["items"]
        return items

    def pods(self, job: str, *, role: str | None = None) -> list[str]:
        """Return the names of a job's pods. `role`: head or worker."""
        labels = {"tuneyard.io/job": job, "ray.io/node-type": role}
        selector = ",".join(f"{key}={value}" for key, value in labels.items() if value is not None)
        return [pod["metadata"]["name"] for pod in self.items("pods", selector)]

    def until_step(self, job: str, *, attempt: int, step: int) -> None:
        """Wait until the attempt has reported at least this step."""

        def reached() -> bool:
            status = self.status(job)
            progress, attempts = status.get("progress") or {}, status.get("attempts") or []
            is_newest = bool(attempts) and attempts[-1]["number"] == attempt
            return is_newest and progress.get("stage") == "sft" and progress.get("step", 0) >= step

        self.until(f"attempt {attempt} of {job} is at step {step}", reached, 420)

    def wait(self, name: str, condition: str, seconds: int = 540) -> None:
        """Run `kubectl wait`; a failure shows the job's status."""
        try:
            self.kubectl(
                "wait", self.kind, name, f"--for=condition={condition}", f"--timeout={seconds}s"
            )
        except Exception as error:
            pods = self.kubectl("get", "pods", "-o", "wide")
            log = self.cluster.kubectl(
                "-n", OPERATOR_NAMESPACE, "logs", "deploy/tuneyard", "--tail", "30", check=False
            ).stdout
            text = yaml.safe_dump(self.status(name))
            raise AssertionError(f"{error}\n{text}\n{pods}\n{log}") from error

    def until(
        self, what: str, condition: Callable[[], Any], seconds: float = 300, every: float = 1.0
    ) -> Any:
        """Return the first true value."""
        deadline = time.monotonic() + seconds
        while not (answer := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"waited {seconds:.0f} s in vain: {what}")
            time.sleep(every)
        return answer

    def run(self, name: str, script: str, files: dict[str, str] | None = None) -> str:
        """Run a Python script in a pod with the volumes at /data and /models; return its output."""
        phase, log = self.ended(name, script, files)
        self.kubectl("delete", "pod", name, "--wait=false")
        assert phase == "Succeeded", log
        return log

    def ended(
        self,
        name: str,
        script: str,
        files: dict[str, str] | None = None,
        *,
        memory: int | None = None,
    ) -> tuple[str, str]:
        """Run a Python script in a pod; return the phase in which the pod ended, and its output.

        `memory`: the pod's limit in bytes. None: it has none.
        """
        config = {"script.py": script, **(files or {})}
        mounts = [{"name": volume, "mountPath": f"/{volume}"} for volume in VOLUMES]
        claims = [
            {"name": volume, "persistentVolumeClaim": {"claimName": volume}} for volume in VOLUMES
        ]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "restartPolicy": "Never",
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 1000,
                    "runAsGroup": 1000,
                    "fsGroup": 1000,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "main",
                        "image": self.cluster.image,
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["python", "/config/script.py"],
                        "env": [{"name": "HOME", "value": "/tmp"}],
                        "resources": {"limits": {"memory": str(memory)}} if memory else {},
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                        },
                        "volumeMounts": [{"name": "config", "mountPath": "/config"}, *mounts],
                    }
                ],
                "volumes": [{"name": "config", "configMap": {"name": name}}, *claims],
            },
        }
        self.apply(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": config},
            pod,
        )

        def phase() -> str:
            return self.kubectl("get", "pod", name, "-o", "jsonpath={.status.phase}")

        found = self.until(
            f"pod {name} ends", lambda: (p := phase()) in ("Succeeded", "Failed") and p, 180
        )
        return found, self.kubectl("logs", name)


@pytest.fixture(scope="module")
def platform(installed: Platform) -> Iterator[Platform]:
    """The cluster, whose node has no room for the jobs of two modules."""
    yield installed
    installed.kubectl("delete", "ftj,aj", "--all", "--wait=false")
    jobs = "tuneyard.io/job"
    installed.until("the node is empty", lambda: not installed.items("pods", jobs), 200)


@pytest.fixture(scope="session")
def installed(cluster: Cluster, helm: Path) -> Iterator[Platform]:
    """The operator runs from the shipped chart with its own ServiceAccount; pods of jobs must
    satisfy the restricted standard. The volume `data` holds the rows and the tiny model."""
    if cluster.rig is not None:  # a given cluster has the images: scripts/kind.sh
        _install(cluster, Chart(helm))
    cluster.kubectl("create", "namespace", NAMESPACE)
    restricted = "pod-security.kubernetes.io/enforce=restricted"
    cluster.kubectl("label", "namespace", NAMESPACE, restricted)
    platform = Platform(cluster)
    for volume in VOLUMES:
        platform.apply(*_volume(cluster, volume))
    rows = {path.name: path.read_text() for folder in DATA for path in folder.glob("*.jsonl")}
    platform.run("seed", TINY_MODEL.read_text() + SEED, rows)
    yield platform
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false", check=False)


SEED = """
import pathlib, shutil
for path in pathlib.Path("/config").glob("*.jsonl"):
    shutil.copy(path, pathlib.Path("/data") / path.name)
"""


def _install(cluster: Cluster, chart: Chart) -> None:
    assert cluster.image is not None
    repository, _, tag = cluster.image.rpartition(":")
    image = {"repository": repository, "tag": tag}
    text = chart.run(
        *("template", "tuneyard", str(ROOT / "charts" / "tuneyard"), "--include-crds"),
        *("--namespace", OPERATOR_NAMESPACE),
        values={"image": image, "trainerImage": image},
    ).stdout
    objects = [item for item in yaml.safe_load_all(text) if item]
    for item in objects:
        if item["kind"] == "Deployment":
            # The rig's image is this machine's file system, which has no entry point.
            item["spec"]["template"]["spec"]["containers"][0]["command"] = ["tuneyard"]
    cluster.kubectl("create", "namespace", OPERATOR_NAMESPACE)
    cluster.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(objects))
    ready = ("rollout", "status", "deploy/tuneyard", "--timeout=120s")
    cluster.kubectl("-n", OPERATOR_NAMESPACE, *ready)


def _volume(cluster: Cluster, name: str) -> Iterator[Object]:
    """Make a volume: on kind by the default storage class, on the rig from a folder."""
    claim: Object = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}},
    }
    if cluster.rig is not None:
        folder = cluster.rig.state.root / "volumes" / name
        folder.mkdir(parents=True)
        folder.chmod(0o777)  # a hostPath ignores fsGroup
        for parent in folder.parents[: len(folder.relative_to(cluster.rig.state.root).parts)]:
            parent.chmod(parent.stat().st_mode | 0o11)
        claim |= {"storageClassName": "", "volumeName": name}
        yield {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": "",
                "hostPath": {"path": str(folder)},
                "claimRef": {"namespace": NAMESPACE, "name": name},
            },
        }
    yield {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": claim,
    }
