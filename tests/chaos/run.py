"""Runs of one job each, under the faults of a seed, against an operator that is shared."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rig.ports import Reservation

from tests.chaos import faults, invariants, machine
from tests.chaos.faults import Fault, World
from tests.chaos.invariants import Reference
from tests.chaos.kubelet import Kubelet
from tests.chaos.wire import Wire
from tests.chart.rendering import Chart
from tests.controller.scene import Job, OperatedScene, namespace, operated
from tests.trainer.conftest import VOCABULARY, tiny_llama, tokenizer_of_bytes

if TYPE_CHECKING:
    from rig.plugin import Cluster

STEPS, BATCH, CHECKPOINT_STEPS = 40, 4, 5
PATIENCE_SECONDS = 240
GATHER_SECONDS = 60
ENDED = ("Succeeded", "Failed")


@dataclass
class Verdict:
    """The outcome of one run."""

    seed: int
    index: int
    struck: list[Fault]
    attempts: list[str] = field(default_factory=list)
    """The reasons of the attempts' ends."""
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)
    """The broken invariants."""

    def __str__(self) -> str:
        words = " ".join(map(str, self.struck)) or "undisturbed"
        ended = "broken: " + "; ".join(self.broken) if self.broken else "ok"
        return f"run {self.seed}/{self.index}: {words} -> {' '.join(self.attempts)} {ended}"


@dataclass
class Ground:
    """An operator, played nodes and the data of every run."""

    scene: OperatedScene
    world: World
    volumes: Path
    reference: Reference | None = None

    def play(self, seed: int, index: int) -> Verdict:
        """Run one job under the faults of the seed and check the invariants."""
        verdict = Verdict(seed, index, faults.draw(seed, index))
        began = time.monotonic()
        job = self._create(f"run-{index}-{secrets.token_hex(2)}")
        try:
            self._strike(job, verdict.struck)
            self._follow(job, verdict)
        except Exception as error:
            verdict.broken.append(f"{type(error).__name__}: {error}"[:2000])
        verdict.seconds = time.monotonic() - began
        return verdict

    def measure(self) -> None:
        """Run the job undisturbed, for the reference."""
        job = self._create("calm")
        job.until(lambda job: job.phase in ENDED or self.world.kubelet.failures, PATIENCE_SECONDS)
        assert job.phase == "Succeeded", (job.status, self.world.kubelet.failures)
        (played,) = self.world.kubelet.of(job)
        rows = tuple(invariants.rows_of(played))
        assert len(set(rows)) == len(rows) == STEPS * BATCH
        self.reference = Reference(job.status["result"]["digest"], rows)

    def _create(self, name: str) -> Job:
        return self.scene.create(
            name,
            policy={"backoffSeconds": 0, "maxAttempts": 20},
            model={"uri": "pvc://data/tiny"},
            data={
                "train": [{"uri": "pvc://data/train.jsonl"}],
                "validation": {"data": [{"uri": "pvc://data/validation.jsonl"}]},
            },
            adapter={"lora": {"dropout": 0.1}},
            training={
                "maxSteps": STEPS,
                "batchSize": BATCH,
                "learningRate": 0.01,
                "checkpointSteps": CHECKPOINT_STEPS,
                "evaluationSteps": 20,
            },
            evaluate={"maxNewTokens": 4, "samples": 2},
            compute={"workers": 1, "cpusPerWorker": "1"},
            output={"uri": f"pvc://models/{name}"},
        )

    def _strike(self, job: Job, struck: Sequence[Fault]) -> None:
        """Carry the faults out, one in each attempt as far as there are attempts."""
        for number, fault in enumerate(struck):
            self._wait(job, lambda number=number: len(self.world.kubelet.of(job)) > number)
            if fault.rows is None:
                time.sleep(fault.delay)
            else:
                wanted = fault.rows * STEPS * BATCH
                self._wait(job, lambda wanted=wanted: self._rows_read(job) >= wanted)
            faults.strike(self.world, job, fault)

    def _rows_read(self, job: Job) -> int:
        """Return the number of rows that the newest attempt has read."""
        played = self.world.kubelet.of(job)
        return len(invariants.rows_of(played[-1])) if played else 0

    def _wait(self, job: Job, condition: Callable[[], bool]) -> None:
        """Wait for the condition, at most until the job has ended or a minute has passed."""
        deadline = time.monotonic() + GATHER_SECONDS
        checked = time.monotonic()
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
            if time.monotonic() - checked > 0.5:
                checked = time.monotonic()
                if job.phase in ENDED:
                    return

    def _follow(self, job: Job, verdict: Verdict) -> None:
        job.until(lambda job: job.phase in ENDED, PATIENCE_SECONDS)
        status = job.status
        verdict.attempts = [str(each.get("reason")) for each in status.get("attempts", [])]
        assert self.reference
        broken = sum(fault.name == "break-checkpoint" for fault in verdict.struck)
        interval = (CHECKPOINT_STEPS + 1) * BATCH
        verdict.broken += invariants.violations(
            status,
            self.world.kubelet.of(job),
            self.reference,
            redone_rows=interval * (1 + broken),
        )
        job.delete()
        job.until(lambda job: not job.exists and not [*invariants.leftovers(job)])


@contextmanager
def ground(cluster: Cluster, helm: Path, folder: Path) -> Iterator[Ground]:
    """Prepare an operator with played nodes in a namespace of its own; measure the reference."""
    volumes = folder / "volumes"
    _write_data(volumes)
    with ExitStack() as stack:
        name = f"chaos-{secrets.token_hex(2)}"
        scene = stack.enter_context(namespace(cluster, Chart(helm), name, folder))
        ports = stack.enter_context(Reservation())
        wire = stack.enter_context(Wire(ports.take(), target := ports.take()))
        options = {"progress_port": str(target), "progress_url": f"https://127.0.0.1:{wire.port}"}
        running = stack.enter_context(operated(scene, folder, **options))
        processes = stack.enter_context(machine.running(folder))
        kubelet = stack.enter_context(Kubelet(scene, processes, folder / "pods", volumes))
        world = World(kubelet, running.operator, running.proxy, wire, threading.Lock())
        found = Ground(running, world, volumes)
        found.measure()
        yield found
        assert not kubelet.overlaps, kubelet.overlaps
        assert not kubelet.failures, kubelet.failures


def play_all(played: Ground, seed: int, runs: Sequence[int], parallel: int) -> Iterator[Verdict]:
    """Play the runs, several at a time, and yield each verdict as it ends."""
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(played.play, seed, index) for index in runs]
        for future in futures:
            yield future.result()


def _write_data(volumes: Path) -> None:
    data = volumes / "data"
    data.mkdir(parents=True)
    (volumes / "models").mkdir()
    for name, count in (("train", STEPS * BATCH), ("validation", 8)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Which number has {name} lamp {i}?"},
                    {"role": "assistant", "content": f"Lamp {i} has number {7 * i}."},
                ]
            }
            for i in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(lines)
    tiny_llama(VOCABULARY).save_pretrained(data / "tiny")
    tokenizer_of_bytes().save_pretrained(data / "tiny")
