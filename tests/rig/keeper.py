"""The process outside: it holds the rig's life in its hands and leaves nothing behind.

It ends the rig when told to, and also when the process that asked for the rig is gone, however that
one ended. If the keeper itself is killed, the kernel ends the rig, and `down` sweeps up the files.
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
    """How to run one of the rig's own processes, with nothing from the user's Python settings."""
    return [sys.executable, "-I", str(PACKAGE), role, str(state.root)]


def keep(state: State, owner: int | None) -> None:
    """Run the rig until SIGTERM, or until the process behind the pidfd `owner` has ended."""
    linux.adopt_orphans()
    state.record_process("keeper", os.getpid())
    try:
        asyncio.run(_keep(state, owner))
    finally:
        _kill_supervisor(state)
        _wait_until(_reaped, "every process of the rig has ended")
        sweep(state)


def sweep(state: State) -> None:
    """End what is left of the rig and remove its files. Safe to repeat."""
    _kill_supervisor(state)
    _remove_cgroup(state)
    _keep_logs(state)
    _remove_files(state.root)


def _kill_supervisor(state: State) -> None:
    supervisor = state.process("supervisor")
    if supervisor is not None and supervisor.alive:
        os.kill(supervisor.pid, signal.SIGKILL)
        # As pid 1 it has ended only when all the rest of its namespace has.
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
        state.announce(state.failed, f"{type(error).__name__}: {error}")
        await stop.wait()
        raise


async def _run(state: State, stop: asyncio.Event) -> None:
    pki.write(state)
    settings = state.settings
    isolated = settings.level == "node"
    door = forward.listen(settings.ports["api"]) if isolated else None
    supervisor = _start_supervisor(state, isolated)
    ended = os.pidfd_open(supervisor.pid)
    asyncio.get_running_loop().add_reader(ended, _note_end, state, ended)
    if door is not None:
        await forward.serve(door, supervisor.pid)
    await stop.wait()


def _start_supervisor(state: State, isolated: bool) -> subprocess.Popen[bytes]:
    if isolated:
        # This process stays where it is: the next child becomes pid 1 of the new namespace.
        linux.unshare(linux.NEW_PIDS)
    with (state.logs / "supervisor.log").open("ab") as log:
        supervisor = subprocess.Popen(
            command("supervise", state),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_isolate if isolated else linux.die_with_parent,
        )
    state.record_process("supervisor", supervisor.pid)
    return supervisor


def _isolate() -> None:
    linux.unshare(_INNER_NAMESPACES)
    linux.die_with_parent()


def _note_end(state: State, ended: int) -> None:
    """The supervisor never ends by itself; whoever waits for it must learn that it did."""
    asyncio.get_running_loop().remove_reader(ended)
    if not state.failed.exists():
        state.announce(state.failed, "the supervisor was killed")


def _reaped() -> bool:
    """Collect children that ended; true once none is left. The supervisor's orphans come here."""
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


def _keep_logs(state: State) -> None:
    """Copy the logs to `TUNEYARD_RIG_LOGS`, for a machine whose disk is gone after the tests."""
    target = os.environ.get("TUNEYARD_RIG_LOGS")
    if target and state.logs.is_dir():
        shutil.copytree(state.logs, Path(target) / state.root.name, dirs_exist_ok=True)


def _remove_files(root: Path) -> None:
    """Remove the folder; never through a mount, whose other side may be the machine's own root."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    if left := [line for line in mounts if line.split()[1].startswith(str(root))]:
        raise RigError(f"mounts are left, so nothing was removed: {left}")
    _wait_until(lambda: _removed(root), f"{root} can be removed")


def _removed(root: Path) -> bool:
    """A server that is being killed may still write: then the folder is not empty in time."""
    try:
        shutil.rmtree(root)
    except FileNotFoundError:
        return not root.exists()
    except OSError:
        return False
    return True


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + END_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RigError(f"waited {END_SECONDS} s in vain until {what}")
        time.sleep(0.02)
