"""A worker group of Ray Train on the Ray cluster of a job's pods. No other module imports Ray.

The group starts once per attempt and runs all stages, so a job pays for process start-up and
imports once. Workers send their events to the driver over `channel`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from tuneyard.api.compute import Compute
from tuneyard.api.plan import Plan
from tuneyard.api.pods import WORKERS_VARIABLE
from tuneyard.api.quantity import quantity_value
from tuneyard_trainer.running import group
from tuneyard_trainer.running.channel import EventServer
from tuneyard_trainer.running.group import Places, Resources
from tuneyard_trainer.running.waits import wait_event

GATHER_SECONDS = 60.0
"""How long an elastic job waits for all its workers before it starts with fewer."""
NEVER_SECONDS = 1e9
"""The interval of resizing, so long that a running group never grows: Ray would restart it, and it
would repeat steps. The next attempt grows instead."""


def run(
    plan: Plan,
    *,
    places: Places,
    resources: Resources,
    attempt: int,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event,
    review: group.Review | None = None,
) -> None:
    """Run the plan in a worker group on the connected Ray cluster; return when it is done.

    `on_event` is called in this thread for every event. Setting `stop` makes the workers save a
    checkpoint and end. `review` decides before the first stage that trains whether and how the job
    trains. None: it trains as planned. Raises the StageError or Interrupted that the workers
    raised, and StageError WorkerDied (retryable) if the group ended without an event that says why.
    """
    on_event(wait_event("importing Ray Train"))
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    on_event(wait_event("starting the workers"))
    _gather(resources, stop)
    server = EventServer(ray.util.get_node_ip_address())
    failures: dict[str, Any] = {"max_failures": 0, "max_preemption_failures": 0}
    trainer = TorchTrainer(
        _run_rank,
        train_loop_config={
            "plan": plan.to_json(),
            "places": places,
            "attempt": attempt,
            "event_server": (server.address, server.key),
            "threads": resources.threads,
        },
        scaling_config=ScalingConfig(**_scaling(resources)),
        run_config=RunConfig(
            name=f"{plan.job.name}-{attempt}",
            storage_path=places.scratch,
            failure_config=FailureConfig(**failures),
        ),
    )
    group.follow(plan, trainer.fit, server, on_event, stop, review)


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


def _run_rank(config: dict[str, Any]) -> None:
    """The training function of every rank. Ray would wrap a StageError."""
    client = group.connect(*config["event_server"])
    client.emit(wait_event("importing torch"))
    import ray.train.torch

    context = ray.train.get_context()
    plan = Plan.model_validate_json(config["plan"])
    task = group.Task(plan, config["places"], config["attempt"], config["threads"])
    ranks = context.get_world_rank(), context.get_world_size()
    group.run_rank(task, client, *ranks, ray.train.torch.get_device())


# ---- the Ray cluster ----------------------------------------------------------------------------


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
    if not any(thread.name == group.TRAINING_THREAD for thread in threading.enumerate()):
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
