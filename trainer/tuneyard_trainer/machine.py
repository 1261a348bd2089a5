"""The limits of this machine or pod: its memory, and the processors that it grants; and the
environment variables of this process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
"""The cgroups of this process, one a line: ID:CONTROLLERS:PATH."""
MOUNT = Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """While active, these variables have these values; afterwards, those from before."""
    with same_environment(values):
        os.environ.update(values)
        yield


@contextmanager
def same_environment(names: Iterable[str]) -> Iterator[None]:
    """Restore these variables afterwards, whatever sets them meanwhile."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def memory_limit() -> int:
    """Return the most bytes that the processes of this machine or pod may take together."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = _limit_files("memory", "memory.max", "memory.limit_in_bytes")
    return min([pages, *filter(None, map(_limit, files))])


def swap_limit() -> int:
    """Return the most bytes that they may have swapped out beside these."""
    limits = [_limit(path) for path in _limit_files("memory", "memory.swap.max", None)]
    return min([_swap(), *(limit for limit in limits if limit is not None)])


def cpu_limit() -> int:
    """Return the number of processors that the processes of this machine or pod may use together,
    at least 1. A quota such as 1.5 is rounded up."""
    granted = len(os.sched_getaffinity(0))
    quotas = [_quota(path) for path in _limit_files("cpu", "cpu.max", "cpu.cfs_quota_us")]
    return max(1, min([granted, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def _quota(path: Path) -> float | None:
    """Return the processors that a cgroup's file grants. None: there is no limit."""
    try:
        words = path.read_text().split()
        if path.name == "cpu.cfs_quota_us":  # version 1, in which -1 is no limit
            words.append(path.with_name("cpu.cfs_period_us").read_text().strip())
    except OSError:
        return None
    return int(words[0]) / int(words[1]) if words[0].isdecimal() else None


def _swap() -> int:
    """Return the bytes of this machine's swap space."""
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("SwapTotal:"))


def _limit_files(controller: str, second: str, first: str | None) -> Iterator[Path]:
    """Yield the files with the limits of this process's cgroups and of those around them. A
    container may see its own group as the root. `second`, `first`: the file's name in version 2 and
    in version 1 of cgroups; None: it has none."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = MOUNT / controller if controllers else MOUNT
        file = first if controllers else second
        group = Path(path)
        for each in (group, *group.parents) if file else ():
            yield mount / each.relative_to("/") / str(file)


def _limit(path: Path) -> int | None:
    """Return the limit in a cgroup's file. None: there is no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
