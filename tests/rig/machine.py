"""Check whether this machine can run a rig, and install the missing packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rig import build, rig
from rig.containerd import plugin_folder
from rig.errors import RigError
from rig.state import Level

# Program to its Debian package. Programs are checked, not packages: a machine with Docker has its
# own containerd, which Debian's package would replace.
CONTROL_PROGRAMS = {"openssl": "openssl"}
NODE_PROGRAMS = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "ip": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "mount": "mount",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
PLUGINS_PACKAGE = "containernetworking-plugins"
# Programs of some tests; no rig needs them.
TOOLS = {
    "buildah": "buildah",
    "chromium": "chromium",
    "debootstrap": "debootstrap",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}

SERVICE_POLICY = Path("/usr/sbin/policy-rc.d")
"""The script that Debian's packages call before they start a service."""


def missing_requirement(
    level: Level, kuberay: rig.KubeRay = "no", kueue: bool = False
) -> str | None:
    """Return why this machine cannot run such a rig ("needs ..."), or None if it can."""
    if sys.platform != "linux":
        return "needs Linux"
    if level == "node" and os.geteuid() != 0:
        return "needs root"
    if packages := _missing_packages(level):
        return f"needs the packages {', '.join(packages)} (`python tests/rig deps` installs them)"
    unbuilt = build.missing(rig.targets(level, kuberay, kueue))
    if unbuilt and build.find_go() is None:
        return f"needs Go 1.26 to build {', '.join(unbuilt)}"
    if level == "node" and not _may_unshare():
        return "may not create namespaces (a container needs --privileged)"
    return None


def find_tool(name: str) -> Path | None:
    """Return the path of one of `TOOLS`, or None if it is not installed."""
    found = shutil.which(name, path=rig.SYSTEM_PATH)
    return Path(found) if found else None


def install_packages(level: Level) -> list[str]:
    """Install the missing packages with apt-get and return their names.

    The packages' services, such as containerd and prometheus, are not started.
    RigError: packages are missing, and this process is not root or apt-get does not exist.
    """
    tools = {TOOLS[name] for name in _absent(TOOLS)}
    packages = sorted({*_missing_packages(level), *tools})
    if not packages:
        return []
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise RigError(
            f"the packages {', '.join(packages)} are missing: install them, or run this command"
            " as root on a machine with apt-get"
        )
    with _services_forbidden():
        _apt_get(["apt-get", "update"])
        _apt_get(["apt-get", "install", "--yes", "--no-install-recommends", *packages])
    return packages


def _apt_get(command: list[str]) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, env=environment, check=True)


@contextmanager
def _services_forbidden() -> Iterator[None]:
    """Forbid services to start until the context ends.

    A machine that already has a policy, such as a container image, keeps it.
    """
    if SERVICE_POLICY.exists():
        yield
        return
    SERVICE_POLICY.write_text("#!/bin/sh\nexit 101\n")  # 101: forbidden
    SERVICE_POLICY.chmod(0o755)
    try:
        yield
    finally:
        SERVICE_POLICY.unlink()


def _missing_packages(level: Level) -> list[str]:
    programs = {**CONTROL_PROGRAMS, **(NODE_PROGRAMS if level == "node" else {})}
    packages = {programs[name] for name in _absent(programs)}
    if level == "node" and plugin_folder() is None:
        packages.add(PLUGINS_PACKAGE)
    return sorted(packages)


def _absent(programs: Iterable[str]) -> list[str]:
    return [name for name in programs if shutil.which(name, path=rig.SYSTEM_PATH) is None]


def _may_unshare() -> bool:
    """Return whether this process may create namespaces: root in a container often may not."""
    command = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
