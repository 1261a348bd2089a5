"""The operator killed at its writes, and an API server that fails: the end is the same.

KubeRay is played; API server, operator process and its death are real.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.controller.faults import (
    Answer,
    Cut,
    Delay,
    Fault,
    FaultProxy,
    Gone,
    Predicate,
    Stale,
    kill_at,
    on,
)
from tests.controller.played import PlayedKubeRay
from tests.controller.running import Operator, wait_until

if TYPE_CHECKING:
    from rig.plugin import Cluster

pytestmark = pytest.mark.apiserver

CRDS = Path(__file__).parents[2] / "crds"
NAMESPACE = "killed"
JOB_SECONDS = 60

SPEC = {
    "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
    "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
    "output": {"uri": "pvc://models/killed"},
}


@dataclass
class Stage:
    """The operator behind a proxy that fails, and KubeRay played beside it."""

    cluster: Cluster
    proxy: FaultProxy
    operator: Operator
    kuberay: PlayedKubeRay

    def create(self, name: str, **changes: object) -> None:
        """Create a job; `changes` are fields of its spec."""
        job = {
            "apiVersion": "tuneyard.io/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {**SPEC, **changes},
        }
        arguments = ("create", "--validate=ignore", "--filename=-")
        self.cluster.kubectl(*arguments, input=json.dumps(job))

    def job(self, name: str) -> Any:
        arguments = ("--namespace", NAMESPACE, "get", "finetunejob", name, "--output=json")
        return json.loads(self.cluster.kubectl(*arguments).stdout)

    def phase(self, name: str) -> str:
        phase: str = self.job(name).get("status", {}).get("phase", "")
        return phase

    def wait_until_finished(self, name: str) -> None:
        """Whenever the operator is found dead meanwhile, it is started again, as a kubelet does."""
        deadline = time.monotonic() + JOB_SECONDS
        while self.phase(name) not in ("Succeeded", "Failed"):
            assert time.monotonic() < deadline, f"{self.job(name)}\n{self.operator.log[-3000:]}"
            if not self.operator.is_alive:
                self.operator.start()
            time.sleep(0.2)

    def assert_as_if_nothing_had_happened(self, name: str) -> None:
        status = self.job(name)["status"]
        assert status["phase"] == "Succeeded"
        assert [attempt["reason"] for attempt in status["attempts"]] == ["Succeeded"]
        assert {name: len(uids) for name, uids in self.made(name).items()} == {f"{name}-1": 1}

    def made(self, name: str) -> dict[str, set[str]]:
        """Every RayJob that the job ever had."""
        rayjobs = self.kuberay.seen.items()
        return {each: uids for each, uids in rayjobs if each.startswith(f"{name}-")}

    def settle(self) -> None:
        """Wait until the operator writes no more."""
        number, since = self.proxy.num_writes, time.monotonic()
        while time.monotonic() - since < 1.5:
            time.sleep(0.1)
            if self.proxy.num_writes != number:
                number, since = self.proxy.num_writes, time.monotonic()


@pytest.fixture(scope="module")
def stage(apiserver: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    apiserver.kubectl("apply", "--server-side", "--force-conflicts", "--filename", str(CRDS))
    condition = "--for=condition=Established"
    apiserver.kubectl("wait", condition, "--timeout=60s", "--filename", str(CRDS))
    apiserver.kubectl("create", "namespace", NAMESPACE, check=False)
    with (
        FaultProxy(apiserver.kubeconfig, folder) as proxy,
        PlayedKubeRay(apiserver.kubeconfig, NAMESPACE) as kuberay,
        Operator(proxy.kubeconfig, folder, lease="killed", namespaces=NAMESPACE) as operator,
    ):
        operator.wait_until_active()
        yield Stage(apiserver, proxy, operator, kuberay)
        proxy.heal()
        apiserver.kubectl(
            "delete", "--namespace", NAMESPACE, "finetunejobs", "--all", "--timeout=60s"
        )


@pytest.fixture(autouse=True)
def healthy(stage: Stage) -> Iterator[None]:
    yield
    stage.proxy.heal()
    if not stage.operator.is_alive:
        stage.operator.start()
        stage.operator.wait_until_active()


def writes_of_a_job(stage: Stage, name: str) -> int:
    """How many writes an undisturbed job takes, from its creation to rest."""
    stage.settle()
    before = stage.proxy.num_writes
    stage.create(name)
    stage.wait_until_finished(name)
    stage.settle()
    return stage.proxy.num_writes - before


def test_an_undisturbed_job_is_left_alone_once_it_is_done(stage: Stage) -> None:
    """No second RayJob, no status write without a change, nothing at all when nothing happens."""
    number = writes_of_a_job(stage, "calm")
    stage.assert_as_if_nothing_had_happened("calm")
    assert number > 4, "the job was created, planned, started, followed"
    mine = [
        request.json()["status"]
        for request in stage.proxy.requests(on("PATCH", "/finetunejobs/calm/status$"))
    ]
    assert all(mine), "a status write that changes nothing"
    version = stage.job("calm")["metadata"]["resourceVersion"]
    before = stage.proxy.num_writes
    time.sleep(3)
    assert stage.proxy.num_writes == before
    assert stage.job("calm")["metadata"]["resourceVersion"] == version


@pytest.mark.slow
def test_killed_at_any_of_its_writes_the_operator_finishes_the_job_with_one_rayjob(
    stage: Stage,
) -> None:
    """Killed before its first write, and right after each one. (What the API server knows before
    the next one is the same.)"""
    num_writes = writes_of_a_job(stage, "reference")
    for number in range(num_writes + 1):
        name = f"at-{number}"
        first = stage.proxy.num_writes + 1
        at = first + max(0, number - 1)
        stage.proxy.on_write = kill_at(at, stage.operator.kill, reached=number > 0)
        stage.create(name)
        stage.wait_until_finished(name)
        stage.settle()
        stage.proxy.on_write = None
        killed = stage.proxy.num_writes >= at
        assert killed, "the operator came to the write that it was to die at"
        if not stage.operator.is_alive:
            stage.operator.start()
        stage.assert_as_if_nothing_had_happened(name)


OURS = "/finetunejobs/"
FAULTS: dict[str, list[tuple[Fault, Predicate, int | None]]] = {
    "conflicts": [(Answer(409), on("PATCH", OURS), 3)],
    "too many requests": [(Answer(429, retry_after=1), on("PATCH"), 3)],
    "server errors": [(Answer(500), on("PATCH"), 3), (Answer(503), on("POST"), 2)],
    "answers lost": [(Cut("after"), on("PATCH", f"{OURS}|rayjobs|configmaps"), 4)],
    "requests lost": [(Cut("before"), on("PATCH", f"{OURS}|rayjobs|configmaps"), 4)],
    "slow": [(Delay(0.5), on("PATCH"), 4), (Delay(0.5), on("GET"), 4)],
    "stale reads": [(Stale(2), on("GET"), 5)],
    "watches expire": [(Gone(), on("WATCH"), 4)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_api_server_that_fails_makes_a_job_later_but_not_otherwise(
    stage: Stage, name: str
) -> None:
    for fault, when, times in FAULTS[name]:
        stage.proxy.add(fault, when, times)
    if name == "watches expire":
        stage.proxy.drop_watches()
    job = name.replace(" ", "-")
    stage.create(job)
    stage.wait_until_finished(job)
    stage.settle()
    stage.assert_as_if_nothing_had_happened(job)
    assert stage.operator.is_alive


def test_watches_that_break_again_and_again_lose_nothing(stage: Stage) -> None:
    stage.create("dropped")
    deadline = time.monotonic() + JOB_SECONDS
    while stage.phase("dropped") != "Succeeded":
        assert time.monotonic() < deadline, stage.operator.log[-3000:]
        stage.proxy.drop_watches()
        time.sleep(0.7)
    stage.settle()
    stage.assert_as_if_nothing_had_happened("dropped")


def test_a_malformed_object_does_not_stop_the_operator_from_serving_others(stage: Stage) -> None:
    """One that a laxer schema of an earlier version let in."""
    with any_schema(stage.cluster):
        stage.create("nonsense", model=5, data={"train": "everything"}, surprise={})
    stage.create("sensible")
    stage.wait_until_finished("sensible")
    stage.settle()
    stage.assert_as_if_nothing_had_happened("sensible")
    assert stage.operator.is_alive
    assert stage.made("nonsense") == {}


@contextmanager
def any_schema(cluster: Cluster) -> Iterator[None]:
    """Admission takes any FineTuneJob meanwhile."""
    name = "finetunejobs.tuneyard.io"
    definition = json.loads(cluster.kubectl("get", "crd", name, "--output=json").stdout)
    del definition["metadata"]["resourceVersion"]
    lax = copy.deepcopy(definition)
    for version in lax["spec"]["versions"]:
        status = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        version["schema"]["openAPIV3Schema"] = {
            **status,
            "properties": {"spec": status, "status": status},
        }
    probe = {"spec": {"model": 5}, "metadata": {"name": "probe", "namespace": NAMESPACE}}
    probe |= {"apiVersion": "tuneyard.io/v1alpha1", "kind": "FineTuneJob"}

    def is_admitted() -> bool:
        arguments = ("create", "--dry-run=server", "--validate=ignore", "--filename=-")
        done = cluster.kubectl(*arguments, input=json.dumps(probe), check=False)
        return not done.returncode

    # A changed schema takes a moment to come into force.
    cluster.kubectl("replace", "--filename=-", input=json.dumps(lax))
    wait_until(is_admitted)
    try:
        yield
    finally:
        cluster.kubectl("replace", "--filename=-", input=json.dumps(definition))
        wait_until(lambda: not is_admitted())
