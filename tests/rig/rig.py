"""Bring up, use and take down a rig: a real Kubernetes on this machine."""

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
from contextlib import ExitStack, suppress
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
    """A running rig."""

    state: State

    @property
    def kubeconfig(self) -> Path:
        return self.state.kubeconfig()

    @property
    def url(self) -> str:
        return self.state.settings.url

    @property
    def programs(self) -> Path:
        """The folder with kubectl and the other programs of Kubernetes."""
        return Path(self.state.settings.programs["kubernetes"])

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return a command line that runs a command in the node's network.

        RigError: the rig does not run.
        """
        supervisor = self.state.process("supervisor")
        if supervisor is None or not supervisor.alive:
            raise RigError(
                f"no rig runs in {self.state.root}: start one with `python tests/rig up`"
            )
        if self.state.settings.level == "control":
            return list(command)
        namespaces = ("--mount", "--net", "--pid", "--ipc", "--uts")
        return ["nsenter", "--target", str(supervisor.pid), *namespaces, "--", *command]

    def server(self, name: str) -> int | None:
        """Return the process id of a server, such as "etcd"; None: it does not run just now. A
        server that is killed starts again after a second."""
        supervisor = self.state.process("supervisor")
        if supervisor is None or not supervisor.alive:
            raise RigError(f"no rig runs in {self.state.root}")
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text()
        return next((pid for pid in map(int, children.split()) if _program(pid) == name), None)

    def environment(self) -> dict[str, str]:
        """Return this process's environment with kubectl on PATH and the rig as its cluster."""
        path = f"{self.programs}:{os.environ.get('PATH', SYSTEM_PATH)}"
        return {**os.environ, "PATH": path, "KUBECONFIG": str(self.kubeconfig)}


def _program(pid: int) -> str:
    """Return the name of the program that a process runs; "": it has ended."""
    with suppress(OSError):
        command, _, _ = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")
        return Path(command.decode()).name
    return ""


def targets(level: Level, kuberay: KubeRay, kueue: bool) -> list[str]:
    """Return the targets that such a rig needs."""
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
    """Build the missing programs, start a rig and return it when it is ready.

    `folder`: a folder that does not exist; None: a new temporary folder.
    `images`: image name to the folder that acts as the image.
    `ends_with_caller`: take the rig down when this process ends, even by SIGKILL.
    RigError: the rig did not start; nothing of it is left.
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
    """End the rig in the folder and remove its files; return whether the folder existed."""
    if not folder.exists():
        return False
    state = State(folder)
    process = state.process("keeper")
    if process is not None and process.alive:
        _stop(process)
    if folder.exists():
        keeper.clean_up(state)
    return True


def _create_folder(folder: Path | None) -> State:
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="tuneyard-rig-"))
    else:
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            raise RigError(
                f"{folder} exists: take its rig down, or choose another folder"
            ) from None
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
    """Return a minimal environment: a user's proxy or kubeconfig would change the servers."""
    kept = {name: os.environ[name] for name in ("HOME", "TUNEYARD_RIG_LOGS") if name in os.environ}
    return {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", **kept}


def _wait_until_ready(state: State, process: subprocess.Popen[bytes]) -> None:
    """Wait until the rig is ready; raise RigError if it fails. Every step has a time limit."""
    while not state.ready.exists():
        if state.failed.exists() or process.poll() is not None:
            reason = state.failed.read_text() if state.failed.exists() else "the keeper ended"
            raise RigError(f"the rig did not start: {reason}\n{state.log_tails()}")
        time.sleep(0.05)


def _stop(process: Process) -> None:
    """Send SIGTERM to the keeper and wait for its end, by a pidfd because a pid may be reused."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        ended, _, _ = select.select([descriptor], [], [], DOWN_SECONDS)
        if not ended:
            raise RigError(f"the rig's keeper (pid {process.pid}) did not end in {DOWN_SECONDS} s")
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)
