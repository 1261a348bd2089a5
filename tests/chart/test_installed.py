"""The chart on a real API server: all objects are admitted, and the operator has exactly the
permissions that it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.chart import rights
from tests.chart.rendering import FOLDER, VARIANTS, Chart, Object

if TYPE_CHECKING:
    from rig.plugin import Cluster

pytestmark = pytest.mark.apiserver

NAMESPACE, TEAM = "chart-operator", "chart-team"
PATIENCE_SECONDS = 60.0
JOB = {
    "model": {"uri": "hf://org/model"},
    "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
    "output": {"uri": "pvc://models/out", "deletionPolicy": "Delete"},
}


@pytest.fixture(scope="module")
def chart(helm: Path) -> Chart:
    return Chart(helm)


@pytest.fixture(scope="module")
def installed(apiserver: Cluster, chart: Chart) -> Iterator[Cluster]:
    """The chart, installed by Helm into a namespace that admits restricted pods alone."""
    for name in (NAMESPACE, TEAM):
        label = {"pod-security.kubernetes.io/enforce": "restricted"} if name == NAMESPACE else {}
        body = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": label},
        }
        apiserver.kubectl("apply", "-f", "-", input=json.dumps(body))
    at = ("--kubeconfig", str(apiserver.kubeconfig), "--namespace", NAMESPACE)
    # Helm 4 installs no chart whose CRDs exist under another field manager.
    definitions = ("-f", str(FOLDER / "crds"))
    apiserver.kubectl("delete", "--ignore-not-found", "--timeout=60s", *definitions)
    chart.run("install", "tuneyard", str(FOLDER), *at, values={"replicas": 2})
    yield apiserver
    chart.run("uninstall", "tuneyard", *at)
    apiserver.kubectl("delete", "namespace", NAMESPACE, TEAM, "--wait=false")


@pytest.fixture(scope="module")
def may(installed: Cluster) -> Callable[..., bool]:
    """Return a function that asks the API server for a permission."""
    from kubernetes import client, config

    api = client.AuthorizationV1Api(config.new_client_from_config(str(installed.kubeconfig)))

    def ask(
        right: rights.Right, namespace: str = "", user: str = "", groups: tuple[str, ...] = ()
    ) -> bool:
        group, resource, verb, name = right
        resource, _, subresource = resource.partition("/")
        what = client.V1ResourceAttributes(
            group=group,
            resource=resource,
            subresource=subresource,
            verb=verb,
            name=name,
            namespace=namespace,
        )
        spec = client.V1SubjectAccessReviewSpec(
            resource_attributes=what,
            user=user or f"system:serviceaccount:{NAMESPACE}:tuneyard",
            groups=list(groups) or ["system:serviceaccounts", "system:authenticated"],
        )
        review = api.create_subject_access_review(client.V1SubjectAccessReview(spec=spec))
        return bool(review.status.allowed)

    return ask


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_api_server_admits_all_objects_without_a_warning(
    installed: Cluster, chart: Chart, variant: str
) -> None:
    objects = chart.render(VARIANTS[variant], name="dry", namespace=NAMESPACE)
    for item in objects:
        if item["metadata"].get("namespace") in ("team-a", "team-b"):
            item["metadata"]["namespace"] = TEAM  # this namespace exists
    text = yaml.safe_dump_all(item for item in objects if item["kind"] != "PodMonitor")
    arguments = ("--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
    done = installed.kubectl("apply", *arguments, input=text)
    assert "Warning" not in done.stderr
    assert len(done.stdout.splitlines()) == len([o for o in objects if o["kind"] != "PodMonitor"])


def test_the_operators_pods_satisfy_the_restricted_standard(
    installed: Cluster,
) -> None:
    def pods() -> list[Object]:
        selector = "app.kubernetes.io/name=tuneyard"
        get = ("get", "pods", "--namespace", NAMESPACE, "--selector", selector, "-o", "json")
        found: list[Object] = json.loads(installed.kubectl(*get).stdout)["items"]
        return found

    _wait(lambda: len(pods()) == 2, "two pods")


def test_the_operator_has_the_permissions_that_it_needs(may: Callable[..., bool]) -> None:
    for right in rights.each(rights.JOBS):
        assert may(right, TEAM), right
    for right in rights.each(rights.REVIEWS, rights.DISCOVERY):
        assert may(right), right
    for right in rights.each_own():
        assert may(right, NAMESPACE), right


FORBIDDEN: list[rights.Right] = [
    ("", "secrets", "get", "tuneyard-tls"),
    ("", "secrets", "list", ""),
    ("", "secrets", "create", ""),
    ("", "pods", "create", ""),
    ("", "pods", "delete", ""),
    ("", "pods/exec", "create", ""),
    ("", "pods/log", "get", ""),
    ("", "pods/portforward", "create", ""),
    ("", "configmaps", "list", ""),
    ("", "configmaps", "deletecollection", ""),
    ("", "serviceaccounts/token", "create", ""),
    ("", "persistentvolumeclaims", "get", ""),
    ("tuneyard.io", "finetunejobs", "create", ""),
    ("tuneyard.io", "finetunejobs", "deletecollection", ""),
    ("coordination.k8s.io", "leases", "get", "tuneyard-operator"),
    ("apps", "deployments", "create", ""),
    ("rbac.authorization.k8s.io", "rolebindings", "create", ""),
]


@pytest.mark.parametrize("right", FORBIDDEN, ids=str)
def test_in_namespaces_with_jobs_it_may_not(may: Callable[..., bool], right: rights.Right) -> None:
    assert not may(right, TEAM)


@pytest.mark.parametrize(
    "right",
    [
        ("", "secrets", "get", "registry"),
        ("", "secrets", "list", ""),
        ("", "secrets", "delete", "tuneyard-tls"),
        ("coordination.k8s.io", "leases", "update", "another"),
        ("coordination.k8s.io", "leases", "list", ""),
    ],
    ids=str,
)
def test_in_its_own_namespace_it_may_not(may: Callable[..., bool], right: rights.Right) -> None:
    assert not may(right, NAMESPACE)


@pytest.mark.parametrize(
    "right",
    [
        ("", "nodes", "get", ""),
        ("", "secrets", "get", ""),
        ("apiextensions.k8s.io", "customresourcedefinitions", "patch", ""),
        ("rbac.authorization.k8s.io", "clusterroles", "create", ""),
    ],
    ids=str,
)
def test_in_the_cluster_it_may_not(may: Callable[..., bool], right: rights.Right) -> None:
    assert not may(right)


def test_kubernetes_own_roles_include_jobs(installed: Cluster, may: Callable[..., bool]) -> None:
    """The controller manager aggregates them a moment after the installation."""
    for role in ("view", "edit"):
        binding = (
            "create",
            "rolebinding",
            f"{role}er",
            f"--clusterrole={role}",
            f"--user={role}er",
        )
        installed.kubectl(*binding, "--namespace", TEAM)
    create = ("tuneyard.io", "finetunejobs", "create", "")
    watch = ("tuneyard.io", "alignmentjobs", "watch", "")
    _wait(lambda: may(create, TEAM, "editer", ("users",)), "edit to include jobs")
    _wait(lambda: may(watch, TEAM, "viewer", ("users",)), "view to include jobs")
    assert not may(create, TEAM, "viewer", ("users",))
    status = ("tuneyard.io", "finetunejobs/status", "patch", "")
    assert not may(status, TEAM, "editer", ("users",))


def test_no_request_of_the_operator_is_refused(installed: Cluster, tmp_path: Path) -> None:
    """Run the operator with the chart's permissions, from the creation of a job to the erasure of
    its output."""
    with _operator(installed, tmp_path, "tuneyard") as log:
        _create_and_delete(installed, "everywhere", log)
    text = log.read_text()
    assert "orbidden" not in text
    assert not re.search(r"\b403\b", text)  # not a part of a port


def test_the_operator_needs_no_permissions_outside_its_namespaces(
    installed: Cluster, chart: Chart, tmp_path: Path
) -> None:
    """Listing namespaces and CRDs is forbidden here, and the operator works without it."""
    objects = chart.render({"watchNamespaces": [TEAM]}, name="narrow", namespace=NAMESPACE)
    wanted = [item for item in objects if item["kind"] != "Deployment"]
    installed.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(wanted))
    with _operator(installed, tmp_path, "narrow", namespaces=TEAM) as log:
        _create_and_delete(installed, "narrow", log)


# ---- helpers ----------------------------------------------------------------------------------


def _create_and_delete(cluster: Cluster, name: str, log: Path) -> None:
    """Create a job and wait for its RayJob; delete the job and wait for the erasure of its
    output."""

    def names(kind: str) -> str:
        of = ("--selector", f"tuneyard.io/job={name}")
        return cluster.kubectl("get", kind, "--namespace", TEAM, "--output", "name", *of).stdout

    job = {"apiVersion": "tuneyard.io/v1alpha1", "kind": "FineTuneJob", "spec": JOB}
    job["metadata"] = {"name": name, "namespace": TEAM}
    cluster.kubectl("apply", "-f", "-", input=json.dumps(job))
    _wait(lambda: names("rayjobs"), "a RayJob", log)
    cluster.kubectl("delete", "finetunejob", name, "--wait=false", "--namespace", TEAM)
    _wait(lambda: not names("rayjobs"), "the end of the RayJob", log)
    _wait(lambda: names("jobs.batch"), "a Job that erases the output", log)


class _operator:  # noqa: N801  reads as a function
    """The operator as a process of this machine with its ServiceAccount; the value is its log."""

    def __init__(self, cluster: Cluster, folder: Path, release: str, **more: str) -> None:
        self._kubeconfig, self._log = folder / "kubeconfig", folder / "log"
        given = yaml.safe_load(cluster.kubeconfig.read_text())
        token = ("create", "token", release, "--namespace", NAMESPACE)
        user = {"token": cluster.kubectl(*token).stdout.strip()}
        given["users"] = [{"name": entry["name"], "user": user} for entry in given["users"]]
        self._kubeconfig.write_text(yaml.safe_dump(given))
        self._settings = {
            "own-namespace": NAMESPACE,
            "progress-url": f"https://{release}.{NAMESPACE}.svc:8443",
            "progress-port": "0",
            "metrics-port": "0",
            "lease": f"{release}-operator",
            "tls-secret": f"{release}-tls",
            **more,
        }

    def __enter__(self) -> Path:
        flags = [f"--{key}={value}" for key, value in self._settings.items()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from tuneyard.cli.main import main; main()",
                    "operator",
                    *flags,
                ],
                env={**os.environ, "KUBECONFIG": str(self._kubeconfig)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self._log

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _wait(done: Callable[[], Any], what: str, log: Path | None = None) -> None:
    limit = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > limit:
            pytest.fail(f"{what} did not happen in time\n{log.read_text()[-3000:] if log else ''}")
        time.sleep(0.2)
