"""A Ray Train worker group in which every rank runs the plan. No other module imports Ray.

The group starts once per attempt and runs all stages, so a job pays for process start-up and
imports once. Workers send their events to the driver over `channel`.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from tuneyard.api.compute import Compute
from tuneyard.api.plan import Plan
from tuneyard.api.pods import WORKER_LOG, WORKERS_VARIABLE
from tuneyard.api.quantity import quantity_value
from tuneyard.errors import StageError
from tuneyard_trainer import drain
from tuneyard_trainer.logs.keep import LogPlace, kept, own_files
from tuneyard_trainer.running import watchdog
from tuneyard_trainer.running.channel import EventClient, EventServer
from tuneyard_trainer.running.failures import unexpected, unexplained
from tuneyard_trainer.running.runner import PlanRunner, StageInputs, failure_event
from tuneyard_trainer.running.waits import wait_event
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted, Worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

POLL_SECONDS = 0.5
"""How often the driver checks whether it was asked to stop and whether the group still runs."""
GATHER_SECONDS = 60.0
"""How long an elastic job waits for all its workers before it starts with fewer."""
NEVER_SECONDS = 1e9
"""The interval of resizing, so long that a running group never grows: Ray would restart it, and it
would repeat steps. The next attempt grows instead."""
TRAINING_THREAD = "ray-train"
"""The thread in which Ray Train runs."""
_IMPORTED_BY_RAY_TRAIN = ("torch", "pandas", "pyarrow")
"""The packages that take most of the import of ray.train.torch, 5 of 7 s of processor time."""
_GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""The files in /dev of GPUs: NVIDIA, AMD, and any GPU in WSL."""
_LOCAL_RAY = {
    "RAY_worker_niceness": "0",  # with Ray's default of 15 any other process comes first
    "RAY_USAGE_STATS_ENABLED": "0",  # no usage statistics leave the machine
}
"""Ray's settings on one machine; the user's environment takes precedence."""


@dataclass(frozen=True)
class Resources:
    """The resources of the worker group: one process per GPU, or one per worker without GPUs."""

    workers: int
    """Processes."""
    min_workers: int
    """The fewest processes that the group starts with; `workers` unless the job is elastic."""
    gpus_per_worker: int
    """0 or 1."""
    cpus_per_worker: float

    @classmethod
    def divided(cls, workers: int, min_workers: int, gpus: int, cpus: float) -> Resources:
        """Return the resources of `workers` pods, or equal shares of one machine, with `gpus` GPUs
        and `cpus` CPUs each."""
        each = max(1, gpus)
        # Ray counts in ten-thousandths; a share rounded up would leave too little for the last one.
        share = math.floor(cpus / each * 10_000) / 10_000
        return cls(workers * each, min_workers * each, min(gpus, 1), share)


@dataclass(frozen=True)
class Places:
    """Paths and URIs as the workers see them."""

    output: str
    """The store's URI or path."""
    scratch: str
    """A local folder for stores that are not on a file system."""
    base_dir: str
    """The folder that relative sources are relative to."""
    cache_dir: str
    """The folder of fetched sources."""
    job_uid: str | None = None
    """The uid of the job that writes there; None on one machine."""
    drain: str = ""
    """The folder in which a pod's preStop hook asks its processes to end; "": there is no hook."""


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
    """Run the plan in a worker group on the connected Ray cluster; return when it is done.

    `on_event` is called in this thread for every event. Setting `stop` makes the workers save a
    checkpoint and end. Raises the StageError or Interrupted that the workers raised, and StageError
    WorkerDied (retryable) if the group ended without an event that says why.
    """
    on_event(wait_event("importing Ray Train"))
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    on_event(wait_event("starting the workers"))
    _gather(resources, stop)
    server = EventServer(ray.util.get_node_ip_address())
    failures: dict[str, Any] = {
        "max_failures": max_worker_failures,
        "max_preemption_failures": 0,
    }
    trainer = TorchTrainer(
        _run_rank,
        train_loop_config={
            "plan": plan.to_json(),
            "places": places,
            "attempt": attempt,
            "event_server": (server.address, server.key),
            "threads": max(1, int(resources.cpus_per_worker)),
        },
        scaling_config=ScalingConfig(**_scaling(resources)),
        run_config=RunConfig(
            name=f"{plan.job.name}-{attempt}",
            storage_path=places.scratch,
            failure_config=FailureConfig(**failures),
        ),
    )
    last_events = _follow(trainer, server, on_event, stop)
    if not last_events and stop.is_set():
        raise Interrupted(plan.stages[0].name, 0)
    _raise_failure(last_events)


def _gather(resources: Resources, stop: threading.Event) -> None:
    """Wait for all workers of an elastic group, since Ray would start with the first of them."""
    deadline = time.monotonic() + GATHER_SECONDS
    while resources.min_workers < resources.workers and time.monotonic() < deadline:
        present, each = ray.cluster_resources(), _per_worker(resources)
        if stop.is_set() or all(
            present.get(name, 0.0) >= amount * resources.workers for name, amount in each.items()
        ):
            return
        time.sleep(1.0)


def _scaling(resources: Resources) -> dict[str, Any]:
    least, most = resources.min_workers, resources.workers
    return {
        "num_workers": most if least == most else (least, most),
        "use_gpu": resources.gpus_per_worker > 0,
        "resources_per_worker": _per_worker(resources),
        "elastic_resize_monitor_interval_s": NEVER_SECONDS,
    }


def _per_worker(resources: Resources) -> dict[str, float]:
    wanted = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        wanted["GPU"] = float(resources.gpus_per_worker)
    return wanted


def _follow(
    trainer: TorchTrainer,
    server: EventServer,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event,
) -> list[dict[str, Any]]:
    """Train in a thread and relay events meanwhile. Return each worker's last event."""
    last_events: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failures.append(error)

    def relay(event: dict[str, Any]) -> None:
        if event["type"] in ("failed", "interrupted", "finished"):
            last_events.append(event)
        else:
            on_event(event)

    thread = threading.Thread(target=fit, daemon=True, name=TRAINING_THREAD)
    thread.start()
    stop_requested = False
    while thread.is_alive():
        if stop.is_set() and not stop_requested:
            if not server.has_clients:
                return []  # no worker has begun
            server.ask_to_stop()
            stop_requested = True
        with suppress(queue.Empty):
            relay(server.events.get(timeout=POLL_SECONDS))
    server.close()
    while not server.events.empty():
        relay(server.events.get())
    if not last_events and (failures or not stop.is_set()):
        silent = RuntimeError("the group ended without an error")
        last_events.append(failure_event(unexplained([*failures, silent][0])))
    return last_events


def _raise_failure(last_events: list[dict[str, Any]]) -> None:
    failed = [event for event in last_events if event["type"] == "failed"]
    if failed:  # a lost peer is an effect of another worker's failure
        event = min(failed, key=lambda event: event["reason"] == "WorkerDied")
        raise StageError(
            event["reason"],
            event["message"],
            advice=event["advice"],
            retryable=event["retryable"],
        )
    for event in last_events:
        if event["type"] == "interrupted":
            raise Interrupted(event["stage"], event["step"])


# ---- inside a worker ----------------------------------------------------------------------------


def _run_rank(config: dict[str, Any]) -> None:
    """The training function of every rank.

    A failure is sent as an event. With several ranks the failure is also raised, so that Ray ends
    the group. A single rank raises only unexpected errors, since Ray would wrap a StageError.
    """
    # A worker without its driver would train on until Ray notices.
    address, key = config["event_server"]
    client = EventClient(address, key, on_lost=partial(os._exit, 1))
    client.emit(wait_event("importing torch"))
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    places: Places = config["places"]
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    plan = Plan.model_validate_json(config["plan"])
    scratch = Path(places.scratch) / f"rank-{context.get_world_rank()}"
    store = Store(places.output, scratch, places.job_uid)
    runner = PlanRunner(
        stage_inputs=StageInputs(
            plan, store, Path(places.base_dir), Path(places.cache_dir), client.emit
        ),
        worker=Worker(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=device,
            stop=client.stopped,
            attempt=config["attempt"],
        ),
        emit=client.emit,
    )
    with ExitStack() as stack:
        stack.enter_context(_log(places, context, config["attempt"]))
        if places.drain:
            stack.enter_context(drain.registered(Path(places.drain), client.ask_to_stop))
        try:
            runner.run()
        except Interrupted as stopped:
            client.emit(failure_event(stopped))
        except Exception as error:
            traceback.print_exc()
            named = error if isinstance(error, StageError) else unexpected(error)
            client.emit(failure_event(named))
            if context.get_world_size() > 1 or named is not error:
                raise
        else:
            client.emit({"type": "finished"})


@contextmanager
def _log(places: Places, context: Any, attempt: int) -> Iterator[None]:
    """Keep this worker's log, which begins with the worker's place."""
    rank = context.get_world_rank()
    place = LogPlace(places.output, attempt, places.job_uid, places.drain)
    _note(f"worker {rank} of {context.get_world_size()} on {socket.gethostname()}")
    with kept(place, f"{WORKER_LOG}{rank}", own_files(), warn=_note):
        yield


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# ---- Ray clusters -----------------------------------------------------------------------------


@contextmanager
def pods_cluster() -> Iterator[None]:
    """Connect to the Ray cluster whose head this process runs on."""
    # Our preStop hook saves a checkpoint when a pod is deleted; Ray's watcher would end it first.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        _disconnect()


def _disconnect() -> None:
    """Disconnect from Ray unless the training thread still uses it, whose next call would end the
    process with exit code 1. The caller must then end the process with `os._exit`."""
    if not any(thread.name == TRAINING_THREAD for thread in threading.enumerate()):
        ray.shutdown()


def pods_resources(compute: Compute, environment: Mapping[str, str]) -> Resources:
    """Return the resources of the worker pods. Ray rounds a pod's CPUs up."""
    planned = compute.workers or 1
    workers = int(environment.get(WORKERS_VARIABLE, planned))
    return Resources.divided(
        workers,
        min(compute.min_workers or planned, workers),
        compute.gpus_per_worker or 0,
        math.ceil(quantity_value(compute.cpus_per_worker or "4")),
    )


@contextmanager
def local_cluster(resources: Resources) -> Iterator[None]:
    """While active, Ray runs on this machine alone, with no more resources than needed."""
    for name, value in _LOCAL_RAY.items():
        os.environ.setdefault(name, value)
    # Ray's processes take seconds to start. None of the packages imports Ray.
    threading.Thread(target=_import_all, args=(_IMPORTED_BY_RAY_TRAIN,), daemon=True).start()
    before = watchdog.descendants()
    ray.init(
        address="local",
        num_cpus=math.ceil(resources.workers * resources.cpus_per_worker),
        num_gpus=resources.workers * resources.gpus_per_worker,
        include_dashboard=False,  # it needs ray[default] and eleven processes
        log_to_driver=False,
        # Ray Train would write a warning about the missing dashboard to a log file every second.
        logging_config=ray.LoggingConfig(log_level="ERROR"),
    )
    with watchdog.guarded(spare=before):
        try:
            yield
        finally:
            _disconnect()


def _import_all(names: Iterable[str]) -> None:
    for name in names:
        import_module(name)


def local_resources(compute: Compute) -> Resources:
    """Divide this machine evenly among the workers. Raises StageError NotEnoughGpus."""
    workers = compute.workers or 1
    present = _num_gpus()
    gpus = compute.gpus_per_worker if compute.gpus_per_worker is not None else present // workers
    if gpus * workers > present:
        raise StageError(
            "NotEnoughGpus",
            f"the job needs {workers} workers with {gpus} GPUs each; this machine has {present}.",
            advice="Lower compute.gpusPerWorker or compute.workers.",
        )
    cpus = len(os.sched_getaffinity(0))
    return Resources.divided(workers, workers, gpus, max(1, cpus // workers))


def _num_gpus() -> int:
    """Return the number of GPUs that torch can use. Its import takes 3 s of processor time, so it
    is not imported on a machine without the device file of a GPU."""
    if not any(any(Path("/dev").glob(name)) for name in _GPU_FILES):
        return 0
    import torch

    return torch.cuda.device_count()
