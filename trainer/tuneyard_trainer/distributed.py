"""The only Ray code: one Ray Train worker group in which every rank walks the plan.

The group is started once per attempt and stays for all stages, so a job pays for process start-up
and imports once. What workers have to say goes to the driver over a socket each; the only word
that comes back is to stop.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from tuneyard.api.compute import Compute
from tuneyard.api.plan import Plan
from tuneyard.errors import StageError
from tuneyard_trainer.records import Store
from tuneyard_trainer.runner import Ledger, Walk, failure_event
from tuneyard_trainer.worker import Interrupted, Worker

POST_SECONDS = 1.0
"""Least time between two progress posts of a worker; stage events are never held back."""
LOOK_SECONDS = 0.5
"""How often the driver looks whether it was asked to stop, and whether the group still runs."""
HANG_UP_SECONDS = 10.0
"""How long an ended group's last words are waited for."""
_LOCAL_RAY = {
    "RAY_worker_niceness": "0",  # Ray's 15 lets anything else go first
    # What a machine of its own has no use for. Measured on two idle cores with the log monitor,
    # which is ended below: together about a quarter of what Ray's processes cost beside a worker.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "5",
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "600000",
}
"""Ray's own settings on one machine; what the user's environment says goes before."""


@dataclass(frozen=True)
class Resources:
    """What the worker group takes."""

    workers: int
    gpus_per_worker: int
    cpus_per_worker: int


@dataclass(frozen=True)
class Places:
    """Paths and URIs as the workers see them."""

    output: str
    """The store's URI or path."""
    scratch: str
    """A local folder for stores that are not on a file system."""
    base_dir: str
    """What relative sources are relative to."""
    cache_dir: str
    """Where fetched sources are kept."""


class Line:
    """A worker's line to the driver: events out, the word to stop in. Sending never waits for the
    driver to read, short of the megabytes that the kernel buffers."""

    def __init__(self, address: tuple[str, int], key: bytes) -> None:
        self._connection = Client(address, authkey=key)
        self._stop = threading.Event()
        self._posted = 0.0
        threading.Thread(target=self._listen, daemon=True, name="line").start()

    def emit(self, event: dict[str, Any]) -> None:
        """Sends stage events at once and in order; of progress, the newest that is due."""
        if event["type"] == "progress" and not event["message"] and not _final(event):
            if time.monotonic() - self._posted < POST_SECONDS:
                return
            self._posted = time.monotonic()
        with suppress(OSError):  # without its driver this worker is about to be killed
            self._connection.send_bytes(json.dumps(event).encode())

    def stopped(self) -> bool:
        """Whether the driver asked to stop."""
        return self._stop.is_set()

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            self._connection.recv_bytes()  # the driver says nothing else
            self._stop.set()


class Desk:
    """The driver's end of all lines. JSON over sockets, not a Ray actor: an idle actor alone costs
    half a percent of a core, and would have to be polled."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self._listener = Listener((ray.util.get_node_ip_address(), 0), authkey=self.key)
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lines: list[Any] = []
        self._readers: list[threading.Thread] = []
        self._asked = False
        self._start(self._accept)

    @property
    def address(self) -> tuple[str, int]:
        """Where workers call."""
        host, port = self._listener.address
        return host, port

    def ask_to_stop(self) -> None:
        """Tells all workers, those to come included."""
        self._asked = True
        for line in self._lines:
            self._tell(line)

    def close(self) -> None:
        """Ends the lines once what is on them was read."""
        for reader in self._readers:
            reader.join(HANG_UP_SECONDS)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                line = self._listener.accept()
            except AuthenticationError:
                continue  # not one of ours
            except OSError:
                return
            self._lines.append(line)
            self._readers.append(self._start(self._read, line))
            if self._asked:
                self._tell(line)

    def _read(self, line: Any) -> None:
        with suppress(EOFError, OSError):
            while True:
                self.events.put(json.loads(line.recv_bytes()))

    def _tell(self, line: Any) -> None:
        with suppress(OSError):
            line.send_bytes(b"stop")

    def _start(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="desk")
        thread.start()
        return thread


def _final(event: dict[str, Any]) -> bool:
    return bool(event["totalSteps"]) and event["step"] == event["totalSteps"]


def run(
    plan: Plan,
    *,
    places: Places,
    resources: Resources,
    attempt: int,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event,
    max_worker_failures: int = 0,
) -> None:
    """Runs the plan in a worker group on the connected Ray cluster and returns when it is done.

    `on_event` is called in this thread for every event. Setting `stop` makes the workers checkpoint
    and end. Raises StageError or Interrupted as the workers did; a group that dies without a word
    raises StageError WorkerDied (retryable).
    """
    desk = Desk()
    trainer = TorchTrainer(
        _walk,
        train_loop_config={
            "plan": plan.to_json(),
            "places": places,
            "attempt": attempt,
            "desk": (desk.address, desk.key),
            "threads": resources.cpus_per_worker,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_per_worker(resources),
        ),
        run_config=RunConfig(
            name=f"{plan.job.name}-{attempt}",
            storage_path=places.scratch,
            failure_config=FailureConfig(max_failures=max_worker_failures),
        ),
    )
    _raise(_follow(trainer, desk, on_event, stop))


def _per_worker(resources: Resources) -> dict[str, float]:
    wanted = {"CPU": float(resources.cpus_per_worker)}
    if resources.gpus_per_worker:
        wanted["GPU"] = float(resources.gpus_per_worker)
    return wanted


def _follow(
    trainer: TorchTrainer,
    desk: Desk,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event,
) -> list[dict[str, Any]]:
    """Fits in a thread and relays events meanwhile; returns the events that end a walk."""
    endings: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failures.append(error)

    def relay(event: dict[str, Any]) -> None:
        if event["type"] in ("failed", "interrupted", "finished"):
            endings.append(event)
        else:
            on_event(event)

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    asked = False
    while thread.is_alive():
        if stop.is_set() and not asked:
            desk.ask_to_stop()
            asked = True
        with suppress(queue.Empty):
            relay(desk.events.get(timeout=LOOK_SECONDS))
    desk.close()
    while not desk.events.empty():
        relay(desk.events.get())
    if not endings and failures:
        endings.append(_unexplained(failures[0]))
    return endings


def _raise(endings: list[dict[str, Any]]) -> None:
    for event in endings:
        if event["type"] == "failed":
            raise StageError(
                event["reason"],
                event["message"],
                advice=event["advice"],
                retryable=event["retryable"],
            )
    for event in endings:
        if event["type"] == "interrupted":
            raise Interrupted(event["stage"], event["step"])


def _unexplained(error: Exception) -> dict[str, Any]:
    """A worker group that ended without a word: killed, out of memory, or lost with its node."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(error).__name__
    return failure_event(
        StageError(
            "WorkerDied",
            f"the training workers ended without a word: {last}",
            advice="If memory ran out, lower training.microBatchTokens or data.maxLength.",
            retryable=True,
        )
    )


# ---- inside a worker ----------------------------------------------------------------------------


def _walk(config: dict[str, Any]) -> None:
    """The training function of every rank. A StageError is posted, not raised: Ray would wrap it,
    and with retries on would repeat what cannot succeed. It ends the other ranks through the
    worker group: they lose their peer and Ray tears the group down."""
    import ray.train.torch

    line = Line(*config["desk"])
    context = ray.train.get_context()
    places: Places = config["places"]
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    plan = Plan.model_validate_json(config["plan"])
    store = Store(places.output, Path(places.scratch) / f"rank-{context.get_world_rank()}")
    walk = Walk(
        ledger=Ledger(plan, store, Path(places.base_dir), Path(places.cache_dir)),
        worker=Worker(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=device,
            stop=line.stopped,
            attempt=config["attempt"],
        ),
        emit=line.emit,
    )
    try:
        walk.run()
    except (StageError, Interrupted) as error:
        line.emit(failure_event(error))
        if isinstance(error, StageError) and context.get_world_size() > 1:
            raise
    else:
        line.emit({"type": "finished"})


# ---- one machine --------------------------------------------------------------------------------


@contextmanager
def local_cluster(resources: Resources) -> Iterator[None]:
    """Ray on this machine alone, just large enough, for as long as the context lasts."""
    for name, value in _LOCAL_RAY.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=resources.workers * resources.cpus_per_worker,
        num_gpus=resources.workers * resources.gpus_per_worker,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # It copies logs to the driver, which asked for none, and looks ten times a second. `ray start`
    # can leave it out; ray.init has no word for it.
    if node := ray._private.worker._global_node:
        node.kill_log_monitor()
    try:
        yield
    finally:
        ray.shutdown()


def local_resources(compute: Compute) -> Resources:
    """This machine shared out evenly. Raises StageError if it has fewer GPUs than asked for."""
    workers = compute.workers or 1
    present = torch.cuda.device_count()
    gpus = compute.gpus_per_worker if compute.gpus_per_worker is not None else present // workers
    if gpus * workers > present:
        raise StageError(
            "NotEnoughGpus",
            f"{workers} workers of {gpus} GPUs each were asked for; this machine has {present}.",
            advice="Lower compute.gpusPerWorker or compute.workers.",
        )
    cpus = len(os.sched_getaffinity(0))
    return Resources(workers, min(gpus, 1), max(1, cpus // workers))
