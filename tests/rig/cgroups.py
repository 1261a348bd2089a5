"""The cgroup under which the rig's pods run, in either version of the hierarchy.

Unlike mounts and processes it belongs to no namespace and outlives the node: the keeper removes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids", "hugetlb")
REMOVE_SECONDS = 5


def create(name: str) -> None:
    """Make the cgroup, with every controller the kubelet asks for, before the kubelet looks."""
    if _is_unified():
        _enable_controllers()
    for hierarchy in _hierarchies():
        # Beside version 1 hierarchies, "unified" is a version 2 without controllers: not ours.
        if hierarchy.name == "unified":
            continue
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        # In version 1 a new cpuset is empty, and no process may enter it.
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not _is_unified() and (group / file).exists():
                (group / file).write_text((hierarchy / file).read_text())


def remove(name: str) -> None:
    """Remove the cgroup and all below it. Its processes have ended or are about to.

    From every hierarchy: runc makes one of the same name even in those that the kubelet never sees.
    """
    for hierarchy in _hierarchies():
        for folder, _, _ in os.walk(hierarchy / name, topdown=False):
            _remove_folder(folder)


def _hierarchies() -> Iterator[Path]:
    if _is_unified():
        yield ROOT
        return
    for path in sorted(ROOT.iterdir()) if ROOT.is_dir() else ():
        # Links are second names: cpu -> cpu,cpuacct.
        if path.is_dir() and not path.is_symlink():
            yield path


def _is_unified() -> bool:
    return (ROOT / "cgroup.controllers").exists()


def _enable_controllers() -> None:
    available = (ROOT / "cgroup.controllers").read_text().split()
    for controller in set(CONTROLLERS) & set(available):
        try:
            (ROOT / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            # Refused where the root holds processes (a container): the kubelet names what it lacks.
            continue


def _remove_folder(folder: str) -> None:
    """A cgroup stays busy for a moment after its last process has gone."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            Path(folder).rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
