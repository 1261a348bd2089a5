"""The folder of one rig: its settings, its files and the identity of its processes.

The keeper, the supervisor and the commands `down` and `exec` are separate processes that share only
this folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rig import linux

Level = Literal["control", "node"]


@dataclass(frozen=True)
class Settings:
    """The complete settings of a rig; the keeper and the supervisor add no decisions."""

    level: Level
    name: str
    """A name that is unique on this machine; also the name of the rig's cgroup."""
    programs: dict[str, str]
    """The folder of each built target."""
    ports: dict[str, int]
    """Ports on 127.0.0.1, of the machine at level "control" and of the node at level "node"."""
    images: dict[str, str]
    """Image name to the folder that acts as the image."""
    image_path: str
    """PATH inside those images."""
    kuberay: Literal["no", "crds", "running"] = "no"
    kueue: bool = False

    def program(self, target: str, name: str) -> str:
        """Return the path of a file or folder of a built target."""
        return f"{self.programs[target]}/{name}"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.ports['api']}"


@dataclass(frozen=True)
class Process:
    """The identity of a process, which stays valid if the process ends and its pid is reused."""

    pid: int
    started: int | None

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, linux.start_time(pid))

    @property
    def alive(self) -> bool:
        return self.started is not None and linux.start_time(self.pid) == self.started


@dataclass(frozen=True)
class State:
    """The rig's folder. The paths that processes share are named only here."""

    root: Path

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def ready(self) -> Path:
        return self.root / "ready"

    @property
    def failed(self) -> Path:
        return self.root / "failed"

    def kubeconfig(self, user: str = "admin") -> Path:
        return self.root / f"{user}.kubeconfig"

    @property
    def settings(self) -> Settings:
        return Settings(**json.loads((self.root / "settings.json").read_text()))

    def write_settings(self, settings: Settings) -> None:
        (self.root / "settings.json").write_text(json.dumps(asdict(settings), indent=2))

    def process(self, name: Literal["keeper", "supervisor"]) -> Process | None:
        """Return the recorded process; None if it was not recorded."""
        try:
            return Process(**json.loads((self.root / f"{name}.json").read_text()))
        except FileNotFoundError:
            return None

    def record_process(self, name: Literal["keeper", "supervisor"], pid: int) -> None:
        self.write_atomically(self.root / f"{name}.json", json.dumps(asdict(Process.of(pid))))

    def write_atomically(self, path: Path, text: str) -> None:
        """Write a file that other processes wait for, so that they never read a part of it."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text)
        partial.rename(path)

    def log_tails(self, num_lines: int = 15) -> str:
        """Return the last lines of every log, the newest log last."""
        logs = sorted(self.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(_tail(path, num_lines) for path in logs)


def _tail(path: Path, num_lines: int) -> str:
    lines = path.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([f"--- {path.name}", *lines])
