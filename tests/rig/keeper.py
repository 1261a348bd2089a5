"""The process outside of the rig: it starts the rig, ends it and removes its files.

The keeper ends the rig on SIGTERM, and also when the process that asked for the rig has ended for
any reason. If the keeper itself is killed, the kernel ends the rig and `down` removes the files.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rig import cgroups, forward, linux, pki
from rig.errors import RigError
from rig.state import State

PACKAGE = Path(__file__).resolve().parent
END_SECONDS = 20

_INNER_NAMESPACES = linux.NEW_MOUNTS | linux.NEW_NETWORK | linux.NEW_IPC | linux.NEW_UTS


def command(role: str, state: State) -> list[str]:
    """Return the command line of one of the rig's processes, isolated from user Python settings."""
    return [sys.executable, "-I", str(PACKAGE), role, str(state.root)]


def keep(state: State, owner: int | None) -> None:
    """Run the rig until SIGTERM, or until the process behind the pidfd `owner` has ended."""
    linux.adopt_orphans()
    state.record_process("keeper", os.getpid())
    try:
        asyncio.run(_keep(state, owner))
    finally:
        _kill_supervisor(state)
        _wait_until(_reap_children, "every process of the rig has ended")
        clean_up(state)


def clean_up(state: State) -> None:
    """End the rig's remaining processes and remove its cgroup and files. Safe to repeat."""
    _kill_supervisor(state)
    _remove_cgroup(state)
    _copy_logs(state)
    _remove_files(state.root)


def _kill_supervisor(state: State) -> None:
    supervisor = state.process("supervisor")
    if supervisor is not None and supervisor.alive:
        os.kill(supervisor.pid, signal.SIGKILL)
        # As pid 1 it ends only after every other process of its namespace.
        _wait_until(lambda: not supervisor.alive, "the supervisor has ended")


async def _keep(state: State, owner: int | None) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if owner is not None:
        loop.add_reader(owner, stop.set)
    try:
        await _run(state, stop)
    except Exception as error:
        state.write_atomically(state.failed, f"{type(error).__name__}: {error}")
        await stop.wait()
        raise


async def _run(state: State, stop: asyncio.Event) -> None:
    pki.write(state)
    settings = state.settings
    isolated = settings.level == "node"
    listener = forward.listen(settings.ports["api"]) if isolated else None
    supervisor = _start_supervisor(state, isolated)
    ended = os.pidfd_open(supervisor.pid)
    asyncio.get_running_loop().add_reader(ended, _report_supervisor_end, state, ended)
    if listener is not None:
        await forward.serve(listener, supervisor.pid)
    await stop.wait()


def _start_supervisor(state: State, isolated: bool) -> subprocess.Popen[bytes]:
    if isolated:
        # This process keeps its namespace; its next child becomes pid 1 of the new one.
        linux.unshare(linux.NEW_PIDS)
    with (state.logs / "supervisor.log").open("ab") as log:
        supervisor = subprocess.Popen(
            command("supervise", state),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_isolate if isolated else linux.end_with_parent,
        )
    state.record_process("supervisor", supervisor.pid)
    return supervisor


def _isolate() -> None:
    linux.unshare(_INNER_NAMESPACES)
    linux.end_with_parent()


def _report_supervisor_end(state: State, ended: int) -> None:
    """Report a failure to processes that wait for the rig: the supervisor only ends if killed."""
    asyncio.get_running_loop().remove_reader(ended)
    if not state.failed.exists():
        state.write_atomically(state.failed, "the supervisor was killed")


def _reap_children() -> bool:
    """Reap ended children; return whether none is left. They include the supervisor's orphans."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            continue
    except ChildProcessError:
        return True
    return False


def _remove_cgroup(state: State) -> None:
    try:
        settings = state.settings
    except FileNotFoundError:
        return
    if settings.level == "node":
        cgroups.remove(settings.name)


def _copy_logs(state: State) -> None:
    """Copy the logs to `TUNEYARD_RIG_LOGS`, for machines that are deleted after the tests."""
    target = os.environ.get("TUNEYARD_RIG_LOGS")
    if target and state.logs.is_dir():
        shutil.copytree(state.logs, Path(target) / state.root.name, dirs_exist_ok=True)


def _remove_files(root: Path) -> None:
    """Remove the folder; raise RigError if it has a mount, which may be the machine's root."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    if left := [line for line in mounts if line.split()[1].startswith(str(root))]:
        raise RigError(f"{root} was not removed because it has mounts: {left}; unmount them")
    _wait_until(lambda: _remove(root), f"{root} is removed")


def _remove(root: Path) -> bool:
    """Return whether the folder is removed: a server that is being killed may still write to it."""
    try:
        shutil.rmtree(root)
    except FileNotFoundError:
        return not root.exists()
    except OSError:
        return False
    return True


def _wait_until(condition: Callable[[], bool], description: str) -> None:
    """Poll the condition; raise RigError after `END_SECONDS`."""
    deadline = time.monotonic() + END_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RigError(f"not true after {END_SECONDS} s: {description}")
        time.sleep(0.02)
