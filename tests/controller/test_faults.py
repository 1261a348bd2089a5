"""The proxy that fails on demand: its effect on one request, and none on others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import urllib3

from tests.controller.faults import (
    Answer,
    Cut,
    Delay,
    FaultProxy,
    Gone,
    Stale,
    kill_at,
    on,
)

if TYPE_CHECKING:
    from rig.plugin import Cluster

pytestmark = pytest.mark.apiserver

MAPS = "/api/v1/namespaces/default/configmaps"


class Caller:
    """Send requests through the proxy, without retries."""

    def __init__(self, kubeconfig: Path) -> None:
        cluster = json.loads(kubeconfig.read_text())["clusters"][0]["cluster"]
        self._url = cluster["server"]
        self._pool = urllib3.PoolManager(
            ca_certs=cluster["certificate-authority"], retries=False, timeout=20
        )

    def __call__(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> urllib3.BaseHTTPResponse:
        kind = "merge-patch+json" if method == "PATCH" else "json"
        headers = {"Content-Type": f"application/{kind}", **headers}
        data = None if body is None else json.dumps(body)
        return self._pool.request(method, self._url + path, body=data, headers=headers)

    def watch(self, path: str) -> Iterator[Any]:
        answer = self._pool.request(
            "GET", f"{self._url}{path}?watch=true", preload_content=False, timeout=20
        )
        rest = b""
        for piece in answer.stream(1):
            rest += piece
            if rest.endswith(b"\n"):
                yield json.loads(rest)
                rest = b""


@pytest.fixture
def proxy(apiserver: Cluster, tmp_path: Path) -> Iterator[FaultProxy]:
    with FaultProxy(apiserver.kubeconfig, tmp_path) as proxy:
        yield proxy


@pytest.fixture
def call(proxy: FaultProxy) -> Caller:
    return Caller(proxy.kubeconfig)


@pytest.fixture
def new(call: Caller, request: pytest.FixtureRequest) -> Iterator[Callable[[], dict[str, Any]]]:
    """Make manifests of ConfigMaps with unique names; delete the ConfigMaps afterwards."""
    names = []

    def manifest() -> dict[str, Any]:
        names.append(f"faults-{time.monotonic_ns()}")
        return {"metadata": {"name": names[-1]}, "data": {"v": "0"}}

    yield manifest
    for name in names:
        call("DELETE", f"{MAPS}/{name}")


def test_without_a_fault_everything_passes(
    apiserver: Cluster, proxy: FaultProxy, call: Caller, new: Callable[[], Any]
) -> None:
    created = new()
    assert call("POST", MAPS, created).status == 201
    assert call("GET", f"{MAPS}/{created['metadata']['name']}").json()["data"] == {"v": "0"}
    listed = apiserver.kubectl("--kubeconfig", str(proxy.kubeconfig), "get", "namespaces")
    assert "default" in listed.stdout, "kubectl takes the proxy's kubeconfig as any other"


def test_the_api_server_authenticates_the_callers_token(call: Caller) -> None:
    assert call("GET", "/api/v1/namespaces").status == 200
    assert call("GET", "/api/v1/namespaces", Authorization="Bearer nobody").status == 401


def test_an_answer_replaces_the_response_as_often_as_requested_and_the_server_gets_no_write(
    proxy: FaultProxy, call: Caller, new: Callable[[], Any]
) -> None:
    proxy.add(Answer(429, retry_after=7), on("POST", "/configmaps$"), times=2)
    created = new()
    for _ in range(2):
        refused = call("POST", MAPS, created)
        assert (refused.status, refused.headers["Retry-After"]) == (429, "7")
        assert refused.json()["reason"] == "TooManyRequests"
    assert call("GET", f"{MAPS}/{created['metadata']['name']}").status == 404
    assert call("POST", MAPS, created).status == 201
    assert proxy.count("POST", "configmaps") == 3


@pytest.mark.parametrize(("when", "stored"), [("before", 404), ("after", 200)])
def test_a_cut_connection_leaves_the_write_undone_or_done(
    proxy: FaultProxy, call: Caller, new: Callable[[], Any], when: Any, stored: int
) -> None:
    proxy.add(Cut(when), on("POST"))
    created = new()
    with pytest.raises(urllib3.exceptions.HTTPError):
        call("POST", MAPS, created)
    assert call("GET", f"{MAPS}/{created['metadata']['name']}").status == stored


@pytest.mark.parametrize(("reached", "stored"), [(False, ["a"]), (True, ["a", "b"])])
def test_the_caller_is_killed_at_exactly_the_write_that_was_named(
    proxy: FaultProxy, call: Caller, new: Callable[[], Any], reached: bool, stored: list[str]
) -> None:
    killed = []
    proxy.on_write = kill_at(2, lambda: killed.append(proxy.num_writes), reached=reached)
    maps = {"a": new(), "b": new(), "c": new()}
    call("POST", MAPS, maps["a"])
    call("GET", MAPS)
    call("POST", "/apis/authentication.k8s.io/v1/tokenreviews", {"spec": {"token": "x"}})
    with pytest.raises(urllib3.exceptions.HTTPError):
        call("POST", MAPS, maps["b"])
    assert killed == [2], "reads and questions are no writes"
    found = [key for key, each in maps.items() if _exists(call, each)]
    assert found == stored


def test_a_running_watch_streams_and_can_be_dropped(
    proxy: FaultProxy, call: Caller, new: Callable[[], Any]
) -> None:
    events = call.watch(MAPS)
    assert next(events)["type"] == "ADDED", "an event arrives while the watch goes on"
    assert proxy.drop_watches(on("WATCH", "/pods$")) == 0
    assert proxy.drop_watches(on("WATCH", "/configmaps$")) == 1
    with pytest.raises(urllib3.exceptions.HTTPError):
        list(events)


def test_a_watch_can_get_the_error_that_its_version_is_too_old(
    proxy: FaultProxy, call: Caller
) -> None:
    proxy.add(Gone(), on("WATCH", "/configmaps$"))
    (event,) = call.watch(MAPS)
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
    assert next(call.watch(MAPS))["type"] == "ADDED"


def test_a_stale_read_returns_an_older_version_and_the_next_read_the_newest(
    proxy: FaultProxy, call: Caller, new: Callable[[], Any]
) -> None:
    created = new()
    path = f"{MAPS}/{created['metadata']['name']}"
    call("POST", MAPS, created)
    for number in (1, 2):
        call("PATCH", path, {"data": {"v": str(number)}})
    proxy.add(Stale(), on("GET", path))
    proxy.add(Stale(versions=99), on("GET", path))
    assert [call("GET", path).json()["data"]["v"] for _ in range(3)] == ["1", "0", "2"]


def test_a_stale_list_returns_an_earlier_list(
    proxy: FaultProxy, call: Caller, new: Callable[[], Any]
) -> None:
    before = len(call("GET", MAPS).json()["items"])
    call("POST", MAPS, new())
    assert len(call("GET", MAPS).json()["items"]) == before + 1
    proxy.add(Stale(), on("GET", "/configmaps$"))
    assert len(call("GET", MAPS).json()["items"]) == before


def test_a_delayed_request_arrives(proxy: FaultProxy, call: Caller, new: Callable[[], Any]) -> None:
    proxy.add(Delay(0.2), on("POST"))
    began = time.monotonic()
    assert call("POST", MAPS, new()).status == 201
    assert time.monotonic() - began >= 0.2


def test_the_body_of_a_write_can_be_read_afterwards(
    proxy: FaultProxy, call: Caller, new: Callable[[], Any]
) -> None:
    created = new()
    call("POST", MAPS, created)
    (recorded,) = proxy.requests(on("POST", "/configmaps$"))
    assert recorded.json() == created


def _exists(call: Caller, manifest: Any) -> bool:
    return call("GET", f"{MAPS}/{manifest['metadata']['name']}").status == 200
