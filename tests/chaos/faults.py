"""The faults, and the seeded draw of those of one run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from tests.chaos.kubelet import Kubelet, Played
from tests.chaos.wire import Wire
from tests.controller.faults import Answer, Cut, Delay, FaultProxy, Request
from tests.controller.running import Operator
from tests.controller.scene import Job, RefusedError

LONGEST_DELAY_SECONDS = 5.0
"""A fault that strikes by the clock is spread over this time from the start of an attempt, which
takes about 5 s."""
MOST_FAULTS = 3
IN_TRAINING = 0.6
"""The share of faults that strike in training, which is a second of the five."""


@dataclass
class World:
    """What the faults act on."""

    kubelet: Kubelet
    operator: Operator
    proxy: FaultProxy
    wire: Wire
    """The connection between drivers and operator."""
    restarting: threading.Lock
    """Held while the operator is restarted."""


@dataclass(frozen=True)
class Fault:
    """One fault of a run: it strikes its attempt in training, or at any time."""

    name: str
    rows: float | None
    """The share of the training rows, from 0 to 1, that are read before it strikes; None: it
    strikes by the clock."""
    delay: float
    """Seconds after the attempt has started; counted only without `rows`."""
    amount: float
    """From 0 to 1: how long or how much, where the kind of fault can vary."""

    def __str__(self) -> str:
        when = f"{self.delay:.1f}s" if self.rows is None else f"{self.rows:.0%}"
        return f"{self.name}@{when}"


def draw(seed: int, index: int) -> list[Fault]:
    """Return the faults of run `index`, in the order in which they strike."""
    chance = random.Random(f"{seed}/{index}")
    return [
        Fault(
            chance.choice(sorted(KINDS)),
            chance.random() if chance.random() < IN_TRAINING else None,
            chance.uniform(0, LONGEST_DELAY_SECONDS),
            chance.random(),
        )
        for _ in range(chance.randint(1, MOST_FAULTS))
    ]


# ---- faults of the attempt's processes ----------------------------------------------------------


def _newest(world: World, job: Job) -> Played | None:
    played = world.kubelet.of(job)
    return played[-1] if played else None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _kill_driver(world: World, job: Job, _: float) -> None:
    if played := _newest(world, job):
        _signal(played.driver, signal.SIGKILL)


def _kill_worker(world: World, job: Job, _: float) -> None:
    if played := _newest(world, job):
        for worker in played.workers:
            _signal(worker, signal.SIGKILL)


def _lose_node(world: World, job: Job, _: float) -> None:
    if played := _newest(world, job):
        played.kill()


def _pause_worker(world: World, job: Job, amount: float) -> None:
    played = _newest(world, job)
    for worker in played.workers if played else []:
        _signal(worker, signal.SIGSTOP)
        time.sleep(2 * amount)
        _signal(worker, signal.SIGCONT)


def _evict(world: World, job: Job, amount: float) -> None:
    """Delete the head's or the worker's pod."""
    if played := _newest(world, job):
        attempt = played.attempt
        attempt.remove_pod(attempt.head if amount < 0.5 else attempt.worker)


def _break_checkpoint(world: World, job: Job, amount: float) -> None:
    """Cut the newest checkpoint's largest file short, then kill the worker."""
    output = world.kubelet.volumes / "models" / job.name
    with suppress(OSError, ValueError):
        newest = max(
            (path for path in output.glob("stages/*/checkpoints/*") if path.is_dir()),
            key=lambda path: path.stat().st_mtime,
        )
        largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
        os.truncate(largest, int(largest.stat().st_size * amount))
    _kill_worker(world, job, amount)


# ---- faults of the user -------------------------------------------------------------------------


def _suspend(world: World, job: Job, _: float) -> None:
    job.set(suspend=True)
    deadline = time.monotonic() + 60
    while job.phase not in ("Suspended", "Succeeded") and time.monotonic() < deadline:
        time.sleep(0.2)
    job.set(suspend=False)


def _recreate(world: World, job: Job, _: float) -> None:
    """Delete the job and create it again under the same name."""
    spec = job.body["spec"]
    job.delete()
    deadline = time.monotonic() + 60
    while job.exists and time.monotonic() < deadline:
        time.sleep(0.1)
    job.scene.api("POST", job.path.removesuffix(f"/{job.name}"), job.manifest(spec))


# ---- faults of operator, API server and network -------------------------------------------------


def _kill_operator(world: World, _: Job, amount: float) -> None:
    with world.restarting:
        world.operator.kill()
        time.sleep(amount)
        world.operator.start()


def _writes_of(job: Job) -> Callable[[Request], bool]:
    return lambda request: request.is_write and f"/{job.name}" in request.path


def _refuse_writes(world: World, job: Job, amount: float) -> None:
    code = (409, 429, 500)[int(amount * 3)]
    after = 1 if code == 429 else None
    world.proxy.add(Answer(code, retry_after=after), _writes_of(job), times=1 + int(amount * 4))


def _lose_answers(world: World, job: Job, amount: float) -> None:
    world.proxy.add(Cut("before" if amount < 0.5 else "after"), _writes_of(job), times=2)


def _drop_watches(world: World, _: Job, __: float) -> None:
    world.proxy.drop_watches()


def _slow_api(world: World, job: Job, amount: float) -> None:
    world.proxy.add(Delay(amount), _writes_of(job), times=3)


def _cut_wire(world: World, _: Job, amount: float) -> None:
    with world.wire.cut():
        time.sleep(3 * amount)


def _slow_wire(world: World, _: Job, amount: float) -> None:
    with world.wire.slowed(0.5 * amount):
        time.sleep(2)


KINDS: Mapping[str, Callable[[World, Job, float], None]] = {
    "kill-driver": _kill_driver,
    "kill-worker": _kill_worker,
    "lose-node": _lose_node,
    "pause-worker": _pause_worker,
    "evict": _evict,
    "break-checkpoint": _break_checkpoint,
    "suspend": _suspend,
    "recreate": _recreate,
    "kill-operator": _kill_operator,
    "refuse-writes": _refuse_writes,
    "lose-answers": _lose_answers,
    "drop-watches": _drop_watches,
    "slow-api": _slow_api,
    "cut-wire": _cut_wire,
    "slow-wire": _slow_wire,
}


def strike(world: World, job: Job, fault: Fault) -> None:
    """Carry out a fault. An object that is gone meanwhile is not an error."""
    with suppress(RefusedError):
        KINDS[fault.name](world, job, fault.amount)
