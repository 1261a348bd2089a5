"""Random faults against real pods: the kinds, their seeded draw, and what must hold after each.

A run is one job, and several runs share the node: a fault that strikes the operator or the node
strikes all of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from rig.errors import RigError

from tests.chart.rendering import NAMESPACE as OPERATOR_NAMESPACE
from tests.cluster.conftest import Object, Platform
from tests.cluster.jobs import tiny

STEPS, CHECKPOINT_STEPS = 400, 20
LAST_CHECKPOINT = 160
"""A fault strikes when a checkpoint is complete, at the latest this one."""
PATIENCE_SECONDS = 1200
ENDED = ("Succeeded", "Failed")

WAIT = """
import pathlib, sys, time
deadline = time.monotonic() + 600
folder, step = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def newest():
    found = (path.name.removeprefix("step-") for path in folder.glob("step-????????"))
    return max(map(int, found), default=0)
while newest() < step and time.monotonic() < deadline:
    time.sleep(0.005)
"""
"""Wait in a pod for a checkpoint of at least this step."""
KILL = "\nimport os, signal\nos.kill(-1, signal.SIGKILL)  # every process of the pod\n"
MEASURE = """
import hashlib, json, pathlib
output = pathlib.Path("/models/{name}")
weights = output / "result" / "adapter" / "adapter_model.safetensors"
digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else ""
lines = map(json.loads, (output / "stages" / "sft" / "metrics.jsonl").read_text().splitlines())
print(json.dumps(dict(weights=digest, steps=[line["step"] for line in lines if "loss" in line])))
"""


def measure(name: str) -> str:
    """Return a script that prints the digest of an output's weights and the steps of its training
    curve."""
    return MEASURE.format(name=name)


@dataclass(frozen=True)
class Run:
    """A job and the fault that strikes it."""

    seed: int
    index: int
    fault: str
    step: int
    """The fault strikes when a checkpoint of this step is complete."""

    @property
    def name(self) -> str:
        """The name of its job."""
        return f"chaos-{self.seed}-{self.index}"


def draw(seed: int, index: int) -> Run:
    """Return run `index` of a seed. Every kind strikes once in as many runs as there are kinds."""
    names = sorted(KINDS)
    random.Random(f"{seed}/{index // len(names)}").shuffle(names)
    steps = range(CHECKPOINT_STEPS, LAST_CHECKPOINT + 1, CHECKPOINT_STEPS)
    step = random.Random(f"{seed}/{index}").choice(steps)
    return Run(seed, index, names[index % len(names)], step)


def play(platform: Platform, run: Run) -> Object:
    """Run the job under its fault and return its status at the end."""
    platform.apply(tiny(run.name, steps=STEPS, checkpoint_steps=CHECKPOINT_STEPS))
    kind = KINDS[run.fault]
    worker = running_pod(platform, run.name, "worker")
    script = WAIT + (KILL if run.fault == "kill-worker" else "")
    folder = f"/mnt/pvc/models/{run.name}/stages/sft/checkpoints"
    execute(platform, worker, script, folder, str(run.step))
    if kind.strike is not None:
        kind.strike(platform, run)
    status: Object = platform.until(
        f"{run.name} ends", lambda: _ended(platform, run.name), PATIENCE_SECONDS, every=3.0
    )
    return status


def _ended(platform: Platform, name: str) -> Object | None:
    status = _patiently(lambda: platform.status(name))
    return status if status.get("phase") in ENDED else None


def _patiently(read: Callable[[], Any]) -> Any:
    """Return what can be read; {}: nothing just now."""
    try:
        return read()
    except RigError:
        return {}


# ---- pods ---------------------------------------------------------------------------------------


def running_pod(platform: Platform, job: str, role: str) -> str:
    """Wait for the job's running pod of this role (head, worker, submitter) and return its name."""

    def found() -> str | None:
        pods = platform.items("pods", f"tuneyard.io/job={job}")
        names = [
            pod["metadata"]["name"]
            for pod in pods
            if _role(pod) == role
            and pod["status"].get("phase") == "Running"
            and "deletionTimestamp" not in pod["metadata"]
        ]
        return names[0] if names else None

    name: str = platform.until(f"the {role} of {job} runs", found, PATIENCE_SECONDS)
    return name


def _role(pod: Object) -> str:
    role: str = pod["metadata"]["labels"].get("ray.io/node-type", "submitter")
    return role


def execute(platform: Platform, pod: str, script: str, *arguments: str) -> None:
    """Run a Python script in the pod; it may end with its pod."""
    command = ("exec", pod, "--", "python", "-c", script, *arguments)
    platform.cluster.kubectl("-n", platform.namespace, *command, check=False)


def _evicted(platform: Platform, pod: str) -> None:
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": platform.namespace},
    }
    path = f"/api/v1/namespaces/{platform.namespace}/pods/{pod}/eviction"
    platform.cluster.kubectl(
        "create", "--raw", path, "-f", "-", input=json.dumps(body), check=False
    )


# ---- faults -------------------------------------------------------------------------------------


def _kill_head(platform: Platform, run: Run) -> None:
    execute(platform, running_pod(platform, run.name, "head"), KILL)


def _kill_submitter(platform: Platform, run: Run) -> None:
    pod = running_pod(platform, run.name, "submitter")
    platform.kubectl("delete", "pod", pod, "--grace-period=0", "--force")


def _kill_operator(platform: Platform, _: Run) -> None:
    arguments = ("delete", "pod", "--all", "--grace-period=0", "--force")
    platform.cluster.kubectl("-n", OPERATOR_NAMESPACE, *arguments)


def _kill_containerd(platform: Platform, _: Run) -> None:
    """On a rig, which starts it again."""
    assert platform.cluster.rig is not None
    pid = platform.cluster.rig.server("containerd")
    assert pid is not None, "containerd does not run"
    os.kill(pid, signal.SIGKILL)


def _evict(platform: Platform, run: Run) -> None:
    _evicted(platform, running_pod(platform, run.name, "worker"))


def _drain(platform: Platform, run: Run) -> None:
    """Cordon the node, evict the job's pods and uncordon the node."""
    (node,) = platform.items("nodes")
    name = node["metadata"]["name"]
    platform.cluster.kubectl("cordon", name)
    try:
        pods = platform.pods(run.name)
        for pod in pods:
            _evicted(platform, pod)
        platform.until(
            f"the pods of {run.name} have left the node",
            lambda: not {*pods} & {*platform.pods(run.name)},
            300,
        )
    finally:
        platform.cluster.kubectl("uncordon", name)


class Kind(NamedTuple):
    """A kind of fault."""

    strike: Callable[[Platform, Run], None] | None
    """None: a script in the worker's pod has struck."""
    ends: frozenset[str] = frozenset()
    """The reasons that the status may give for the attempt that it ended; none: it ends none."""


LOST = frozenset({"WorkerDied", "HeadLost", "DriverError", "SubmissionFailed"})
KINDS: Mapping[str, Kind] = {
    "kill-worker": Kind(None, LOST),
    "kill-head": Kind(_kill_head, LOST),
    "kill-submitter": Kind(_kill_submitter, LOST),
    "kill-operator": Kind(_kill_operator),
    "kill-containerd": Kind(_kill_containerd),
    "evict": Kind(_evict, frozenset({"Preempted"})),
    "drain": Kind(_drain, LOST | {"Preempted"}),
}


# ---- invariants ---------------------------------------------------------------------------------


@contextmanager
def watched(platform: Platform) -> Iterator[list[str]]:
    """Collect the jobs that have two RayJobs at a time."""
    broken: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            found = _patiently(lambda: platform.items("rayjobs")) or []
            names = [item["metadata"]["labels"].get("tuneyard.io/job") for item in found]
            broken.extend({name for name in names if name and names.count(name) > 1})

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield broken
    finally:
        done.set()
        thread.join()


def violations(status: Object, found: Object, calm: Object, run: Run) -> Iterator[str]:
    """Yield each broken invariant of a job that has ended.

    `found`, `calm`: the weights and the training curve of this job and of an undisturbed one.
    """
    ends = KINDS[run.fault].ends
    if status.get("phase") != "Succeeded":
        yield f"it ended {status.get('phase')}: {status.get('failure')}"
        return
    attempts: Sequence[Object] = status["attempts"]
    *others, last = [attempt["reason"] for attempt in attempts]
    if last != "Succeeded" or not {*others} <= ends or len(others) > 1:
        yield f"its attempts ended {others}, {last}; {run.fault} struck"
    lost = sum(attempt.get("stepsLost") or 0 for attempt in attempts)
    if lost > CHECKPOINT_STEPS:
        yield f"{lost} steps were done again"
    if found["weights"] != calm["weights"]:
        yield "its weights differ from those of an undisturbed run"
    if found["steps"] != calm["steps"]:
        yield f"its training curve has the steps {found['steps']}"


def remove(platform: Platform, name: str) -> Iterator[str]:
    """Delete a job that has ended; yield what is left of it in the namespace after a minute."""
    platform.kubectl("delete", platform.kind, name, "--timeout=120s")
    kinds = "rayjobs,rayclusters,jobs,pods,configmaps,services,networkpolicies,secrets"
    deadline = time.monotonic() + 120
    while left := platform.items(kinds, f"tuneyard.io/job={name}"):
        if time.monotonic() > deadline:
            yield from (f"{item['kind']} {item['metadata']['name']} is left" for item in left)
            return
        time.sleep(1)
