"""Two replicas: one is active, the other stands by and takes over; never are both active."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.controller.faults import Answer, FaultProxy, on
from tests.controller.running import Operator
from tests.controller.scene import (
    SUCCEEDED,
    Driver,
    Scene,
    consistently,
    eventually,
    operator_of,
)

pytestmark = pytest.mark.apiserver

LEASE_SECONDS = 15
Start = Callable[[str], Operator]


@pytest.fixture
def scene(new_scene: Callable[[str], Scene]) -> Scene:
    return new_scene("replicas")


@pytest.fixture
def start(scene: Scene, tmp_path: Path) -> Iterator[Start]:
    """Start replicas by their identity."""
    with ExitStack() as stack:

        def make(identity: str, kubeconfig: Path | None = None) -> Operator:
            found = kubeconfig or scene.kubeconfig
            return stack.enter_context(operator_of(scene, found, tmp_path, identity=identity))

        yield make


def leads(operator: Operator) -> bool:
    return operator.metric("tuneyard_leader") == 1.0


def stands_by(operator: Operator) -> bool:
    return operator.metric("tuneyard_leader") == 0.0


def test_the_standby_does_nothing_and_refuses_posts(scene: Scene, start: Start) -> None:
    one = start("one")
    one.wait_until_active()
    two = start("two")
    eventually(lambda: stands_by(two))
    attempt = scene.create("job").attempt(1).run()
    driver = attempt.driver()
    assert driver.post(1).status == 200
    standby = Driver(driver.url, attempt.environment["TUNEYARD_CA"], driver.token, 1)
    own = two.log.partition("status server listens on port ")[2].split()[0]
    standby.url = driver.url.replace(driver.url.split("/")[2], f"127.0.0.1:{own}")
    answer = standby.post(2)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    consistently(lambda: leads(one) and stands_by(two))


def test_when_the_active_replica_is_killed_the_standby_takes_over_within_the_leases_duration(
    scene: Scene, start: Start
) -> None:
    one = start("one")
    one.wait_until_active()
    two = start("two")
    eventually(lambda: stands_by(two))
    attempt = scene.create("job").attempt(1).run()
    one.kill()
    attempt.end(SUCCEEDED)
    began = time.monotonic()
    eventually(lambda: leads(two), context=two.log)
    assert time.monotonic() - began > 5, "the Lease was not yet over"
    attempt.job.until_phase("Succeeded")
    assert attempt.job.reasons == ["Succeeded"]
    one.start()
    eventually(lambda: stands_by(one))
    consistently(lambda: leads(two) and stands_by(one))


def test_when_the_active_replica_releases_the_lease_the_standby_takes_over_at_once(
    scene: Scene, start: Start
) -> None:
    one = start("one")
    one.wait_until_active()
    two = start("two")
    eventually(lambda: stands_by(two))
    assert one.end(signal.SIGTERM) == 0
    eventually(lambda: leads(two), LEASE_SECONDS - 5, context=two.log)
    scene.create("job").attempt(1)


def test_a_replica_that_loses_the_lease_fails_and_writes_no_more(
    scene: Scene, start: Callable[..., Operator], tmp_path: Path
) -> None:
    with FaultProxy(scene.kubeconfig, tmp_path) as proxy:
        one = start("one", proxy.kubeconfig)
        one.wait_until_active()
        attempt = scene.create("job").attempt(1).run()
        two = start("two")
        eventually(lambda: stands_by(two))
        proxy.add(Answer(503), on("PUT", "/leases/"), times=None)
        proxy.add(Answer(503), on("GET", "/leases/"), times=None)
        eventually(lambda: not one.is_alive, context=one.log)
        assert one.end() != 0
        assert "the Lease is lost" in one.log
        writes = proxy.num_writes
        eventually(lambda: leads(two), context=two.log)
        attempt.end(SUCCEEDED)
        attempt.job.until_phase("Succeeded")
        assert proxy.num_writes == writes


def test_a_lease_that_another_replica_took_is_not_taken_back(
    scene: Scene, start: Callable[..., Operator]
) -> None:
    one = start("one")
    one.wait_until_active()
    path = f"/apis/coordination.k8s.io/v1/namespaces/{scene.namespace}/leases/tuneyard-operator"
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    scene.api.merge(path, {"spec": {"holderIdentity": "usurper", "renewTime": now}})
    eventually(lambda: not one.is_alive, context=one.log)
    assert one.end() != 0
    assert scene.api("GET", path)["spec"]["holderIdentity"] == "usurper"
