"""A running job whose objects another version of the operator wrote: it goes on.

The driver's client posts over TLS to the status server, and the reconciler works on a played API
server that holds the job.
"""

from __future__ import annotations

import asyncio
import copy
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from rig.ports import Reservation

from tests.status.test_patches import THROTTLED, merged
from tests.tls import write_certificate
from tuneyard.api.meta import FINALIZER, GROUP
from tuneyard.api.plan import digest
from tuneyard.api.progress import Post, PostResponse
from tuneyard.controller import status_server
from tuneyard.controller.cluster import Cluster, Key
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings
from tuneyard.controller.status_server import StatusServer
from tuneyard.rendering.names import config_map_name
from tuneyard_trainer.pod.reporter import Refused, StatusClient

RELEASE = Path(__file__).parents[1] / "releases" / "0.2.0"
Object = dict[str, Any]


def recorded(name: str) -> Object:
    """Return a file of the release 0.2.0."""
    value: Object = json.loads((RELEASE / name).read_text(encoding="utf-8"))
    return value


def running_job() -> Object:
    """Return a job of the release 0.2.0 as the API server holds it while it runs."""
    job = recorded("job-running.json")
    job["metadata"] |= {"namespace": "team", "resourceVersion": "1", "finalizers": [FINALIZER]}
    return job


def newer(job: Object) -> Object:
    """Return the job as a newer operator and newer CRDs left it: with one more field in the spec,
    the status and the items of its lists, one more condition and one more kind of stage."""
    job = copy.deepcopy(job)
    spec, status = job["spec"], job["status"]
    for mapping in (spec, spec["training"], status, *status["attempts"], *status["stages"]):
        mapping["ofANewerVersion"] = {"a": 1}
    status["conditions"].append(THROTTLED)
    status["stages"].append({"name": "distill", "kind": "distill", "state": "Pending"})
    return job


class PlayedCluster:
    """The API server with one job, its RayJobs and its ConfigMaps."""

    def __init__(self, body: Object) -> None:
        metadata = body["metadata"]
        self.key = Key(body["kind"], metadata["namespace"], metadata["name"])
        self.body: Object | None = body
        self.config_maps: dict[str, Object] = {}
        self.rayjobs: dict[str, Object] = {}
        self.pod_attempt = 1

    # ---- what the tests see and change ----------------------------------------------------------

    @property
    def stored(self) -> Object:
        assert self.body is not None
        return self.body

    @property
    def status(self) -> Object:
        status: Object = self.stored["status"]
        return status

    def why(self, type_: str) -> str:
        found = next(c for c in self.status["conditions"] if c["type"] == type_)
        return f"{found['status']} {found['reason']}"

    # ---- the interface of Cluster ---------------------------------------------------------------

    async def job(self, key: Key) -> Object | None:
        return copy.deepcopy(self.body) if key == self.key else None

    async def ray_jobs(self, *_: Any) -> list[Object]:
        return list(self.rayjobs.values())

    async def preparations(self, *_: Any) -> list[Object]:
        return []

    async def pods(self, *_: Any) -> list[Object]:
        return []

    async def list_objects(self, collection: str, _: str | None) -> AsyncIterator[Object]:
        for item in self.rayjobs.values() if collection.endswith("rayjobs") else ():
            yield item

    async def warnings(self, *_: Any) -> list[str]:
        return []

    async def config_map(self, _: str, name: str) -> Object | None:
        return self.config_maps.get(name)

    async def ensure(self, item: Object, **_: Any) -> None:
        await self.create(item)

    async def create(self, item: Object) -> Object:
        metadata = {**item["metadata"], "uid": "new", "resourceVersion": "9"}
        stored = {**item, "metadata": metadata}
        kept = self.rayjobs if item["kind"] == "RayJob" else self.config_maps
        kept[metadata["name"]] = stored
        return stored

    async def remove_finalizer(self, job: Object, _: Key) -> Object:
        metadata = {**self.stored["metadata"], "finalizers": []}
        self.body = {**self.stored, "metadata": metadata}
        return {**job, "metadata": metadata}

    async def delete_ray_job(self, _: str, name: str, *__: Any, **___: Any) -> bool:
        return self.rayjobs.pop(name, None) is not None

    async def write_status(self, job: Object, _: Key, patch: Object, status: Object) -> Object:
        version = str(int(self.stored["metadata"]["resourceVersion"]) + 1)
        metadata = self.stored["metadata"] | {"resourceVersion": version}
        written = merged(self.status, patch)
        self.body = {**self.stored, "metadata": metadata, "status": written}
        assert written == status, "the cache holds what the API server stored"
        return {**job, "metadata": metadata, "status": status}

    async def post_event(self, *_: Any) -> None:
        pass

    async def review_token(self, _: str, expected: str) -> Object:
        user = {
            "username": f"system:serviceaccount:{self.key.namespace}:default",
            "extra": {"authentication.kubernetes.io/pod-name": ["head"]},
        }
        return {"authenticated": True, "audiences": [expected], "user": user}

    async def pod(self, namespace: str, name: str) -> Object:
        labels = {
            f"{GROUP}/kind": self.key.kind,
            f"{GROUP}/job": self.key.name,
            f"{GROUP}/attempt": str(self.pod_attempt),
        }
        uid = self.stored["metadata"]["uid"] if self.body else "gone"
        owner = {"kind": "RayJob", "name": "head", "uid": uid, "controller": True}
        metadata = {"namespace": namespace, "name": name, "uid": "pod", "labels": labels}
        return {"metadata": {**metadata, "ownerReferences": [owner]}}


class Certificate(NamedTuple):
    """A certificate for 127.0.0.1 that is its own authority."""

    context: ssl.SSLContext
    ca: str


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = write_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return Certificate(context, certificate.read_text())


class Operated:
    """The operator of a played cluster, and the driver of the job's attempt."""

    def __init__(self, cluster: PlayedCluster, url: str, token: Path, ca: str) -> None:
        self.cluster = cluster
        self._client = StatusClient(url, token, ca)

    async def post(self, **report: Any) -> PostResponse:
        """Post as the attempt's driver. Raises Refused."""
        body = recorded("post.json")
        body["tuneyard"] |= report
        return await asyncio.to_thread(self._client.send, Post.model_validate(body))

    async def refusal(self, **report: Any) -> Refused:
        with pytest.raises(Refused) as refused:
            await self.post(**report)
        return refused.value

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.02)


Play = Callable[[PlayedCluster, Callable[[Operated], Awaitable[None]]], None]


@pytest.fixture
def play(certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Run an operator and a coroutine of the driver side by side."""
    monkeypatch.setattr(status_server, "STORED_SECONDS", 5.0)
    token = tmp_path / "token"
    token.write_text("secret")

    async def run(cluster: PlayedCluster, act: Callable[[Operated], Awaitable[None]]) -> None:
        reconciler = Reconciler(cast("Cluster", cluster), Settings())
        server = StatusServer(cast("Cluster", cluster), reconciler, lambda: True)
        with Reservation() as ports:
            port = await server.start(ports.take(), certificate.context)
        working = asyncio.create_task(reconciler.run())
        reconciler.queue.add(cluster.key)
        key = cluster.key
        path = f"v1alpha1/namespaces/{key.namespace}/{key.kind.lower()}s/{key.name}/progress"
        try:
            await act(Operated(cluster, f"https://127.0.0.1:{port}/{path}", token, certificate.ca))
        finally:
            working.cancel()
            await server.close()

    return lambda cluster, act: asyncio.run(cast("Coroutine[Any, Any, None]", run(cluster, act)))


SUCCEEDED = {"state": "Succeeded", "result": {"uri": "pvc://models/out/result"}}


@pytest.mark.parametrize("age", [lambda job: job, newer], ids=["0.2.0", "newer"])
def test_a_running_job_of_another_version_goes_on_and_succeeds(
    play: Play, age: Callable[[Object], Object]
) -> None:
    cluster = PlayedCluster(age(running_job()))
    before = copy.deepcopy(cluster.stored)

    async def act(operated: Operated) -> None:
        assert (await operated.post(step=41, ofANewerVersion=1)).stop is False
        await operated.post(step=100, outcome=SUCCEEDED)

    play(cluster, act)
    assert cluster.status["phase"] == "Succeeded"
    assert cluster.stored["spec"] == before["spec"]
    for name in ("attempts", "stages"):
        kept = [item.get("ofANewerVersion") for item in cluster.status[name]]
        assert kept == [item.get("ofANewerVersion") for item in before["status"][name]]
    types = {condition["type"] for condition in cluster.status["conditions"]}
    assert ("Throttled" in types) == (age is newer)


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"method": "distill"}},
        {"status": {"phase": "Paused"}},
        {"spec": {"adapter": {"ofANewerVersion": {}}}},
    ],
    ids=["an enum of the spec", "an enum of the status", "an alternative of a union"],
)
def test_the_driver_of_a_job_that_cannot_be_read_goes_on_and_its_outcome_is_stored_later(
    play: Play, change: Object
) -> None:
    """No 409, which would end the attempt: the job is still there."""
    readable = running_job()
    cluster = PlayedCluster(merged(readable, change))
    unreadable = copy.deepcopy(cluster.body)

    async def act(operated: Operated) -> None:
        for report in ({"step": 41}, {"step": 100, "outcome": SUCCEEDED}):
            refused = await operated.refusal(**report)
            assert (refused.status, refused.superseded, refused.retry_after) == (503, False, 30)
            assert "cannot read the job" in str(refused)
        assert cluster.body == unreadable

    async def act_later(operated: Operated) -> None:
        await operated.post(step=100, outcome=SUCCEEDED)

    play(cluster, act)
    cluster.body = readable  # the operator of the newer version runs again
    play(cluster, act_later)
    assert cluster.status["phase"] == "Succeeded"


def test_a_new_job_is_planned_without_unknown_fields_and_says_so(play: Play) -> None:
    """After a rollback, the CRDs may set a default of the newer version in every job."""
    job = newer(running_job())
    job["status"] = {}
    cluster = PlayedCluster(job)

    async def act(operated: Operated) -> None:
        await operated.until(lambda: cluster.rayjobs)

    play(cluster, act)
    planned = next(c for c in cluster.status["conditions"] if c["type"] == "Planned")
    left_out = "without spec.training.ofANewerVersion, spec.ofANewerVersion, which this version"
    assert planned["status"] == "True"
    assert left_out in planned["message"]


def test_a_job_that_waits_and_cannot_be_read_keeps_its_status(play: Play) -> None:
    """Closed as Failed for this generation, it would never run, even if it can be read again."""
    job = running_job()
    since = "2026-11-26T12:00:00Z"
    waits = {"type": "Planned", "status": "False", "reason": "WaitingForModel", "message": "m"}
    job["status"] = {
        "phase": "Pending",
        "observedGeneration": job["metadata"]["generation"],
        "conditions": [{**waits, "lastTransitionTime": since}],
    }
    job["spec"]["method"] = "distill"
    cluster = PlayedCluster(job)
    before = copy.deepcopy(cluster.body)

    async def act(_: Operated) -> None:
        await asyncio.sleep(0.3)
        assert cluster.body == before
        cluster.stored["metadata"]["generation"] += 1  # the user edits the job

    play(cluster, act)

    async def act_later(operated: Operated) -> None:
        await operated.until(lambda: cluster.status["phase"] == "Failed")

    play(cluster, act_later)
    assert cluster.status["failure"]["reason"] == "Malformed"


def test_an_attempt_is_superseded_by_a_newer_attempt(play: Play) -> None:
    job = running_job()
    first = job["status"]["attempts"][0]
    ended = {"finishedAt": "2030-01-01T00:01:00Z", "reason": "WorkerDied", "message": "m"}
    second = {**first, "number": 2, "rayJob": "minimal-2", "rayJobUid": None}
    job["status"]["attempts"] = [first | ended, second]
    cluster = PlayedCluster(job)

    async def act(operated: Operated) -> None:
        refused = await operated.refusal(step=41)
        assert (refused.status, refused.superseded) == (409, True)

    play(cluster, act)


def test_the_attempt_of_a_deleted_job_is_asked_to_stop(play: Play) -> None:
    """It may save a checkpoint: a new job of this name starts no attempt while its pods exist."""
    cluster = PlayedCluster(running_job())
    cluster.body = None

    async def act(operated: Operated) -> None:
        assert (await operated.post(step=41)).stop is True

    play(cluster, act)


@pytest.mark.parametrize("report", [{"step": 41}, {"step": 100, "outcome": SUCCEEDED}])
def test_the_attempt_of_a_job_that_waits_for_its_deletion_is_asked_to_stop_at_once(
    play: Play, report: Object
) -> None:
    """No status write follows the post, which the response could wait for."""
    cluster = PlayedCluster(running_job())
    metadata = cluster.stored["metadata"]
    metadata |= {"deletionTimestamp": "2030-01-01T00:00:00Z", "finalizers": ["foregroundDeletion"]}

    async def act(operated: Operated) -> None:
        assert (await operated.post(**report)).stop is True

    play(cluster, act)


# ---- a plan of another version ------------------------------------------------------------------


def planned_by_another_version(cluster: PlayedCluster, plan: Object) -> None:
    """Store a plan as the job's own."""
    cluster.status["planDigest"] = digest(plan)
    name = config_map_name(cluster.key.name, digest(plan))
    cluster.config_maps[name] = {"data": {"plan.json": json.dumps(plan)}}


def before_attempt_two() -> PlayedCluster:
    """Return a cluster with a job whose second attempt has no objects yet."""
    job = running_job()
    first = job["status"]["attempts"][0]
    ended = {"finishedAt": "2030-01-01T00:01:00Z", "reason": "WorkerDied", "message": "m"}
    second = {"number": 2, "rayJob": "minimal-2", "startedAt": "2099-01-01T00:00:00Z"}
    job["status"] |= {"phase": "Pending", "attempts": [first | ended, second]}
    return PlayedCluster(job)


def test_an_attempt_does_not_start_with_a_plan_that_this_version_cannot_read(play: Play) -> None:
    cluster = before_attempt_two()
    plan = recorded("plan.json")
    settings = {"kind": "distill", "temperature": 2.0}
    stage = plan["stages"][1] | {"name": "distill", "settings": settings}
    planned_by_another_version(cluster, {**plan, "stages": [*plan["stages"], stage]})

    async def act(operated: Operated) -> None:
        await operated.until(lambda: cluster.why("Running") == "False PlanUnreadable")

    play(cluster, act)
    assert (cluster.rayjobs, cluster.status["phase"]) == ({}, "Pending")


def test_an_attempt_starts_with_the_plan_of_the_release_0_2_0(play: Play) -> None:
    """Even if this version plans the job differently."""
    cluster = before_attempt_two()
    plan = recorded("plan.json") | {"notes": ["planned by another version"]}
    planned_by_another_version(cluster, plan)

    async def act(operated: Operated) -> None:
        await operated.until(lambda: "minimal-2" in cluster.rayjobs)

    play(cluster, act)
    (stored,) = cluster.config_maps.values()
    assert json.loads(stored["data"]["plan.json"]) == plan


def test_a_plan_that_was_replaced_fails_the_job(play: Play) -> None:
    cluster = before_attempt_two()
    plan = recorded("plan.json") | {"notes": ["planned by another version"]}
    planned_by_another_version(cluster, plan)
    (name,) = cluster.config_maps
    cluster.config_maps[name] = {"data": {"plan.json": json.dumps(plan | {"notes": ["forged"]})}}

    async def act(operated: Operated) -> None:
        await operated.until(lambda: cluster.status["phase"] == "Failed")

    play(cluster, act)
    assert (cluster.status["failure"]["reason"], cluster.rayjobs) == ("PlanLost", {})
