"""pytest fixtures for tests that need a real Kubernetes.

Load it with `-p rig.plugin` and `pythonpath = ["tests"]`. Its import starts nothing, so a machine
that cannot run a rig still collects every test.

- `TUNEYARD_TEST_KUBECONFIG=FILE`: use this cluster instead of a rig. It must have KubeRay; tests of
  queues are skipped if it has no Kueue.
- `TUNEYARD_TEST_IMAGE=NAME`: the image for pods on that cluster.
- `TUNEYARD_TEST_IMAGE_ROOT=FOLDER`: the folder that acts as the image on a rig. The default is the
  machine's root, so that pods have the environment that runs the tests.
- `TUNEYARD_REQUIRE_CLUSTER=1`: fail instead of skip. For CI.
- `TUNEYARD_RIG_LOGS=FOLDER`: keep the logs of every rig in this folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from rig import build, images, machine
from rig.errors import RigError
from rig.mlflow import MlflowServer, mlflow_server
from rig.rig import KubeRay, Rig, bring_up, take_down, targets
from rig.s3 import S3Server, s3_server
from rig.state import Level

IMAGE = "rig.local/machine:1"
RIGS: dict[str, tuple[Level, KubeRay]] = {
    "apiserver": ("control", "crds"),
    "cluster": ("node", "running"),
}
"""Fixture to the level of its rig and the state of KubeRay in it."""


@dataclass(frozen=True)
class Cluster:
    """A Kubernetes cluster for tests: a rig, or the cluster of `TUNEYARD_TEST_KUBECONFIG`."""

    kubeconfig: Path
    url: str
    program: Path
    """The path of kubectl."""
    image: str | None = None
    """An image for pods, with Python and Tuneyard; None if the cluster runs no pods."""
    rig: Rig | None = None
    """The rig of this cluster; None for the cluster of `TUNEYARD_TEST_KUBECONFIG`."""

    def kubectl(
        self, *arguments: str, input: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl. With `check`, a failure raises RigError with kubectl's message."""
        command = [str(self.program), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, check=False, input=input, capture_output=True, text=True)
        if check and done.returncode:
            raise RigError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def define(self, folder: Path) -> None:
        """Install the CRDs of a folder, even if another field manager (such as Helm) owns them."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "--filename", str(folder))
        established = ("--for=condition=Established", "--timeout=60s")
        self.kubectl("wait", *established, "--filename", str(folder))

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the node's network, where the addresses of pods and Services exist."""
        if self.rig is None:
            raise RigError("this cluster is not a rig, so no command can run in its node's network")
        inside, environment = self.rig.inside(command), self.rig.environment()
        return subprocess.run(inside, check=False, env=environment, capture_output=True, text=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "apiserver: needs a real Kubernetes API server")
    config.addinivalue_line("markers", "cluster: needs a real Kubernetes node with KubeRay")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the programs of the collected tests before the first test runs.

    A first build takes minutes and would exceed the time limit of a test. If a build fails, the
    fixture that needs the program reports it.
    """
    if session.config.option.collectonly:
        return
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    programs = {"helm": "helm", "s3": "versitygw"}
    names = [name for fixture, name in programs.items() if fixture in used and build.find_go()]
    if not os.environ.get("TUNEYARD_TEST_KUBECONFIG"):
        for fixture, (level, kuberay) in RIGS.items():
            kueue = level == "node"
            if fixture in used and not machine.missing_requirement(level, kuberay, kueue):
                names += targets(level, kuberay, kueue)
    if unbuilt := build.missing(names):
        capture = session.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            print(f"\nbuilding {', '.join(unbuilt)}: takes minutes, once per machine", flush=True)
        with suppress(RigError):
            build.ensure(names)


@pytest.fixture(scope="session")
def apiserver() -> Iterator[Cluster]:
    """An API server with KubeRay's CRDs and the built-in controllers; it runs no pod."""
    yield from _cluster(*RIGS["apiserver"])


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with one node, KubeRay and Kueue; its pods can use `cluster.image`."""
    yield from _cluster(*RIGS["cluster"])


@pytest.fixture(scope="session")
def helm() -> Path:
    """The path of helm, which renders the chart and needs no cluster."""
    return _built("helm")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with one empty bucket; it evaluates conditional writes as AWS does."""
    with s3_server(_built("versitygw"), tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """An MLflow tracking server. Tests share it: each has an experiment of its own."""
    try:
        with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
            yield server
    except RigError as error:
        _skip_or_fail(str(error))


@pytest.fixture(scope="session")
def promtool() -> Path:
    """The path of promtool: `promtool check metrics` checks an exposition on standard input."""
    return _tool("promtool")


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The path of Chromium, which needs no display when it is headless."""
    return _tool("chromium")


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """The path of the Prometheus server."""
    return _tool("prometheus")


def _built(name: str) -> Path:
    if build.missing([name]) and build.find_go() is None:
        _skip_or_fail(f"needs Go 1.26 to build {name}")
    try:
        return build.ensure([name])[name] / name
    except RigError as error:
        _skip_or_fail(str(error))


def _tool(name: str) -> Path:
    path = machine.find_tool(name)
    if path is None:
        _skip_or_fail(f"needs {name} (`python tests/rig deps` installs it)")
    return path


def _cluster(level: Level, kuberay: KubeRay) -> Iterator[Cluster]:
    if given := os.environ.get("TUNEYARD_TEST_KUBECONFIG"):
        yield _given_cluster(Path(given))
        return
    kueue = level == "node"
    if reason := machine.missing_requirement(level, kuberay, kueue):
        _skip_or_fail(reason)
    folders = {IMAGE: _image_root()} if level == "node" else {}
    rig = bring_up(level, kuberay=kuberay, kueue=kueue, images=folders)
    try:
        kubectl = rig.programs / "kubectl"
        yield Cluster(rig.kubeconfig, rig.url, kubectl, IMAGE if folders else None, rig)
    finally:
        take_down(rig.state.root)


def _image_root() -> Path:
    root = Path(os.environ.get("TUNEYARD_TEST_IMAGE_ROOT", "/"))
    if reason := images.invisible_to_pods(root):
        _skip_or_fail(reason)
    return root


def _given_cluster(kubeconfig: Path) -> Cluster:
    found = shutil.which("kubectl")
    program = Path(found) if found else build.ensure(["kubernetes"])["kubernetes"] / "kubectl"
    cluster = Cluster(kubeconfig, "", program, os.environ.get("TUNEYARD_TEST_IMAGE"))
    path = "jsonpath={.clusters[0].cluster.server}"
    url = cluster.kubectl("config", "view", "--minify", "--output", path).stdout
    return Cluster(kubeconfig, url, program, cluster.image)


def _skip_or_fail(reason: str) -> NoReturn:
    """Skip the test, or fail it if `TUNEYARD_REQUIRE_CLUSTER` is set."""
    if os.environ.get("TUNEYARD_REQUIRE_CLUSTER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
