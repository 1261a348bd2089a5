"""An MLflow tracking server on this machine, from an environment of its own: it wants an older
pyarrow than the trainer."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rig.build import cache_root
from rig.errors import RigError
from rig.ports import Reservation

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements" / "test-mlflow.txt"
START_SECONDS = 120.0


def ensure_mlflow() -> Path:
    """Return the `mlflow` program; install it on the first call. Raises RigError."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}".encode()
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + version).hexdigest()[:16]
    folder = cache_root() / "venvs" / f"mlflow-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".installed").exists():
            _install(folder)
    return folder / "bin" / "mlflow"


def _install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an installation that was interrupted
    python = str(folder / "bin" / "python")
    if uv := next(ROOT.glob(".tools/uv-*/bin/uv"), None) or shutil.which("uv"):
        create = [str(uv), "venv", "--quiet", "--python", sys.executable, str(folder)]
        install = [str(uv), "pip", "install", "--quiet", "--python", python]
    else:
        create = [sys.executable, "-m", "venv", str(folder)]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--require-hashes", "--no-deps", "-r", str(REQUIREMENTS)]
    for command in (create, install):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RigError(f"MLflow's server cannot be installed: {done.stderr.strip()[-500:]}")
    (folder / ".installed").touch()


@dataclass
class MlflowServer:
    """A server that can be stopped and started again, with what it has stored."""

    program: Path
    folder: Path
    port: int
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it. Raises RigError."""
        command = [str(self.program), "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PYTHONPATH": "",
        }
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.2)
        raise RigError(f"MLflow did not start: {(self.folder / 'server.log').read_text()[-500:]}")

    def stop(self) -> None:
        """Kill it, with its workers."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Run a server that keeps its runs in `folder`. Raises RigError."""
    program = ensure_mlflow()
    with Reservation() as ports:
        server = MlflowServer(program, folder, ports.take())
        try:
            server.start()
            yield server
        finally:
            server.stop()
