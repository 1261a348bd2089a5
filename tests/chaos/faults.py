"""The faults, and the seeded draw of those of one run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil
from rig.rig import Rig

from tests.chaos import certificates
from tests.chaos.kubelet import Kubelet, Played
from tests.chaos.wire import Wire
from tests.controller import newer
from tests.controller.faults import Answer, Cut, Delay, FaultProxy, Request
from tests.controller.running import Operator
from tests.controller.scene import Job, Object, RefusedError

LONGEST_DELAY_SECONDS = 4.0
"""A fault that strikes by the clock waits at most so long after the one before it."""
MOST_FAULTS = 3
IN_TRAINING = 0.6
"""The share of faults that strike in training, which is a fraction of an attempt's time."""
WAIT_SECONDS = 300.0
"""The longest wait for the effect of a fault."""


@dataclass
class World:
    """What the faults act on."""

    kubelet: Kubelet
    operator: Operator
    proxy: FaultProxy
    wire: Wire
    """The connection between drivers and operator."""
    rig: Rig | None
    """The rig with the API server; None: a cluster whose API server cannot be killed."""
    restarting: threading.Lock = field(default_factory=threading.Lock)
    """Held while the operator or the API server is restarted."""
    shared: list[tuple[float, str]] = field(default_factory=list)
    """The times (monotonic) and names of the faults so far that strike every job."""


@dataclass(frozen=True)
class Fault:
    """One fault of a run: it strikes at a point of the training, or by the clock."""

    name: str
    rows: float | None
    """The share of the training rows, from 0 to 1, that are read before it strikes; None: it
    strikes by the clock."""
    delay: float
    """Seconds after the fault before it, or after the job's creation; counted only without
    `rows`."""
    amount: float
    """From 0 to 1: how long or how much, where the kind of fault can vary."""

    def __str__(self) -> str:
        when = f"{self.delay:.1f}s" if self.rows is None else f"{self.rows:.0%}"
        return f"{self.name}@{when}"


def draw(seed: int, index: int) -> list[Fault]:
    """Return the faults of run `index`, in the order in which they strike."""
    chance = random.Random(f"{seed}/{index}")
    names = sorted(KINDS)
    weights = [KINDS[name].weight for name in names]
    return [
        Fault(
            chance.choices(names, weights)[0],
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


# ---- faults of the output -----------------------------------------------------------------------


def _break_checkpoint(world: World, job: Job, amount: float) -> None:
    """Cut a file of the newest checkpoint short or remove it, then kill the worker."""
    with suppress(OSError, ValueError):
        newest = max(
            path
            for path in world.kubelet.output_of(job).glob("stages/*/checkpoints/step-*")
            if not path.suffix
        )
        files = sorted(newest.iterdir())
        chosen = files[int(amount * 1000) % len(files)]
        if amount < 0.2:
            chosen.unlink()
        else:
            os.truncate(chosen, int(chosen.stat().st_size * (amount - 0.2)))
    _kill_worker(world, job, amount)


def _fill_disk(world: World, job: Job, amount: float) -> None:
    """Fill the file system of the output until the job has failed; the user frees it again, reads
    the status and creates the job anew."""
    ballast = (
        world.kubelet.output_of(job).parent / "ballast"
    )  # no job takes a folder with foreign files
    try:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        _wait(lambda: job.phase in ("Succeeded", "Failed"))
    finally:
        ballast.unlink(missing_ok=True)
    if job.phase == "Failed":
        told = job.failure
        assert told == "DiskFull", f"a full disk ended it with {told}: {job.status}"
        _recreate(world, job, amount)


# ---- faults of the user -------------------------------------------------------------------------


def _suspend(_: World, job: Job, __: float) -> None:
    job.set(suspend=True)
    _wait(lambda: job.phase in ("Suspended", "Succeeded", "Failed"))
    job.set(suspend=False)


def _recreate(_: World, job: Job, __: float) -> None:
    """Delete the job and create it again under the same name."""
    body = job.body
    job.delete()
    _wait(lambda: uid_of(job) != body["metadata"]["uid"])
    job.scene.api("POST", job.path.removesuffix(f"/{job.name}"), job.manifest(body["spec"]))


def uid_of(job: Job) -> str | None:
    """Return the uid of the job with this name; None: there is none."""
    found: Object | None = job.scene.api.find(job.path)
    return found["metadata"]["uid"] if found else None


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


# ---- faults of operator, API server and network -------------------------------------------------


@contextmanager
def _operator_down(world: World) -> Iterator[None]:
    with world.restarting:
        world.operator.kill()
        try:
            yield
        finally:
            world.operator.start()
            world.operator.wait_until_active(WAIT_SECONDS)


def _kill_operator(world: World, _: Job, amount: float) -> None:
    with _operator_down(world):
        time.sleep(2 * amount)


def _other_version(world: World, job: Job, amount: float) -> None:
    """Replace the operator: a newer version has written the status meanwhile."""
    with _operator_down(world):
        time.sleep(amount)
        newer.of_a_newer_version(job)


def _expire_certificate(world: World, job: Job, _: float) -> None:
    """Give the status server a certificate that ends in seconds; posts fail until its renewal."""
    with _operator_down(world):
        certificates.shorten(job.scene)


def _kill_apiserver(world: World, _: Job, __: float) -> None:
    if world.rig is None:
        return
    with world.restarting:
        pid = world.rig.server("kube-apiserver")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        world.kubelet.scene.api("GET", "/api/v1/namespaces/default")  # answered when it is up again


def _writes_of(job: Job) -> Callable[[Request], bool]:
    return lambda request: request.is_write and f"/{job.name}" in request.path


def _refuse(code: int, retry_after: int | None = None) -> Callable[[World, Job, float], None]:
    """Let the API server answer the job's next writes with an error."""

    def strike(world: World, job: Job, amount: float) -> None:
        answer = Answer(code, retry_after=retry_after)
        world.proxy.add(answer, _writes_of(job), times=1 + int(amount * 4))

    return strike


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


# ---- all of them --------------------------------------------------------------------------------

LOST = frozenset({"WorkerDied", "DriverError"})
"""Why an attempt ended whose process was killed."""
EVICTED = LOST | {"Preempted"}


class Kind(NamedTuple):
    """A kind of fault."""

    strike: Callable[[World, Job, float], None]
    ends: frozenset[str] = frozenset()
    """The reasons that the status may give for an attempt that the fault ended; none: it ends no
    attempt."""
    shared: bool = False
    """Whether it strikes every job that runs."""
    weight: float = 1.0
    """How often it is drawn; a fault that stops all runs for seconds is drawn less often."""


KINDS: Mapping[str, Kind] = {
    "kill-driver": Kind(_kill_driver, LOST),
    "kill-worker": Kind(_kill_worker, LOST),
    "lose-node": Kind(_lose_node, LOST),
    "pause-worker": Kind(_pause_worker),
    "evict": Kind(_evict, EVICTED),
    "break-checkpoint": Kind(_break_checkpoint, LOST),
    "fill-disk": Kind(_fill_disk, frozenset({"DiskFull"}), weight=0.7),
    "suspend": Kind(_suspend, frozenset({"Suspended"})),
    "recreate": Kind(_recreate),
    "kill-operator": Kind(_kill_operator, shared=True, weight=0.5),
    "other-version": Kind(_other_version, shared=True, weight=0.4),
    "expire-certificate": Kind(_expire_certificate, shared=True, weight=0.2),
    "kill-apiserver": Kind(_kill_apiserver, shared=True, weight=0.2),
    "answer-409": Kind(_refuse(409)),
    "answer-429": Kind(_refuse(429, retry_after=1)),
    "answer-500": Kind(_refuse(500)),
    "lose-answers": Kind(_lose_answers),
    "drop-watches": Kind(_drop_watches, shared=True),
    "slow-api": Kind(_slow_api),
    "cut-wire": Kind(_cut_wire, shared=True),
    "slow-wire": Kind(_slow_wire, shared=True),
}


def strike(world: World, job: Job, fault: Fault) -> None:
    """Carry out a fault. An object that is gone meanwhile is not an error."""
    kind = KINDS[fault.name]
    if kind.shared:
        world.shared.append((time.monotonic(), fault.name))
    try:
        kind.strike(world, job, fault.amount)
    except RefusedError as refused:
        if refused.status not in (404, 409):
            raise
