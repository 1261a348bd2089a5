"""pytest fixtures for tests that need a real Kubernetes.

Load it with `pytest_plugins = ["rig.plugin"]` and `pythonpath = ["tests"]`. Importing it starts
nothing and needs nothing, so a machine without Kubernetes still collects every test.

- `TUNEYARD_TEST_KUBECONFIG=FILE`: use that cluster (kind, say), which has KubeRay, and no rig.
  Tests of queues are skipped there if it has no Kueue.
- `TUNEYARD_TEST_IMAGE=NAME`: the image for pods on that cluster.
- `TUNEYARD_TEST_IMAGE_ROOT=FOLDER`: the folder that acts as the image on a rig. Unset it is the
  machine's root, so that the pods have the very environment that runs the tests.
- `TUNEYARD_REQUIRE_CLUSTER=1`: fail where a test would skip. For CI.
- `TUNEYARD_RIG_LOGS=FOLDER`: keep the logs of every rig there.
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
from rig.rig import KubeRay, Rig, bring_up, take_down, targets
from rig.state import Level

IMAGE = "rig.local/machine:1"
RIGS: dict[str, tuple[Level, KubeRay]] = {
    "apiserver": ("control", "crds"),
    "cluster": ("node", "running"),
}
"""What each fixture brings up."""


@dataclass(frozen=True)
class Cluster:
    """A Kubernetes that a test may use, wherever it comes from."""

    kubeconfig: Path
    url: str
    program: Path
    """The kubectl to use."""
    image: str | None = None
    """An image for pods, with Python and Tuneyard in it; None if there are no pods."""
    rig: Rig | None = None
    """The rig behind it; None for a cluster that was given."""

    def kubectl(
        self, *arguments: str, input: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl. With `check` a failure raises, and the message is what kubectl said."""
        command = [str(self.program), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, check=False, input=input, capture_output=True, text=True)
        if check and done.returncode:
            raise RigError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def define(self, folder: Path) -> None:
        """Serve the kinds that a folder defines, whoever has defined them before (Helm, say)."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "--filename", str(folder))
        established = ("--for=condition=Established", "--timeout=60s")
        self.kubectl("wait", *established, "--filename", str(folder))

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command where the addresses of pods and services exist."""
        if self.rig is None:
            raise RigError("only a rig can run commands inside its node's network")
        inside, environment = self.rig.inside(command), self.rig.environment()
        return subprocess.run(inside, check=False, env=environment, capture_output=True, text=True)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "apiserver: needs a real Kubernetes API server")
    config.addinivalue_line("markers", "cluster: needs a real Kubernetes node with KubeRay")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds what the chosen tests need before any of them runs: each has a time limit, and a first
    build takes minutes. What cannot be built is said by the fixture that needs it."""
    if session.config.option.collectonly:
        return
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    names = ["helm"] if "helm" in wanted and build.find_go() else []
    if not os.environ.get("TUNEYARD_TEST_KUBECONFIG"):
        for fixture, (level, kuberay) in RIGS.items():
            kueue = level == "node"
            if fixture in wanted and not machine.why_not(level, kuberay, kueue):
                names += targets(level, kuberay, kueue)
    if unbuilt := build.missing(names):
        capture = session.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            print(f"\nbuilding {', '.join(unbuilt)}: minutes, once per machine", flush=True)
        with suppress(RigError):
            build.ensure(names)


@pytest.fixture(scope="session")
def apiserver() -> Iterator[Cluster]:
    """An API server with KubeRay's definitions and the built-in controllers; it runs no pod."""
    yield from _cluster(*RIGS["apiserver"])


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with one node, KubeRay and Kueue, whose pods can use `cluster.image`."""
    yield from _cluster(*RIGS["cluster"])


@pytest.fixture(scope="session")
def helm() -> Path:
    """The helm program, for rendering the chart; it needs no cluster."""
    if build.missing(["helm"]) and build.find_go() is None:
        _give_up("needs Go 1.26 to build helm")
    return build.ensure(["helm"])["helm"] / "helm"


@pytest.fixture(scope="session")
def promtool() -> Path:
    """Prometheus' own checker: `promtool check metrics` reads an exposition on standard input."""
    return _tool("promtool")


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """The Prometheus server's program."""
    return _tool("prometheus")


def _tool(name: str) -> Path:
    path = machine.find_tool(name)
    if path is None:
        _give_up(f"needs {name} (`python tests/rig deps` installs it)")
    return path


def _cluster(level: Level, kuberay: KubeRay) -> Iterator[Cluster]:
    if given := os.environ.get("TUNEYARD_TEST_KUBECONFIG"):
        yield _given_cluster(Path(given))
        return
    kueue = level == "node"
    if reason := machine.why_not(level, kuberay, kueue):
        _give_up(reason)
    folders = {IMAGE: _image_root()} if level == "node" else {}
    rig = bring_up(level, kuberay=kuberay, kueue=kueue, images=folders)
    try:
        kubectl = rig.programs / "kubectl"
        yield Cluster(rig.kubeconfig, rig.url, kubectl, IMAGE if folders else None, rig)
    finally:
        take_down(rig.state.root)


def _image_root() -> Path:
    root = Path(os.environ.get("TUNEYARD_TEST_IMAGE_ROOT", "/"))
    if missing := images.out_of_reach(root):
        _give_up(f"needs {missing} on the filesystem of {root}, which is what pods see")
    return root


def _given_cluster(kubeconfig: Path) -> Cluster:
    found = shutil.which("kubectl")
    program = Path(found) if found else build.ensure(["kubernetes"])["kubernetes"] / "kubectl"
    cluster = Cluster(kubeconfig, "", program, os.environ.get("TUNEYARD_TEST_IMAGE"))
    path = "jsonpath={.clusters[0].cluster.server}"
    url = cluster.kubectl("config", "view", "--minify", "--output", path).stdout
    return Cluster(kubeconfig, url, program, cluster.image)


def _give_up(reason: str) -> NoReturn:
    """Skip, or fail where Kubernetes is required: a skip in CI would hide that nothing ran."""
    if os.environ.get("TUNEYARD_REQUIRE_CLUSTER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
