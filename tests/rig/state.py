"""The folder that is one rig: its settings, its files, and the identity of its processes.

Keeper, supervisor and the commands `down` and `exec` are separate processes and share nothing else.
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
    """What was asked for, complete: neither the keeper nor the supervisor decides anything."""

    level: Level
    name: str
    """Unique on this machine; names the rig's cgroup."""
    programs: dict[str, str]
    """The folder of each built target."""
    ports: dict[str, int]
    """Ports on 127.0.0.1; at level "node" the same numbers are used inside its own network."""
    images: dict[str, str]
    """Image name to the root folder it stands for."""
    image_path: str
    """PATH inside those images."""
    kuberay: Literal["no", "crds", "running"] = "no"
    kueue: bool = False

    def program(self, target: str, name: str) -> str:
        return f"{self.programs[target]}/{name}"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.ports['api']}"


@dataclass(frozen=True)
class Process:
    """A process that may have ended, and whose pid may since belong to another one."""

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
    """The rig's folder. Every path in it has its name here and nowhere else."""

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
        """The recorded process, or None if it never came to be recorded."""
        try:
            return Process(**json.loads((self.root / f"{name}.json").read_text()))
        except FileNotFoundError:
            return None

    def record_process(self, name: Literal["keeper", "supervisor"], pid: int) -> None:
        self.announce(self.root / f"{name}.json", json.dumps(asdict(Process.of(pid))))

    def announce(self, path: Path, text: str) -> None:
        """Write a file that other processes wait for: once they see it, it is complete."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text)
        partial.rename(path)

    def log_tails(self, num_lines: int = 15) -> str:
        """The end of every log, newest last: what a person needs to see after a failure."""
        logs = sorted(self.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(_tail(path, num_lines) for path in logs)


def _tail(path: Path, num_lines: int) -> str:
    lines = path.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([f"--- {path.name}", *lines])
