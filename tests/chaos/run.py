"""Runs of one job each, under the faults of a seed, against an operator that is shared."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rig.ports import Reservation

from tests.chaos import faults, invariants, machine
from tests.chaos.api import PatientApi
from tests.chaos.faults import KINDS, Fault, World
from tests.chaos.invariants import Reference
from tests.chaos.kubelet import Kubelet
from tests.chaos.results import Verdict
from tests.chaos.wire import Wire
from tests.chart.rendering import Chart
from tests.controller.newer import newer_crds
from tests.controller.scene import SPECS, Job, OperatedScene, Scene, namespace, operated
from tests.trainer.conftest import VOCABULARY, tiny_llama, tokenizer_of_bytes

if TYPE_CHECKING:
    from rig.plugin import Cluster

OPERATOR = ("-m", "tests.chaos.operator")
STEPS, BATCH, CHECKPOINT_STEPS = 40, 4, 5
PATIENCE_SECONDS = 600.0
GATHER_SECONDS = 300.0
POLL_SECONDS = 0.3
DISK = "4m"
"""The size of a file system that is filled; an output takes a tenth of it."""
ENDED = ("Succeeded", "Failed")


@dataclass
class Ground:
    """An operator, played nodes and the data of every run."""

    scene: OperatedScene
    world: World
    volumes: Path
    reference: Reference | None = None

    def play(self, seed: int, index: int) -> Verdict:
        """Run one job under the faults of the seed and check the invariants."""
        began = time.monotonic()
        verdict = Verdict(seed, index, datetime.now(UTC).isoformat(timespec="seconds"))
        name = f"run-{seed}-{index}-{secrets.token_hex(2)}"
        drawn = faults.draw(seed, index)
        try:
            with self._disk(name, drawn):
                job = self._create(name)
                self._strike(job, drawn, verdict)
                self._follow(job, verdict)
        except Exception as error:
            verdict.broken.append(f"{type(error).__name__}: {error}"[:2000])
        verdict.seconds = round(time.monotonic() - began, 1)
        own = [text.partition("@")[0] for text in verdict.struck]
        others = [name for at, name in self.world.shared if at >= began]
        for name in own:
            if name in others:
                others.remove(name)
        verdict.shared = others
        return verdict

    def measure(self) -> None:
        """Run the job undisturbed, for the reference."""
        job = self._create("calm")
        kubelet = self.world.kubelet
        _until(lambda: job.phase in ENDED or kubelet.failures, PATIENCE_SECONDS)
        assert job.phase == "Succeeded", (job.status, kubelet.failures)
        (played,) = kubelet.of(job)
        output = self.world.kubelet.output_of(job)
        self.reference = reference = invariants.reference_of(job.status, played, output)
        assert len(set(reference.rows)) == len(reference.rows) == STEPS * BATCH
        assert len(set(reference.steps)) == len(reference.steps) == STEPS
        self._remove(job)

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
            output={"uri": f"pvc://models/{name}/out"},
        )

    @contextmanager
    def _disk(self, name: str, drawn: Sequence[Fault]) -> Iterator[None]:
        """While active, the job's output is on a small file system, if a fault fills it. Mounting
        needs root."""
        if not self._mounts or not any(fault.name == "fill-disk" for fault in drawn):
            yield
            return
        folder = self.volumes / "models" / name
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
        subprocess.run(["mount", *options], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)

    @property
    def _mounts(self) -> bool:
        return os.geteuid() == 0

    def _strike(self, job: Job, drawn: Sequence[Fault], verdict: Verdict) -> None:
        """Carry the faults out, one after the other, until the job has ended."""
        for fault in drawn:
            if fault.rows is None:
                time.sleep(fault.delay)
            else:
                wanted = fault.rows * STEPS * BATCH
                self._wait(job, lambda wanted=wanted: self._rows_read(job) >= wanted)
            possible = self._mounts if fault.name == "fill-disk" else self._can_kill(fault)
            if not possible or job.phase in ENDED:
                verdict.missed.append(str(fault))
            else:
                verdict.struck.append(str(fault))
                faults.strike(self.world, job, fault)

    def _can_kill(self, fault: Fault) -> bool:
        return fault.name != "kill-apiserver" or self.world.rig is not None

    def _rows_read(self, job: Job) -> int:
        """Return the number of training rows that any attempt has read."""
        return len(
            {row for played in self.world.kubelet.of(job) for row in invariants.rows_of(played)}
        )

    def _wait(self, job: Job, condition: Callable[[], bool]) -> None:
        """Wait for the condition, at most until the job has ended."""
        deadline = time.monotonic() + GATHER_SECONDS
        checked = time.monotonic()
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.03)
            if time.monotonic() - checked > 1:
                checked = time.monotonic()
                if job.phase in ENDED:
                    return

    def _follow(self, job: Job, verdict: Verdict) -> None:
        _until(lambda: job.phase in ENDED, PATIENCE_SECONDS, lambda: job.status)
        assert self.reference
        body = job.body
        status, kubelet = body["status"], self.world.kubelet
        played = kubelet.of(job)
        verdict.attempts = [str(each.get("reason")) for each in status.get("attempts", [])]
        verdict.started = len(played)
        names = [text.partition("@")[0] for text in verdict.struck]
        ends = {reason for name in names for reason in KINDS[name].ends}
        verdict.broken += invariants.of_status(status, body["metadata"]["uid"], played, ends)
        if status.get("phase") == "Succeeded":
            unwritten = sum(name in ("break-checkpoint", "fill-disk") for name in names)
            verdict.broken += invariants.of_output(
                status,
                played,
                self.world.kubelet.output_of(job),
                self.reference,
                interval_rows=(CHECKPOINT_STEPS + 1) * BATCH,
                num_unwritten=unwritten,
            )
        verdict.broken += [text for name, text in kubelet.overlaps if name == job.name]
        self._remove(job)
        if not verdict.broken:  # hundreds of outputs would fill the disk
            shutil.rmtree(self.world.kubelet.output_of(job), ignore_errors=True)

    def _remove(self, job: Job) -> None:
        job.delete()
        left: list[str] = []

        def is_gone() -> bool:
            left[:] = ["the job itself"] if job.exists else [*invariants.leftovers(job)]
            return not left

        _until(is_gone, PATIENCE_SECONDS, lambda: left)


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
        scene.api = PatientApi(cluster.kubeconfig)
        stack.enter_context(newer_crds(scene, lambda: _has_newer_field(scene)))
        running = stack.enter_context(operated(scene, folder, OPERATOR, **options))
        running.api = scene.api
        processes = stack.enter_context(machine.running(folder))
        kubelet = stack.enter_context(Kubelet(scene, processes, folder / "pods", volumes))
        world = World(kubelet, running.operator, running.proxy, wire, cluster.rig)
        stack.enter_context(_deployed(world))
        found = Ground(running, world, volumes)
        before = invariants.inventory(scene)
        found.measure()
        yield found
        assert not kubelet.failures, kubelet.failures
        assert invariants.inventory(scene) == before


@contextmanager
def _deployed(world: World) -> Iterator[None]:
    """While active, an operator that exits is started again, as by its Deployment: it exits when it
    cannot renew its Lease."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            with world.restarting:
                if not world.operator.is_alive:
                    world.operator.start()

    thread = threading.Thread(target=watch, daemon=True, name="deployment")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def play_all(played: Ground, seed: int, runs: Sequence[int], parallel: int) -> Iterator[Verdict]:
    """Play the runs, several at a time, and yield each verdict as it ends."""
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(played.play, seed, index) for index in runs]
        for future in as_completed(futures):
            yield future.result()


def _until(
    condition: Callable[[], object], seconds: float, context: Callable[[], object] = lambda: ""
) -> None:
    """Wait until the condition is true. AssertionError: it is not, after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true after {seconds:.0f} s: {context()}"
        time.sleep(POLL_SECONDS)


def _has_newer_field(scene: Scene) -> bool:
    """Return whether the API server adds the default of a newer version's field."""
    path = f"/apis/tuneyard.io/v1alpha1/namespaces/{scene.namespace}/finetunejobs?dryRun=All"
    spec = {**SPECS["FineTuneJob"], "output": {"uri": "pvc://models/probe"}}
    answer = scene.api("POST", path, Job(scene, "FineTuneJob", "probe").manifest(spec))
    return "ofANewerVersion" in answer["spec"]


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
