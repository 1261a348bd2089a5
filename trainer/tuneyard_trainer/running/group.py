"""A worker group: the ranks that run a plan, and the process that follows them.

`distributed` starts the ranks with Ray Train, `processes` as processes of this machine.
"""

from __future__ import annotations

import json
import math
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneyard.api.job_facts import FitAnswer, JobFacts
from tuneyard.api.plan import Plan
from tuneyard.api.pods import WORKER_LOG
from tuneyard.errors import StageError
from tuneyard_trainer import drain
from tuneyard_trainer.logs.keep import LogPlace, kept, own_files
from tuneyard_trainer.running.channel import EventClient, EventServer
from tuneyard_trainer.running.failures import unexpected, unexplained
from tuneyard_trainer.running.runner import PlanRunner, StageInputs, failure_event
from tuneyard_trainer.storage.records import Store
from tuneyard_trainer.storage.results import Results
from tuneyard_trainer.worker import Interrupted, Worker

if TYPE_CHECKING:
    import torch

Review = Callable[[JobFacts], FitAnswer]
"""Decides from the facts of a job whether and how it trains. It is called in a thread of its own,
while events are relayed."""
POLL_SECONDS = 0.5
"""How often the driver checks whether it was asked to stop and whether the group still runs."""
TRAINING_THREAD = "training"
"""The thread that waits for the ranks."""


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

    @property
    def threads(self) -> int:
        """The threads of a process without a GPU."""
        return max(1, int(self.cpus_per_worker))

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
    results_bytes: int = 0
    """The most bytes of prepared data that the cache folder keeps for other jobs. 0: none is kept
    or used. In a pod it needs a cache folder that outlives the pod."""

    @property
    def results(self) -> Results | None:
        """The prepared data that jobs share in the cache. None: this job shares none."""
        if not self.results_bytes:
            return None
        return Results(Path(self.cache_dir) / "results", self.results_bytes)


@dataclass(frozen=True)
class Task:
    """The work of every rank."""

    plan: Plan
    places: Places
    attempt: int
    threads: int
    """Threads of a rank without a GPU."""
    neighbors: int = 1
    """Ranks that share the memory of the machine or of the pod."""
    preparing: bool = False
    """Run only the leading stages, which need no GPU."""


def follow(
    plan: Plan,
    train: Callable[[], object],
    server: EventServer,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event,
    review: Review | None,
) -> None:
    """Call `train`, which waits for the ranks, in a thread and relay their events meanwhile.

    `review` answers rank 0 before the first stage that trains. None: the job trains as planned.
    Setting `stop` makes the ranks save a checkpoint and end. Raises the StageError or Interrupted
    that the ranks raised, and StageError WorkerDied (retryable) if the group ended without an event
    that says why.
    """
    last_events = _last_events(train, server, on_event, stop, review)
    if not last_events and stop.is_set():
        raise Interrupted(plan.stages[0].name, 0)
    _raise_failure(last_events)


def _last_events(
    train: Callable[[], object],
    server: EventServer,
    on_event: Callable[[dict[str, Any]], None],
    stop: threading.Event,
    review: Review | None,
) -> list[dict[str, Any]]:
    """Relay events until the ranks have ended. Return each rank's last event. Raises what `review`
    raises."""
    last_events: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            train()
        except Exception as error:
            failures.append(error)

    def relay(event: dict[str, Any]) -> None:
        if event["type"] in ("failed", "interrupted", "finished"):
            last_events.append(event)
        elif event["type"] == "facts":
            # In a thread: the operator may take a minute, and other ranks have events meanwhile.
            arguments = (event["facts"], server, review)
            threading.Thread(target=_answer, args=arguments, daemon=True).start()
        elif event["type"] == "unanswered":
            raise event["error"]
        else:
            on_event(event)

    thread = threading.Thread(target=run, daemon=True, name=TRAINING_THREAD)
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


def _answer(facts: dict[str, Any], server: EventServer, review: Review | None) -> None:
    """Answer the rank that asks. An error becomes an event, which the relay raises."""
    try:
        known = JobFacts.model_validate_json(json.dumps(facts))
        found = review(known) if review else FitAnswer()
        server.answer(found.model_dump(mode="json", by_alias=True, exclude_none=True))
    except Exception as error:
        server.events.put({"type": "unanswered", "error": error})


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


def run_rank(
    task: Task, client: EventClient, rank: int, world_size: int, device: torch.device
) -> None:
    """Run the plan as one rank.

    A failure is sent as an event. With several ranks the failure is also raised, so that the group
    ends. A single rank raises only unexpected errors.
    """
    import torch

    places = task.places
    if device.type == "cpu":
        torch.set_num_threads(task.threads)
    store = Store(places.output, Path(places.scratch) / f"rank-{rank}", places.job_uid)
    inputs = StageInputs(
        task.plan, store, Path(places.base_dir), Path(places.cache_dir), client.emit
    )
    worker = Worker(
        rank=rank,
        world_size=world_size,
        device=device,
        stop=client.stopped,
        attempt=task.attempt,
    )
    with ExitStack() as stack:
        stack.enter_context(_log(task, rank, world_size))
        if places.drain:
            stack.enter_context(drain.registered(Path(places.drain), client.ask_to_stop))
        try:
            PlanRunner(
                stage_inputs=inputs,
                worker=worker,
                emit=client.emit,
                ask=client.ask,
                neighbors=task.neighbors,
                preparing=task.preparing,
                results=places.results,
            ).run()
        except Interrupted as stopped:
            client.emit(failure_event(stopped))
        except Exception as error:
            traceback.print_exc()
            named = error if isinstance(error, StageError) else unexpected(error)
            client.emit(failure_event(named))
            if world_size > 1 or named is not error:
                raise
        else:
            client.emit({"type": "finished"})


def connect(address: tuple[str, int], key: bytes) -> EventClient:
    """Connect a rank to its driver. A rank without its driver ends at once: it would train on."""
    return EventClient(address, key, on_lost=partial(os._exit, 1))


@contextmanager
def _log(task: Task, rank: int, world_size: int) -> Iterator[None]:
    """Keep this rank's log, which begins with the rank's place."""
    place = LogPlace(task.places.output, task.attempt, task.places.job_uid, task.places.drain)
    _note(f"worker {rank} of {world_size} on {socket.gethostname()}")
    with kept(place, f"{WORKER_LOG}{rank}", own_files(), warn=_note):
        yield


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
