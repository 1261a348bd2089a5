"""The processes of attempts: a fork server that has imported torch, Ray and the trainer.

A driver and its worker are forked, so each starts in milliseconds and is a process of its own that
can be killed. The driver runs the code of a head pod without change, apart from Ray: its worker
group is one forked process that calls the same training function.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import psutil
from rig import linux

KEY = b"chaos"
READY_SECONDS = 120
PRELOADED = (
    "fsspec.implementations.local",
    "matplotlib.backends.backend_agg",
    "peft",
    "ray.train.torch",
    "ray.util",
    "transformers.models.llama.modeling_llama",
    "tuneyard_trainer.evaluation.evaluate",
    "tuneyard_trainer.pod.driver",
    "tuneyard_trainer.reporting.export",
    "tuneyard_trainer.running.distributed",
    "tuneyard_trainer.training.sft",
)
"""The modules that the fork server imports: an attempt would spend half of its time on them."""
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""A process that is forked must not lose the threads of a pool."""


@dataclass(frozen=True)
class Pod:
    """The files of an attempt's processes on this machine."""

    folder: Path
    """The private /tmp of the attempt's pods."""
    volumes: Path
    """The folder of the mounted claims."""

    @property
    def log(self) -> Path:
        return self.folder / "driver.log"

    @property
    def exit_code(self) -> Path:
        """Written by a driver that ends on its own."""
        return self.folder / "exit-code"

    @property
    def drain(self) -> Path:
        return self.folder / "drain"

    @property
    def worker_id(self) -> Path:
        """The process id of the newest worker."""
        return self.folder / "worker.pid"

    @property
    def worker_done(self) -> Path:
        """Written by a worker that ends on its own."""
        return self.folder / "worker-done"

    @property
    def rows(self) -> Path:
        """The training rows in the order in which the worker read them, one number a line."""
        return self.folder / "rows.log"


class Machine:
    """A client of the fork server."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def start_driver(
        self, pod: Pod, arguments: list[str], environment: Mapping[str, str]
    ) -> psutil.Process:
        """Start a driver with the arguments of KubeRay's entrypoint."""
        pod.folder.mkdir(parents=True)
        pid = _ask(self._socket, "driver", pod, (str(self._socket), arguments, dict(environment)))
        return psutil.Process(pid)


def _ask(socket: Path | str, role: str, pod: Pod, work: Any) -> int:
    with Client(str(socket), "AF_UNIX", authkey=KEY) as connection:
        connection.send((role, pod, work))
        pid: int = connection.recv()
        return pid


@contextmanager
def running(folder: Path) -> Iterator[Machine]:
    """Run a fork server; it and all its processes end with the context."""
    socket = folder / "fork.socket"
    with (folder / "machine.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.machine", str(socket)],
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=log,
            stderr=log,
            preexec_fn=linux.end_with_parent,
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not socket.exists():
            assert process.poll() is None, (folder / "machine.log").read_text()
            assert time.monotonic() < deadline, "the fork server did not start"
            time.sleep(0.1)
        yield Machine(socket)
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


# ---- inside the fork server -------------------------------------------------------------------


def _serve(socket: str) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # a collection in a forked process would copy the pages of all modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps ended children
    roles = {"driver": _driver, "worker": _worker}
    listener = Listener(socket, "AF_UNIX", authkey=KEY, backlog=64)
    while True:
        with suppress(OSError, EOFError), listener.accept() as connection:  # a client may be killed
            role, pod, work = connection.recv()
            pid = os.fork()
            if pid == 0:
                listener.close()
                connection.close()
                _become(roles[role], pod, work)
            connection.send(pid)


def _become(role: Callable[[Pod, Any], int], pod: Pod, work: Any) -> None:
    """Be that process of the pod; never return."""
    linux.end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(pod.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        code = role(pod, work)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _driver(pod: Pod, work: Any) -> int:
    import ray.train.torch
    import ray.util

    from tuneyard_trainer import drain
    from tuneyard_trainer.pod import driver
    from tuneyard_trainer.running import distributed
    from tuneyard_trainer.storage import sources

    socket, arguments, environment = work
    os.environ.update(environment)
    driver.FOLDER, drain.FOLDER = pod.folder / "tmp", pod.drain
    sources.PVC_ROOT = pod.volumes

    class ForkedGroup:
        """In place of TorchTrainer: one worker, forked by the server."""

        def __init__(self, _: Any, *, train_loop_config: dict[str, Any], **__: Any) -> None:
            self._config = train_loop_config

        def fit(self) -> None:
            pid = _ask(socket, "worker", pod, self._config)
            while psutil.pid_exists(pid):
                time.sleep(0.02)
            if not pod.worker_done.exists():
                raise RuntimeError("the worker died")  # as Ray Train raises

    ray.train.torch.TorchTrainer = ForkedGroup
    distributed.pods_cluster = nullcontext
    ray.util.get_node_ip_address = lambda: "127.0.0.1"
    code = driver.main(arguments)
    pod.exit_code.write_text(str(code))
    return code


class _Rank:
    """In place of Ray Train's context: the only rank."""

    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1


def _worker(pod: Pod, config: Any) -> int:
    pod.worker_id.write_text(str(os.getpid()))  # not by the driver, which may be killed before
    import ray.train.torch
    import torch

    from tuneyard_trainer.data import prepared
    from tuneyard_trainer.running import distributed
    from tuneyard_trainer.storage import sources

    sources.PVC_ROOT = pod.volumes
    ray.train.get_context = _Rank
    ray.train.torch.get_device = lambda: torch.device("cpu")
    log = pod.rows.open("a", buffering=1)

    class LoggedRows(prepared.Rows):
        """Training rows that log each reading."""

        def ids(self, row: int) -> Any:
            log.write(f"{row}\n")
            return super().ids(row)

    open_prepared = prepared.Prepared.open

    def opened(folder: Path) -> prepared.Prepared:
        data = open_prepared(folder)
        rows = data.train
        logged = LoggedRows(rows.tokens, rows.flat_mask, rows.offsets, rows.source)
        return replace(data, train=logged)

    prepared.Prepared.open = staticmethod(opened)  # the report shows rows too, and trains on none
    distributed._run_rank(config)
    pod.worker_done.touch()
    return 0


if __name__ == "__main__":
    from tests.chaos import machine  # requests name the classes of this module, not of __main__

    machine._serve(sys.argv[1])
