"""The only Ray code: one Ray Train worker group in which every rank walks the plan.

The group is started once per attempt and stays for all stages, so a job pays for process start-up
and imports once. What workers have to say goes to the driver over a socket each; the only word
that comes back is to stop.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from tuneyard.api.compute import Compute
from tuneyard.api.plan import Plan
from tuneyard.errors import StageError
from tuneyard_trainer import drain
from tuneyard_trainer.running.channel import EventClient, EventServer
from tuneyard_trainer.running.failures import unexpected, without_a_word
from tuneyard_trainer.running.runner import PlanRunner, StageInputs, failure_event
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.worker import Interrupted, Worker

LOOK_SECONDS = 0.5
"""How often the driver looks whether it was asked to stop, and whether the group still runs."""
GATHER_SECONDS = 60.0
"""How long an elastic job waits for all of its workers before it starts with fewer."""
NEVER_SECONDS = 1e9
"""An elastic group that grows is started anew and repeats steps; the next attempt grows instead."""
_LOCAL_RAY = {
    "RAY_worker_niceness": "0",  # Ray's 15 lets anything else go first
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
    # What a machine of its own has no use for, as what is ended below. Ray's processes wake
    # hundreds of times a second beside a worker; each of these lines is some of that.
    "RAY_event_stats": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "5",
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "600000",
}
"""Ray's own settings on one machine; what the user's environment says goes before."""
_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "Pi": 2.0**50,
}


@dataclass(frozen=True)
class Resources:
    """What the worker group takes: one process for each GPU, or for each worker without any."""

    workers: int
    """Processes."""
    min_workers: int
    """With fewer it does not start; equal to `workers` unless the job is elastic."""
    gpus_per_worker: int
    """0 or 1."""
    cpus_per_worker: float

    @classmethod
    def shared_out(cls, workers: int, min_workers: int, gpus: int, cpus: float) -> Resources:
        """Of pods or shares of a machine with so many GPUs and CPUs each."""
        each = max(1, gpus)
        # Ray counts in ten-thousandths; rounded up, the last process would find too little.
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
    """What relative sources are relative to."""
    cache_dir: str
    """Where fetched sources are kept."""
    job_uid: str | None = None
    """Which job of that name writes there; None on one machine."""
    drain: str = ""
    """The folder by which a pod's preStop hook asks its processes to end; "": no such hook."""


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
    _gather(resources, stop)
    desk = EventServer(ray.util.get_node_ip_address())
    failures: dict[str, Any] = {
        "max_failures": max_worker_failures,
        "max_preemption_failures": 0,
    }
    trainer = _Trainer(
        _walk,
        train_loop_config={
            "plan": plan.to_json(),
            "places": places,
            "attempt": attempt,
            "desk": (desk.address, desk.key),
            "threads": max(1, int(resources.cpus_per_worker)),
        },
        scaling_config=ScalingConfig(**_scaling(resources)),
        run_config=RunConfig(
            name=f"{plan.job.name}-{attempt}",
            storage_path=places.scratch,
            failure_config=FailureConfig(**failures),
        ),
    )
    endings = _follow(trainer, desk, on_event, stop)
    if not endings and stop.is_set():
        raise Interrupted(plan.stages[0].name, 0)
    _raise(endings)


def _gather(resources: Resources, stop: threading.Event) -> None:
    """Gives all workers of an elastic group the time to come up: Ray would start with the first."""
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
    desk: EventServer,
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
            if not desk.called:
                return []  # nobody has begun anything
            desk.ask_to_stop()
            asked = True
        with suppress(queue.Empty):
            relay(desk.events.get(timeout=LOOK_SECONDS))
    desk.close()
    while not desk.events.empty():
        relay(desk.events.get())
    if not endings and failures:
        endings.append(failure_event(without_a_word(failures[0])))
    return endings


def _raise(endings: list[dict[str, Any]]) -> None:
    failed = [event for event in endings if event["type"] == "failed"]
    if failed:  # a cause before its effects
        event = min(failed, key=lambda event: event["reason"] == "WorkerDied")
        raise StageError(
            event["reason"],
            event["message"],
            advice=event["advice"],
            retryable=event["retryable"],
        )
    for event in endings:
        if event["type"] == "interrupted":
            raise Interrupted(event["stage"], event["step"])


class _Trainer(TorchTrainer):
    """Without three of the actors that Ray Train keeps beside every group: one serves Ray's data
    sets, which nothing here uses; one frees a dead driver's resources for other drivers of the
    cluster, and a job's cluster has one; one asks Ray's autoscaler for nodes, and a job's cluster
    has those it was given. An idle actor still wakes 100 times a second."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in callbacks if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        policy = parts["scaling_policy"]
        if isinstance(policy, FixedScalingPolicy):  # an elastic one asks what there is
            parts["scaling_policy"] = _AsGiven(policy.scaling_config)
        return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]


class _AsGiven(FixedScalingPolicy):
    """A group of fixed size that asks nobody for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


# ---- inside a worker ----------------------------------------------------------------------------


def _walk(config: dict[str, Any]) -> None:
    """The training function of every rank. What ends a walk is posted; alone it is not raised as
    well, since Ray would wrap it. Raised, it ends the other ranks through the worker group: they
    lose their peer and Ray tears the group down."""
    import ray.train.torch

    line = EventClient(*config["desk"])
    context = ray.train.get_context()
    places: Places = config["places"]
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    plan = Plan.model_validate_json(config["plan"])
    scratch = Path(places.scratch) / f"rank-{context.get_world_rank()}"
    store = Store(places.output, scratch, places.job_uid)
    walk = PlanRunner(
        ledger=StageInputs(plan, store, Path(places.base_dir), Path(places.cache_dir)),
        worker=Worker(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=device,
            stop=line.stopped,
            attempt=config["attempt"],
        ),
        emit=line.emit,
    )
    with ExitStack() as stack:
        if places.drain:
            stack.enter_context(drain.registered(Path(places.drain), line.ask_to_stop))
        try:
            walk.run()
        except Interrupted as stopped:
            line.emit(failure_event(stopped))
        except Exception as error:
            named = error if isinstance(error, StageError) else unexpected(error)
            line.emit(failure_event(named))
            if context.get_world_size() > 1 or named is not error:
                raise  # a defect: for the worker's log
        else:
            line.emit({"type": "finished"})


# ---- where Ray runs -----------------------------------------------------------------------------


@contextmanager
def pods_cluster() -> Iterator[None]:
    """The Ray cluster whose head this process was started on."""
    # Its word for a pod that goes; ours is the preStop hook, which saves a checkpoint.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def pods_resources(compute: Compute) -> Resources:
    """What the operator gave the worker pods. Ray rounds a pod's CPUs up."""
    workers = compute.workers or 1
    return Resources.shared_out(
        workers,
        compute.min_workers or workers,
        compute.gpus_per_worker or 0,
        math.ceil(number(compute.cpus_per_worker or "4")),
    )


def number(quantity: str) -> float:
    """A Kubernetes quantity as a number: 0.5 of "500m"."""
    digits = quantity.rstrip("mkKMGTPi")
    return float(digits) * _UNITS[quantity[len(digits) :]]


@contextmanager
def local_cluster(resources: Resources) -> Iterator[None]:
    """Ray on this machine alone, just large enough, for as long as the context lasts."""
    for name, value in _LOCAL_RAY.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=math.ceil(resources.workers * resources.cpus_per_worker),
        num_gpus=resources.workers * resources.gpus_per_worker,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # `ray start` can leave the first out; ray.init has no word for any of them.
    if node := ray._private.worker._global_node:
        node.kill_log_monitor()  # copies logs to the driver, which asked for none
        node.kill_monitor()  # the autoscaler's
        node.kill_dashboard()  # runs for usage statistics even where no dashboard is wanted
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
    return Resources.shared_out(workers, workers, gpus, max(1, cpus // workers))
