"""The only Ray code: one Ray Train worker group in which every rank walks the plan.

The group is started once per attempt and stays for all stages, so a job pays for process start-up
and imports once. What workers have to say goes to a mailbox actor, fire and forget; the driver
reads it. A mailbox's answer to a post says whether the run shall stop.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
POLL_SECONDS = 0.5
"""How often the driver asks the mailbox; each time costs both about a millisecond of a core."""


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


class Mailbox:
    """Collects events until the driver drains them. Runs as a Ray actor."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False

    def post(self, event: dict[str, Any]) -> bool:
        """Takes an event; answers whether a stop was asked for."""
        self._events.append(event)
        return self._stop

    def drain(self) -> list[dict[str, Any]]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Asks the workers to checkpoint and end."""
        self._stop = True


class Outbox:
    """A worker's side of the mailbox: never waits for it, except to hand over what must arrive."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._answer: Any = None
        self._stop = False
        self._posted = 0.0

    def emit(self, event: dict[str, Any]) -> None:
        """Posts stage events surely and in order; of progress, the newest that is due."""
        if event["type"] != "progress" or event["message"]:
            self._stop = ray.get(self._mailbox.post.remote(event)) or self._stop
            return
        if time.monotonic() - self._posted < POST_SECONDS and not _final(event):
            return
        self._posted = time.monotonic()
        self._collect()
        self._answer = self._mailbox.post.remote(event)

    def stopped(self) -> bool:
        """Whether any answer so far asked to stop; looks only at answers that are there."""
        self._collect()
        return self._stop

    def _collect(self) -> None:
        if self._answer is None:
            return
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            self._stop = ray.get(self._answer) or self._stop
            self._answer = None


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
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    trainer = TorchTrainer(
        _walk,
        train_loop_config={
            "plan": plan.to_json(),
            "places": places,
            "attempt": attempt,
            "mailbox": mailbox,
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
    endings = _follow(trainer, mailbox, on_event, stop)
    _raise(endings)


def _per_worker(resources: Resources) -> dict[str, float]:
    wanted = {"CPU": float(resources.cpus_per_worker)}
    if resources.gpus_per_worker:
        wanted["GPU"] = float(resources.gpus_per_worker)
    return wanted


def _follow(
    trainer: TorchTrainer,
    mailbox: Any,
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

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    asked = False
    while True:
        alive = thread.is_alive()
        for event in ray.get(mailbox.drain.remote()):
            if event["type"] in ("failed", "interrupted", "finished"):
                endings.append(event)
            else:
                on_event(event)
        if not alive:
            break
        if stop.is_set() and not asked:
            mailbox.stop.remote()
            asked = True
        thread.join(POLL_SECONDS)
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

    outbox = Outbox(config["mailbox"])
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
            stop=outbox.stopped,
            attempt=config["attempt"],
        ),
        emit=outbox.emit,
    )
    try:
        walk.run()
    except (StageError, Interrupted) as error:
        outbox.emit(failure_event(error))
        if isinstance(error, StageError) and context.get_world_size() > 1:
            raise
    else:
        outbox.emit({"type": "finished"})


# ---- one machine --------------------------------------------------------------------------------


@contextmanager
def local_cluster(resources: Resources) -> Iterator[None]:
    """Ray on this machine alone, just large enough, for as long as the context lasts."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets anything else go first
    ray.init(
        address="local",
        num_cpus=resources.workers * resources.cpus_per_worker,
        num_gpus=resources.workers * resources.gpus_per_worker,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
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
