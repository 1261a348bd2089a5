"""Test that a rig is a real Kubernetes and that nothing of it is left when it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from rig import build, cgroups, images, machine
from rig.errors import RigError
from rig.plugin import Cluster
from rig.ports import Reservation
from rig.rig import Rig, bring_up, take_down
from rig.state import Level

NOT_A_RIG = "this tests the rig itself, and TUNEYARD_TEST_KUBECONFIG names another cluster"
TESTS = Path(__file__).resolve().parents[1]

# A process that brings a rig up, prints the rig's folder and sleeps until it is killed.
OWNER = """
import sys, time
from rig.rig import bring_up
print(bring_up(sys.argv[1]).state.root, flush=True)
time.sleep(600)
"""


def wait_until(condition: Callable[[], object], timeout_seconds: float = 30) -> None:
    """Poll the condition; fail the test after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition is not true after {timeout_seconds} s"
        time.sleep(0.05)


def processes_of(root: Path) -> list[str]:
    """Return the command lines of all processes on this machine that name the rig's folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(root) in line:
            lines.append(line)
    return lines


def mounts_of(root: Path) -> list[str]:
    return [line for line in Path("/proc/mounts").read_text().splitlines() if str(root) in line]


def python_of(cluster: Cluster) -> str:
    """Return the Python of a pod: on a rig the base interpreter, which the image never hides."""
    return "python" if cluster.rig is None else str(Path(sys.base_prefix) / "bin" / "python3")


def cgroups_of(name: str) -> list[Path]:
    return [*cgroups.ROOT.glob(f"*/{name}*"), *cgroups.ROOT.glob(f"{name}*")]


def kill_owner_of_a_new_rig(level: Level) -> tuple[Path, str]:
    """Start a process that brings a rig up and kill it; return the rig's folder and name."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, level],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    root = Path(owner.stdout.readline().strip())
    name = json.loads((root / "settings.json").read_text())["name"]
    assert processes_of(root), "the rig runs before its owner is killed"
    owner.kill()
    owner.communicate()
    return root, name


@pytest.fixture
def own_rig(apiserver: Cluster) -> Iterator[Rig]:
    """A second rig, for a test that damages it."""
    if apiserver.rig is None:
        pytest.skip(NOT_A_RIG)
    rig = bring_up("control")
    yield rig
    take_down(rig.state.root)


def test_a_checkout_below_tmp_is_named_at_once_with_a_remedy() -> None:
    """Pods mount an empty /tmp: they failed after two silent minutes, for want of the program."""
    below = Path("/tmp/checkout")
    reason = images.invisible_to_pods(Path("/"), needed=[Path(sys.base_prefix), below])
    assert reason is not None
    assert reason.startswith("/tmp/checkout is below /tmp, where pods have a volume of their own")
    assert "move the checkout" in reason
    assert images.invisible_to_pods(Path("/"), needed=[Path("/usr")]) is None


@pytest.mark.apiserver
def test_the_api_server_is_ready_and_knows_its_version(apiserver: Cluster) -> None:
    assert apiserver.kubectl("get", "--raw", "/readyz").stdout == "ok"
    version = json.loads(apiserver.kubectl("get", "--raw", "/version").stdout)
    assert version["gitVersion"].startswith("v1."), "charts reject a server without a version"


@pytest.mark.apiserver
def test_a_new_namespace_gets_its_default_service_account(apiserver: Cluster) -> None:
    apiserver.kubectl("create", "namespace", "rig-controllers")
    arguments = ("--namespace=rig-controllers", "wait", "--for=create", "--timeout=30s")
    apiserver.kubectl(*arguments, "serviceaccount/default")
    apiserver.kubectl("delete", "namespace", "rig-controllers", "--wait=false")


@pytest.mark.apiserver
def test_kuberays_kinds_are_served_although_kuberay_does_not_run(apiserver: Cluster) -> None:
    condition = "--for=condition=Established"
    apiserver.kubectl("wait", condition, "--timeout=30s", "crd/rayjobs.ray.io")
    assert "No resources found" in apiserver.kubectl("get", "rayjobs").stderr


@pytest.mark.apiserver
def test_a_rejected_object_raises_with_the_message_of_the_server(apiserver: Cluster) -> None:
    manifest = '{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "Not_A_Name"}}'
    with pytest.raises(RigError, match="Not_A_Name"):
        apiserver.kubectl("create", "--filename=-", input=manifest)
    rejected = apiserver.kubectl("create", "--filename=-", input=manifest, check=False)
    assert rejected.returncode != 0


@pytest.mark.apiserver
def test_two_rigs_run_at_the_same_time(apiserver: Cluster, own_rig: Rig) -> None:
    assert own_rig.url != apiserver.url
    other = Cluster(own_rig.kubeconfig, own_rig.url, own_rig.programs / "kubectl")
    other.kubectl("create", "namespace", "only-there")
    assert "only-there" not in apiserver.kubectl("get", "namespaces").stdout


@pytest.mark.apiserver
def test_down_leaves_no_process_and_no_file_and_may_be_repeated(own_rig: Rig) -> None:
    root = own_rig.state.root
    assert processes_of(root)
    assert take_down(root)
    wait_until(lambda: not processes_of(root))  # the process that cleans up ends last
    assert not root.exists()
    assert not take_down(root)


@pytest.mark.apiserver
def test_the_rig_ends_when_its_owner_is_killed(apiserver: Cluster) -> None:
    if apiserver.rig is None:
        pytest.skip(NOT_A_RIG)
    root, _ = kill_owner_of_a_new_rig("control")
    wait_until(lambda: not root.exists())
    wait_until(lambda: not processes_of(root))  # the process that cleans up ends last


@pytest.mark.apiserver
def test_the_servers_end_when_the_keeper_is_killed_and_down_removes_the_files(own_rig: Rig) -> None:
    root = own_rig.state.root
    keeper = own_rig.state.process("keeper")
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)
    wait_until(lambda: processes_of(root) == [])
    assert take_down(root)
    assert not root.exists()


def _is_another(rig: Rig, name: str, first: int) -> bool:
    """Return whether the server runs in another process."""
    return rig.server(name) not in (None, first)


@pytest.mark.apiserver
def test_a_server_that_is_killed_starts_again_with_its_data(own_rig: Rig) -> None:
    own = Cluster(own_rig.kubeconfig, own_rig.url, own_rig.programs / "kubectl")
    own.kubectl("create", "namespace", "kept")
    for name in ("kube-apiserver", "etcd"):
        first = own_rig.server(name)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(partial(_is_another, own_rig, name, first))
    wait_until(lambda: own.kubectl("get", "namespace", "kept", check=False).returncode == 0)


@pytest.mark.apiserver
def test_a_rig_that_cannot_start_gives_the_reason_and_leaves_nothing(
    own_rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "etcd").symlink_to("/bin/false")
    (programs / "kube-apiserver").symlink_to(own_rig.programs / "kube-apiserver")
    monkeypatch.setattr(build, "ensure", lambda names: dict.fromkeys(names, programs))
    folder = tmp_path / "rig"
    with pytest.raises(RigError, match="etcd ended while waiting"):
        bring_up("control", folder=folder)
    assert not folder.exists()
    assert processes_of(folder) == []


@pytest.mark.cluster
def test_a_pod_runs_this_machines_python_to_completion(cluster: Cluster) -> None:
    assert cluster.image is not None
    command = ("--command", "--", python_of(cluster), "-c", "print(6 * 7)")
    cluster.kubectl("run", "rig-python", "--image", cluster.image, "--restart=Never", *command)
    succeeded = "--for=jsonpath={.status.phase}=Succeeded"
    cluster.kubectl("wait", succeeded, "--timeout=60s", "pod/rig-python")
    assert cluster.kubectl("logs", "rig-python").stdout == "42\n"
    cluster.kubectl("delete", "pod", "rig-python")


@pytest.mark.cluster
def test_a_pod_finds_a_service_by_its_name(cluster: Cluster) -> None:
    assert cluster.image is not None
    code = "import socket; socket.create_connection(('kubernetes.default', 443), 30)"
    command = ("--command", "--", python_of(cluster), "-c", code)
    cluster.kubectl("run", "rig-names", "--image", cluster.image, "--restart=Never", *command)
    succeeded = "--for=jsonpath={.status.phase}=Succeeded"
    cluster.kubectl("wait", succeeded, "--timeout=60s", "pod/rig-names")
    cluster.kubectl("delete", "pod", "rig-names")


@pytest.mark.cluster
def test_kuberay_handles_a_rayjob(cluster: Cluster) -> None:
    container = {"name": "ray", "image": cluster.image}
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}
    spec = {
        "suspend": True,
        "shutdownAfterJobFinishes": True,  # KubeRay suspends a RayJob only with this setting
        "entrypoint": "true",
        "rayClusterSpec": {"headGroupSpec": head},
    }
    rayjob = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "rig-suspended"},
        "spec": spec,
    }
    cluster.kubectl("create", "--filename=-", input=json.dumps(rayjob))
    suspended = "--for=jsonpath={.status.jobDeploymentStatus}=Suspended"
    cluster.kubectl("wait", suspended, "--timeout=60s", "rayjob/rig-suspended")
    cluster.kubectl("delete", "rayjob", "rig-suspended")


@pytest.mark.cluster
def test_no_packet_can_leave_the_node(cluster: Cluster) -> None:
    if cluster.rig is None:
        pytest.skip(NOT_A_RIG)
    routes = cluster.exec("ip", "route", "show", "table", "all").stdout
    assert "10.96.0.0/16" in routes, "these are the routes of the node"
    assert "default" not in routes


@pytest.mark.cluster
def test_a_node_leaves_no_process_mount_or_cgroup_when_its_owner_is_killed(
    cluster: Cluster,
) -> None:
    if cluster.rig is None:
        pytest.skip(NOT_A_RIG)
    root, name = kill_owner_of_a_new_rig("node")
    wait_until(lambda: not root.exists())
    wait_until(lambda: not processes_of(root))  # the process that cleans up ends last
    assert mounts_of(root) == []
    assert cgroups_of(name) == []
    assert cgroups_of(cluster.rig.state.settings.name), "the cgroup of the other rig remains"


def test_an_installation_starts_no_service_and_restores_the_policy_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, calls = tmp_path / "policy-rc.d", []

    def apt(command: list[str], **_: object) -> None:
        allowed = subprocess.run([policy, "prometheus", "start"], check=False)
        calls.append((command[1], allowed.returncode))

    monkeypatch.setattr(machine, "SERVICE_POLICY", policy)
    monkeypatch.setattr(machine, "TOOLS", {"no-such-program": "its-package"})
    monkeypatch.setattr(machine, "_missing_packages", lambda _: [])
    monkeypatch.setattr(machine, "_apt_get", apt)
    assert machine.install_packages("node") == ["its-package"]
    assert calls == [("update", 101), ("install", 101)]
    assert not policy.exists()


def test_two_rigs_never_get_the_same_port() -> None:
    with Reservation() as one, Reservation() as other:
        ports = [reservation.take() for _ in range(50) for reservation in (one, other)]
    assert len(set(ports)) == len(ports)


def hiding_entries(root: Path, archive: Path) -> set[str]:
    """Return the entries of the layer that hides parts of the folder."""
    images.write_folder_image(archive, "rig.local/test:1", root, "/bin")
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("1.tar")
        assert layer is not None
        with tarfile.open(fileobj=io.BytesIO(layer.read())) as inner:
            return set(inner.getnames())


def test_an_image_of_a_folder_hides_credentials_but_not_interpreters(tmp_path: Path) -> None:
    for name in ("root/.aws", "root/.netrc", "root/.pyenv", "root/work", "tmp"):
        (tmp_path / name).mkdir(parents=True)
    names = hiding_entries(tmp_path, tmp_path / "image.tar")
    assert names == {"root", "root/.wh..aws", "root/.wh..netrc", "tmp", "tmp/.wh..wh..opq"}


def test_a_checkout_in_a_scratch_folder_stays_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tmp/checkout", "tmp/other", "run"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(images, "NEEDED", (tmp_path / "tmp/checkout/.venv",))
    names = hiding_entries(tmp_path, tmp_path / "image.tar")
    assert names == {"run", "run/.wh..wh..opq", "tmp", "tmp/.wh.other", "tmp/checkout"}


@pytest.mark.skipif(build.find_go() is None, reason="needs Go to build")
def test_simultaneous_builds_create_one_entry_and_a_later_build_uses_it(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "rig"), "build", "--only", "pause"]
    environment = {**os.environ, "TUNEYARD_CACHE": str(tmp_path)}
    builds = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {process.communicate()[0].split()[1] for process in builds}
    assert len(folders) == 1
    assert [path.name for path in (tmp_path / "bin").glob("*/pause")] == ["pause"]
    later = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "(cached)" in later.stdout
    assert not list((tmp_path / "bin").glob(".*"))
