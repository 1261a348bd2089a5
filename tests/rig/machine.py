"""What this machine must have, why a rig cannot run on it, and how to add what is missing."""

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

# Program to the Debian package that holds it. Looked for one by one: a machine with Docker has a
# containerd of its own, which Debian's package would replace.
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
# What some tests use beside a rig; no rig needs them.
TOOLS = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}

SERVICE_POLICY = Path("/usr/sbin/policy-rc.d")
"""Asked by Debian's packages before they start a service."""


def why_not(level: Level, kuberay: rig.KubeRay = "no", kueue: bool = False) -> str | None:
    """Why such a rig cannot run here, in words for a skipped test; None if it can."""
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
    """The path of one of `TOOLS`; None if it is not installed."""
    found = shutil.which(name, path=rig.SYSTEM_PATH)
    return Path(found) if found else None


def install_packages(level: Level) -> list[str]:
    """Install what is missing with apt-get, as root; return the packages' names.

    Of containerd and prometheus the programs are wanted, not the services: none is started.
    """
    tools = {TOOLS[name] for name in _absent(TOOLS)}
    packages = sorted({*_missing_packages(level), *tools})
    if not packages:
        return []
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise RigError(f"install {', '.join(packages)}: that needs root and apt-get")
    with _services_forbidden():
        _apt_get(["apt-get", "update"])
        _apt_get(["apt-get", "install", "--yes", "--no-install-recommends", *packages])
    return packages


def _apt_get(command: list[str]) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, env=environment, check=True)


@contextmanager
def _services_forbidden() -> Iterator[None]:
    """A machine that has a policy, as container images do, keeps its own."""
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
    """Being root is not enough: in a container the namespaces may still be out of reach."""
    command = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
