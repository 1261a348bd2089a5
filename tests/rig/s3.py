"""An S3 server on this machine: versitygw, which keeps its objects in a folder."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rig.errors import RigError
from rig.ports import Reservation

START_SECONDS = 30.0


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket."""

    url: str
    bucket: str = "bucket"
    key: str = "testing"
    secret: str = "testing-secret"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make every AWS client use this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def s3_server(program: Path, folder: Path) -> Iterator[S3Server]:
    """Run a server whose objects are below `folder`. Raises RigError if it does not start."""
    with Reservation() as ports:
        yield from _served(program, folder, ports.take())


def _served(program: Path, folder: Path, port: int) -> Iterator[S3Server]:
    server = S3Server(f"http://127.0.0.1:{port}")
    objects, metadata = folder / "objects", folder / "metadata"
    (objects / server.bucket).mkdir(parents=True)
    metadata.mkdir()
    # A sidecar folder keeps the ETags: not every file system has extended attributes.
    command = [str(program), "--port", f"127.0.0.1:{port}", "--quiet"]
    command += ["posix", "--sidecar", str(metadata), str(objects)]
    environment = {
        **os.environ,
        "ROOT_ACCESS_KEY": server.key,
        "ROOT_SECRET_KEY": server.secret,
    }
    log = folder / "versitygw.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        _wait(process, port, log)
        yield server
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RigError(f"versitygw did not start: {log.read_text().strip()}")
