"""Create and remove the cgroup of the rig's pods, in cgroup version 1 or 2.

Unlike mounts and processes, a cgroup belongs to no namespace and remains when the node ends.
The keeper therefore removes it.
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
    """Create the cgroup with every controller that the kubelet needs. Call it before the kubelet
    starts."""
    if _is_unified():
        _enable_controllers()
    for hierarchy in _hierarchies():
        # Next to version 1 hierarchies, "unified" is a version 2 hierarchy without controllers.
        if hierarchy.name == "unified":
            continue
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        # In version 1 a new cpuset is empty and accepts no process.
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not _is_unified() and (group / file).exists():
                (group / file).write_text((hierarchy / file).read_text())


def remove(name: str) -> None:
    """Remove the cgroup and its children from every hierarchy, once their processes have ended.

    runc creates a cgroup of the same name even in hierarchies that the kubelet does not use.
    """
    for hierarchy in _hierarchies():
        for folder, _, _ in os.walk(hierarchy / name, topdown=False):
            _remove_folder(folder)


def _hierarchies() -> Iterator[Path]:
    """Yield the mounted hierarchies: one in version 2, one per controller in version 1."""
    if _is_unified():
        yield ROOT
        return
    for path in sorted(ROOT.iterdir()) if ROOT.is_dir() else ():
        # A link is an alias: cpu -> cpu,cpuacct.
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
            # The kernel refuses this if the root has processes (in a container). The kubelet
            # reports a controller that it needs and lacks.
            continue


def _remove_folder(folder: str) -> None:
    """Remove a cgroup; retry, because it stays busy for a moment after its last process ends."""
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
