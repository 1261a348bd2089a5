"""The chart through Helm, as Python objects."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "charts" / "tuneyard"
NAMESPACE = "tuneyard-system"

PROFILE = {"gpusPerWorker": 1, "memory": "64Gi", "nodeSelector": {"gpu": "a100"}}
EVERYTHING: Mapping[str, Any] = {
    "replicas": 3,
    "concurrency": 4,
    "profiles": {"a100-small": PROFILE},
    "imagePullSecrets": [{"name": "registry"}],
    "priorityClassName": "system-cluster-critical",
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "podLabels": {"team": "platform"},
    "podAnnotations": {"example.com/note": "yes"},
    "serviceAccount": {"annotations": {"example.com/role": "operator"}},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboard": {"enabled": True},
    "networkPolicy": {"apiServer": {"cidrs": ["10.0.0.1/32"], "ports": [6443]}},
}
"""Values with every option switched on."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "namespaced": {"watchNamespaces": ["team-a", "team-b"]},
    "least": {
        "rbac": {"create": False, "userRoles": False},
        "serviceAccount": {"create": False},
        "networkPolicy": {"enabled": False},
    },
}


@dataclass(frozen=True)
class Chart:
    """Render the chart with a Helm binary."""

    helm: Path

    def run(
        self, *arguments: str, values: Mapping[str, Any] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run Helm. With `check`, a failure raises an error with Helm's output."""
        command = [str(self.helm), *arguments]
        if values is not None:
            command += ["--values", "-"]
        text = json.dumps(values) if values is not None else None
        done = subprocess.run(command, check=False, input=text, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"helm {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def render(
        self, values: Mapping[str, Any], name: str = "tuneyard", namespace: str = NAMESPACE
    ) -> list[Object]:
        """Return all objects except the CustomResourceDefinitions."""
        template = ("template", name, str(FOLDER), "--namespace", namespace)
        done = self.run(*template, values=values)
        return [item for item in yaml.safe_load_all(done.stdout) if item]

    def refusal(self, values: Mapping[str, Any]) -> str:
        """Return Helm's error for invalid values; "": they are valid."""
        done = self.run("template", "tuneyard", str(FOLDER), values=values, check=False)
        return done.stderr if done.returncode else ""


def one(objects: list[Object], kind: str, name: str = "tuneyard") -> Object:
    """Return the only object of this kind and name."""
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def kinds(objects: list[Object]) -> list[str]:
    return sorted(item["kind"] for item in objects)


def grants(role: Object) -> Iterator[tuple[str, str, str, str]]:
    """Yield each permission of a role: group, resource, verb, name; "": every name."""
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    for name in rule.get("resourceNames", [""]):
                        yield group, resource, verb, name
