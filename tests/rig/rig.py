"""Bring a rig up, use it, and take it down again."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rig import build, keeper
from rig.errors import RigError
from rig.ports import Reservation
from rig.state import Level, Process, Settings, State

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PORTS = ("api", "etcd", "etcd-peers", "kuberay-health", "kueue-health", "kueue-webhook")
DOWN_SECONDS = 60

KubeRay = Literal["no", "crds", "running"]


@dataclass(frozen=True)
class Rig:
    """A rig that is up."""

    state: State

    @property
    def kubeconfig(self) -> Path:
        return self.state.kubeconfig()

    @property
    def url(self) -> str:
        return self.state.settings.url

    @property
    def programs(self) -> Path:
        """The folder of kubectl."""
        return Path(self.state.settings.programs["kubernetes"])

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command where the node's addresses exist."""
        supervisor = self.state.process("supervisor")
        if supervisor is None or not supervisor.alive:
            raise RigError(f"there is no rig in {self.state.root}")
        if self.state.settings.level == "control":
            return list(command)
        namespaces = ("--mount", "--net", "--pid", "--ipc", "--uts")
        return ["nsenter", "--target", str(supervisor.pid), *namespaces, "--", *command]

    def environment(self) -> dict[str, str]:
        """This process's environment, with the rig as kubectl's cluster."""
        path = f"{self.programs}:{os.environ.get('PATH', SYSTEM_PATH)}"
        return {**os.environ, "PATH": path, "KUBECONFIG": str(self.kubeconfig)}


def targets(level: Level, kuberay: KubeRay, kueue: bool) -> list[str]:
    """What must be built for such a rig."""
    names = ["kubernetes"]
    names += ["pause", "coredns"] if level == "node" else []
    names += ["kuberay-crds"] if kuberay != "no" else []
    names += ["kuberay"] if kuberay == "running" else []
    names += ["kueue-crds", "kueue"] if kueue else []
    return names


def bring_up(
    level: Level,
    *,
    folder: Path | None = None,
    kuberay: KubeRay = "no",
    kueue: bool = False,
    images: Mapping[str, Path] | None = None,
    ends_with_caller: bool = True,
) -> Rig:
    """Build what is missing, start a rig and return once it is ready.

    `folder` must not exist yet; without it a new temporary one is made. With `ends_with_caller` the
    rig is torn down when this process ends, even by SIGKILL.
    """
    if kueue and level != "node":
        raise RigError("Kueue runs at level node only")
    programs = build.ensure(targets(level, kuberay, kueue))
    state = _create_folder(folder)
    with Reservation() as ports:
        settings = Settings(
            level=level,
            name=f"tuneyard-rig-{secrets.token_hex(4)}",
            programs={name: str(path) for name, path in programs.items()},
            ports={name: ports.take() for name in PORTS},
            images={name: str(root.resolve()) for name, root in (images or {}).items()},
            image_path=f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
            kuberay=kuberay,
            kueue=kueue,
        )
        state.write_settings(settings)
        process = _start_keeper(state, ports.descriptors, ends_with_caller)
    try:
        _wait_until_ready(state, process)
    except BaseException:
        take_down(state.root)
        raise
    return Rig(state)


def take_down(folder: Path) -> bool:
    """End the rig in the folder and remove all of it; false if there was none."""
    if not folder.exists():
        return False
    state = State(folder)
    process = state.process("keeper")
    if process is not None and process.alive:
        _stop(process)
    if folder.exists():
        keeper.sweep(state)
    return True


def _create_folder(folder: Path | None) -> State:
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="tuneyard-rig-"))
    else:
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            raise RigError(f"{folder} exists: take that rig down first, or name another") from None
    state = State(folder)
    state.logs.mkdir()
    return state


def _start_keeper(
    state: State, descriptors: Sequence[int], ends_with_caller: bool
) -> subprocess.Popen[bytes]:
    with ExitStack() as stack:
        log = stack.enter_context((state.logs / "keeper.log").open("ab"))
        command, inherited = keeper.command("keep", state), list(descriptors)
        if ends_with_caller:
            owner = os.pidfd_open(os.getpid())
            stack.callback(os.close, owner)
            command.append(str(owner))
            inherited.append(owner)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_keeper_environment(),
            pass_fds=inherited,
            start_new_session=True,
        )


def _keeper_environment() -> dict[str, str]:
    """Little of the user's own: the servers would obey a proxy or a kubeconfig found there."""
    kept = {name: os.environ[name] for name in ("HOME", "TUNEYARD_RIG_LOGS") if name in os.environ}
    return {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", **kept}


def _wait_until_ready(state: State, process: subprocess.Popen[bytes]) -> None:
    """No time limit of its own: every step inside has one."""
    while not state.ready.exists():
        if state.failed.exists() or process.poll() is not None:
            reason = state.failed.read_text() if state.failed.exists() else "its keeper ended"
            raise RigError(f"the rig did not come up: {reason}\n{state.log_tails()}")
        time.sleep(0.05)


def _stop(process: Process) -> None:
    """Tell the keeper to end and wait for it. Its pidfd cannot come to mean another process."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        ended, _, _ = select.select([descriptor], [], [], DOWN_SECONDS)
        if not ended:
            raise RigError(f"the rig's keeper {process.pid} did not end in {DOWN_SECONDS} s")
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)
