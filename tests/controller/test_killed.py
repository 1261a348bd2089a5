"""The operator killed at each write of a job that fails, is retried, succeeds and is deleted.

Each run has a job of its own and kills the operator at one write: before the API server sees it, or
after, when the response is lost. A thread restarts a killed operator, as a kubelet does. Events are
left out: no other write waits for them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.controller.faults import Cut, Request
from tests.controller.scene import SUCCEEDED, Job, OperatedScene, eventually, outcome

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

RETRYABLE = outcome("Failed", "Flaky", retryable=True)


class Step(NamedTuple):
    """The n-th write of its kind for a job."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


WRITES = {
    "patch status": ["attempt 1", "runs", "ended", "attempt 2", "runs", "succeeded"],
    "post configmaps": ["attempt 1"],
    "patch configmaps": ["attempt 2"],
    "post rayjobs": ["attempt 1", "attempt 2"],
    "delete rayjobs": ["attempt 1", "attempt 2"],
}
"""Every write of a job whose output stays, by its kind, with its purpose."""
STEPS = [Step(kind, i + 1) for kind, purposes in WRITES.items() for i in range(len(purposes))]
ERASURE = [
    Step("patch job", 1),
    Step("patch configmaps", 1),
    Step("post jobs", 1),
    Step("patch job", 2),
]
"""The writes that only a job has whose output is erased: its finalizer, and those of its deletion
after its RayJob is removed."""


def kind_of(verb: str, path: str, job: Job) -> str | None:
    """Return the kind of a write; None: it does not concern the job, or it is an event."""
    plural, _, rest = path.partition(f"/namespaces/{job.scene.namespace}/")[2].partition("/")
    if plural in ("events", "secrets"):  # the Secret holds the operator's certificates
        return None
    if verb == "POST" and not rest:  # a creation, whose path has no name: one job runs at a time
        return f"post {plural}"
    if not rest.startswith(job.name):
        return None
    if path.startswith(job.path):
        return f"{verb.lower()} {'status' if rest.endswith('/status') else 'job'}"
    return f"{verb.lower()} {plural}"


class Killer:
    """A write hook that kills the operator at one step of a job."""

    def __init__(self, module_scene: OperatedScene, job: Job, step: Step, *, reached: bool) -> None:
        self._stage, self._job, self._step, self._reached = module_scene, job, step, reached
        self._counts: Counter[str] = Counter()
        self.has_killed = False

    def __call__(self, _: int, verb: str, path: str) -> Cut | None:
        kind = kind_of(verb, path, self._job)
        if kind is None:
            return None
        self._counts[kind] += 1
        if self.has_killed or Step(kind, self._counts[kind]) != self._step:
            return None
        self.has_killed = True
        return Cut("after" if self._reached else "before", then=self._stage.operator.kill)


@pytest.fixture(scope="module")
def kept_alive(module_scene: OperatedScene) -> Iterator[OperatedScene]:
    """Restart the operator whenever it has been killed."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            if not module_scene.operator.is_alive:
                module_scene.operator.start()

    keeper = threading.Thread(target=watch)
    keeper.start()
    try:
        yield module_scene
    finally:
        done.set()
        keeper.join()


def run_to_success(job: Job) -> None:
    """Run a job from its first attempt to its success."""
    job.attempt(1).run().end(RETRYABLE)
    job.attempt(2).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    job.until(lambda job: not job.ray_jobs() and not job.pods())


def rayjobs_created(job: Job, since: str) -> Counter[str]:
    path = f"/apis/ray.io/v1/namespaces/{job.scene.namespace}/rayjobs"
    events = job.scene.api.changes(path, since)
    return Counter(e["object"]["metadata"]["name"] for e in events if e["type"] == "ADDED")


def test_an_undisturbed_job_takes_these_writes_and_no_more(kept_alive: OperatedScene) -> None:
    module_scene = kept_alive
    job = module_scene.create("calm", policy={"backoffSeconds": 0})
    run_to_success(job)
    job.delete()
    job.until_gone()
    time.sleep(1)

    def is_asked_for(request: Request) -> bool:
        return request.is_write and kind_of(request.verb, request.path, job) is not None

    found = Counter(
        str(kind_of(request.verb, request.path, job))
        for request in module_scene.proxy.requests(is_asked_for)
    )
    # A job that is being deleted may be read once more before its watch event arrives.
    assert found.pop("delete rayjobs") >= 2
    assert found == {kind: len(all_) for kind, all_ in WRITES.items() if kind != "delete rayjobs"}


@pytest.mark.parametrize("reached", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_killed_at_any_write_the_job_gets_one_rayjob_for_each_attempt_and_completes(
    kept_alive: OperatedScene, step: Step, reached: bool
) -> None:
    module_scene = kept_alive
    name = f"{step}-{'after' if reached else 'before'}".replace(" ", "-")
    rayjobs = f"/apis/ray.io/v1/namespaces/{module_scene.namespace}/rayjobs"
    since = module_scene.api("GET", f"{rayjobs}?limit=1")["metadata"]["resourceVersion"]
    job = Job(module_scene, "FineTuneJob", name)
    killer = module_scene.proxy.on_write = Killer(module_scene, job, step, reached=reached)
    module_scene.create(name, policy={"backoffSeconds": 0, "maxAttempts": 2})
    run_to_success(job)
    assert job.reasons == ["Flaky", "Succeeded"]
    events = job.event_reasons()
    job.delete()
    job.until_gone()
    assert killer.has_killed
    assert rayjobs_created(job, since) == {f"{name}-1": 1, f"{name}-2": 1}
    assert max(events.values()) <= 3, "no event is repeated without end"


@pytest.mark.parametrize("reached", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ERASURE, ids=str)
def test_killed_while_it_has_the_output_erased_the_operator_has_it_erased_once(
    kept_alive: OperatedScene, step: Step, reached: bool
) -> None:
    module_scene = kept_alive
    name = f"erase-{step}-{'after' if reached else 'before'}".replace(" ", "-")
    jobs = f"/apis/batch/v1/namespaces/{module_scene.namespace}/jobs"
    since = module_scene.api("GET", f"{jobs}?limit=1")["metadata"]["resourceVersion"]
    output = {"uri": f"pvc://models/{name}", "deletionPolicy": "Delete"}
    job = Job(module_scene, "FineTuneJob", name)
    killer = module_scene.proxy.on_write = Killer(module_scene, job, step, reached=reached)
    module_scene.create(name, output=output)
    job.attempt(1).run().end(SUCCEEDED)
    job.until_phase("Succeeded")
    job.until(lambda job: not job.ray_jobs() and not job.pods())
    job.delete()
    pods = f"/api/v1/namespaces/{module_scene.namespace}/pods"
    chosen = f"batch.kubernetes.io/job-name={name}-erase"
    (pod,) = eventually(lambda: module_scene.api.list(pods, labelSelector=chosen))
    succeeded = {"status": {"phase": "Succeeded"}}
    module_scene.api.merge(f"{pods}/{pod['metadata']['name']}/status", succeeded)
    job.until_gone()
    assert killer.has_killed
    found = [
        e["object"]["metadata"]["name"]
        for e in module_scene.api.changes(jobs, since)
        if e["type"] == "ADDED"
    ]
    assert found == [f"{name}-erase"]
