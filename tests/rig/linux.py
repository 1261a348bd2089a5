"""System calls that the standard library of Python 3.11 does not offer."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

NEW_MOUNTS = 0x00020000
NEW_UTS = 0x04000000
NEW_IPC = 0x08000000
NEW_PIDS = 0x20000000
NEW_NETWORK = 0x40000000

_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Move this process into new namespaces; a new pid namespace applies to its children only."""
    _check(_libc.unshare(flags), "unshare")


def enter_network_of(pid: int) -> None:
    """Open further sockets of this process in the network of `pid`; open sockets do not move."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(namespace, NEW_NETWORK), "setns")
    finally:
        os.close(namespace)


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends for any reason."""
    _check(_libc.prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that this process can wait for all of them."""
    _check(_libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def start_time(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if the process has ended.

    Pid and start time together identify a process, even after the pid is reused.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
