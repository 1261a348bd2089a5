"""The Dockerfile, built by buildah on a base image of Debian's packages: no registry is needed.

Needs root, buildah, debootstrap, a Debian mirror and a package index. `TUNEYARD_TEST_BASE` names
another base image, for instance python:3.12-slim. The trainer's own packages, 6 GB, are left out:
its stages are built with the few packages of the wheel's build in their place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig import machine

from tests.chart.rendering import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BASE = "localhost/tuneyard-test-base"
CERTIFICATES = Path("/etc/ssl/certs")
LIMIT_BYTES = 250 * 10**6
# Folders that Debian's slim images leave out.
NOT_IN_SLIM = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info")


@dataclass(frozen=True)
class Buildah:
    """Build images in a separate store and run them."""

    store: Path

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        where = ("--root", f"{self.store}/images", "--runroot", f"{self.store}/run")
        command = [str(machine.find_tool("buildah")), *where, "--storage-driver", "vfs", *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{arguments[0]}: {(done.stdout + done.stderr)[-3000:]}")
        return done

    def build(self, target: str, base: str, **arguments: str) -> str:
        """Build an image and return a container of it. The build can read this machine's
        certificates. `arguments`: the build arguments besides the base."""
        name = f"localhost/tuneyard-{target}"
        network = ["--isolation", "chroot", "--network", "host"]
        if CERTIFICATES.is_dir():
            network += ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        values = {"BASE": base, **arguments}
        given = [f"--build-arg={key}={value}" for key, value in values.items()]
        self.run("bud", *network, *given, "--target", target, "--tag", name, str(ROOT))
        return self.start(name)

    def start(self, image: str) -> str:
        return self.run("from", image).stdout.strip()

    def size(self, container: str) -> int:
        """Return the bytes of the unpacked image, with its base."""
        root = Path(self.run("mount", container).stdout.strip())
        files = [path.lstat() for path in root.rglob("*")]
        return sum({file.st_ino: file.st_size for file in files}.values())  # links count once

    def call(self, container: str, *command: str) -> str:
        """Run a command in the container as the image's user; return its output."""
        return self.run("run", "--isolation", "chroot", container, "--", *command).stdout


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if os.geteuid() != 0:
        _give_up("needs root")
    if missing := [name for name in ("buildah", "debootstrap") if not machine.find_tool(name)]:
        _give_up(f"needs {' and '.join(missing)} (`python tests/rig deps` installs them)")
    store = tmp_path_factory.mktemp("buildah")
    yield Buildah(store)
    shutil.rmtree(store, ignore_errors=True)


@pytest.fixture(scope="module")
def base(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> str:
    if given := os.environ.get("TUNEYARD_TEST_BASE"):
        return given
    root = tmp_path_factory.mktemp("base")
    if mirror := _mirror():
        _debootstrap(root, mirror)
    else:
        _give_up("needs a Debian mirror among apt's sources")
    container = buildah.start("scratch")
    buildah.run("add", "--quiet", container, str(root), "/")
    buildah.run("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)
    return BASE


@pytest.fixture(scope="module")
def operator(buildah: Buildah, base: str) -> str:
    return buildah.build("operator", base)


def test_the_operators_image_is_small(buildah: Buildah, operator: str) -> None:
    """With its base: measured 230 MB, 125 of them the base."""
    size = buildah.size(operator)
    print(f"the operator's image: {size / 1e6:.0f} MB")
    assert size < LIMIT_BYTES


def test_the_operators_image_runs_the_operator_without_privileges(
    buildah: Buildah, operator: str
) -> None:
    assert buildah.call(operator, "id", "-u").strip() == "1000"
    assert "--progress-url" in buildah.call(operator, "tuneyard", "operator", "--help")
    writable = buildah.call(operator, "find", "/opt/tuneyard", "-writable", "-not", "-type", "l")
    assert writable == ""


def test_the_operators_image_has_neither_torch_nor_ray_nor_an_installer(
    buildah: Buildah, operator: str
) -> None:
    script = "import importlib.util as u; print(*(u.find_spec(n) for n in ('torch', 'ray', 'pip')))"
    assert buildah.call(operator, "python", "-c", script).split() == ["None"] * 3


def test_the_image_keeps_the_client_classes_that_the_lease_needs(
    buildah: Buildah, operator: str
) -> None:
    """The client loads its classes at their first use, so an import alone proves little."""
    use = (
        "from kubernetes.aio import client as c; import kopf, kubernetes.aio.leaderelection;"
        "c.CoordinationV1Api; c.V1ObjectMeta; print(c.V1Lease(spec=c.V1LeaseSpec()).spec)"
    )
    assert "lease_duration_seconds" in buildah.call(operator, "python", "-c", use)


def test_the_trainers_image_has_the_programs_that_kuberay_calls(
    buildah: Buildah, base: str
) -> None:
    """KubeRay's commands start with bash, optionally as a login shell."""
    trainer = buildah.build("trainer", base, REQUIREMENTS="build.txt")
    for shell in ("-c", "-lc"):
        said = buildah.call(trainer, "/bin/bash", shell, "command -v python; command -v tuneyard")
        assert said.split() == ["/opt/tuneyard/bin/python", "/opt/tuneyard/bin/tuneyard"]
    where = "import tuneyard_trainer; print(tuneyard_trainer.__file__)"
    assert buildah.call(trainer, "python", "-c", where).startswith("/opt/tuneyard/lib/")


def test_the_trainers_image_has_by_default_the_packages_of_requirements_image_txt() -> None:
    """The build above names others."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^ARG REQUIREMENTS=(.*)$", text, re.MULTILINE) == ["image.txt"]
    assert "trl==" in (ROOT / "requirements" / "image.txt").read_text()


def _give_up(reason: str) -> None:
    """Skip the test, or fail it where tests must not be skipped."""
    if os.environ.get("TUNEYARD_REQUIRE_CLUSTER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _mirror() -> str | None:
    """Return the first of this machine's mirrors that has its release; None: none has."""
    if shutil.which("apt-get") is None:
        return None
    form = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Identifier: Packages"]
    done = subprocess.run(form, check=False, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        address, release = line.rsplit(" ", 1)
        if release == _release():
            return address
    return None


def _release() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return next((line.split("=")[1] for line in lines if line.startswith("VERSION_CODENAME=")), "")


def _debootstrap(root: Path, mirror: str) -> None:
    """Make a root file system like python:3.12-slim's."""
    packages = "--include=ca-certificates,python3,python3-venv"
    command = [
        str(machine.find_tool("debootstrap")),
        "--variant=minbase",
        packages,
        _release(),
        str(root),
        mirror,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    for folder in (*NOT_IN_SLIM, "var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / folder, ignore_errors=True)
