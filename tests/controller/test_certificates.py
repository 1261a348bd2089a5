"""The status server's certificates: renewal while the server listens, and pods of every age."""

from __future__ import annotations

import asyncio
import base64
import urllib.error
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.controller.played import PlayedCluster, Served, certificates_of, send, served
from tuneyard.controller.certificates import AUTHORITY_DAYS, Certificates, renewed
from tuneyard.errors import TuneyardError
from tuneyard_trainer.pod.reporter import StatusClient

HOST = "127.0.0.1"
FILES = ("ca.crt", "ca.key", "tls.crt", "tls.key")


def runs(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test."""

    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


def days_ago(number: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=number)


def store(cluster: PlayedCluster, given: Certificates, *, without: str = "") -> None:
    """Put certificates into the Secret, except for one file."""
    texts = (given.ca, given.ca_key, given.server, given.server_key)
    data = {
        file: base64.b64encode(text.encode()).decode()
        for file, text in zip(FILES, texts, strict=True)
        if file != without
    }
    cluster.secrets["tls"] = {"metadata": {"name": "tls", "resourceVersion": "1"}, "data": data}


def stored(cluster: PlayedCluster, file: str) -> str:
    return base64.b64decode(cluster.secrets["tls"]["data"][file]).decode()


def numbers(pems: str) -> list[int]:
    return [each.serial_number for each in x509.load_pem_x509_certificates(pems.encode())]


async def refusal(client: StatusClient) -> str:
    """Return why the pod did not trust the server."""
    with pytest.raises(urllib.error.URLError) as refused:
        await send(client)
    return str(refused.value.reason)


async def until_renewed(running: Served, was: str) -> None:
    """Follow the Secret until the server's certificate is another one."""
    given: list[str] = []
    following = asyncio.create_task(running.certificates.follow(given.append, every=0.01))
    async with asyncio.timeout(30):
        while not given:
            await asyncio.sleep(0.01)
    following.cancel()
    assert stored(running.cluster, "tls.crt") != was


# ---- while the server listens -------------------------------------------------------------------


@runs
async def test_an_expired_certificate_is_replaced_while_the_server_runs_and_an_old_pod_posts(
    tmp_path: Path,
) -> None:
    cluster = PlayedCluster()
    cluster.now = days_ago(100)
    async with served(cluster) as running:
        client, old, ca = (
            running.client(tmp_path),
            stored(cluster, "tls.crt"),
            running.certificates.ca,
        )
        assert "certificate has expired" in await refusal(client)
        cluster.now = None
        await until_renewed(running, old)
        assert await send(client) is False
        assert running.certificates.ca == ca, "the authority stays"


@runs
async def test_a_certificate_is_renewed_after_two_thirds_of_its_validity_and_not_before() -> None:
    cluster = PlayedCluster()
    certificates = certificates_of(cluster)
    for ago, changes in ((61, True), (3, False), (0, True)):
        cluster.now = days_ago(ago)
        assert await certificates.refresh() is changes


@runs
async def test_a_certificate_of_an_earlier_version_is_used_until_two_thirds_are_over() -> None:
    cluster = PlayedCluster()
    cluster.now = days_ago(30)
    await certificates_of(cluster).refresh()
    before = cluster.secrets["tls"]
    cluster.now = None
    await certificates_of(cluster).refresh()
    assert cluster.secrets["tls"] == before


@runs
async def test_replicas_use_the_certificate_that_one_of_them_renewed(tmp_path: Path) -> None:
    cluster = PlayedCluster()
    cluster.now = days_ago(70)
    async with served(cluster) as standby:
        active = certificates_of(cluster)
        await active.refresh()
        old = stored(cluster, "tls.crt")
        cluster.now = None
        await active.refresh()
        version = cluster.secrets["tls"]["metadata"]["resourceVersion"]
        await until_renewed(standby, old)
        assert cluster.secrets["tls"]["metadata"]["resourceVersion"] == version
        assert standby.certificates.ca == active.ca
        assert await send(standby.client(tmp_path)) is False


@runs
async def test_replicas_that_renew_at_the_same_time_agree() -> None:
    cluster = PlayedCluster()
    replicas = [certificates_of(cluster) for _ in range(3)]
    await asyncio.gather(*(each.refresh() for each in replicas))
    for each in replicas:
        await each.refresh()
    assert len({each.ca for each in replicas}) == 1
    assert cluster.secrets["tls"]["metadata"]["resourceVersion"] == "1"


@runs
async def test_a_deleted_or_emptied_secret_is_written_again_with_the_authority_that_pods_trust(
    tmp_path: Path,
) -> None:
    cluster = PlayedCluster()
    async with served(cluster) as running:
        client, ca = running.client(tmp_path), running.certificates.ca
        del cluster.secrets["tls"]
        await running.certificates.refresh()
        assert stored(cluster, "ca.crt") == ca
        cluster.secrets["tls"]["data"] = {}
        await running.certificates.refresh()
        assert stored(cluster, "ca.crt") == ca
        assert await send(client) is False


# ---- the authority ------------------------------------------------------------------------------


@runs
async def test_a_new_authority_is_handed_out_long_before_it_signs(tmp_path: Path) -> None:
    """Pods of every age can post at every moment of a rotation."""
    cluster = PlayedCluster()
    born = days_ago(AUTHORITY_DAYS * 0.7)
    store(cluster, renewed(None, HOST, born))
    first = stored(cluster, "ca.crt")
    async with served(cluster) as running:
        assert numbers(running.certificates.ca)[:1] == numbers(first)
        assert len(numbers(running.certificates.ca)) == 2
        new_pod = running.client(tmp_path)
        old_pod = StatusClient(running.url, tmp_path / "token", first)
        assert await send(old_pod) is False
        assert await send(new_pod) is False


def test_the_new_authority_signs_once_the_old_one_would_end_before_the_certificate() -> None:
    born = days_ago(AUTHORITY_DAYS - 80)
    old = renewed(None, HOST, born)
    rotated = renewed(old, HOST, born + timedelta(days=AUTHORITY_DAYS * 0.7))
    late = renewed(rotated, HOST, days_ago(0))
    assert numbers(late.ca) == numbers(rotated.ca), "both are trusted until the old one ends"
    issuers = x509.load_pem_x509_certificates(late.ca.encode())
    server = x509.load_pem_x509_certificate(late.server.encode())
    server.verify_directly_issued_by(issuers[1])
    ended = renewed(late, HOST, days_ago(-81))
    assert numbers(ended.ca)[0] == numbers(rotated.ca)[1], "an authority that ended is dropped"


# ---- a Secret of somebody else ------------------------------------------------------------------


@runs
async def test_a_secret_without_the_authoritys_key_is_followed_and_never_written(
    tmp_path: Path,
) -> None:
    cluster = PlayedCluster()
    given = renewed(None, HOST, days_ago(85))
    store(cluster, given, without="ca.key")
    async with served(cluster) as running:
        client = running.client(tmp_path)
        assert await send(client) is False
        old = stored(cluster, "tls.crt")
        store(cluster, renewed(given, HOST, days_ago(0)), without="ca.key")
        after = cluster.secrets["tls"]
        await until_renewed(running, old)
        assert cluster.secrets["tls"] == after
        assert await send(client) is False


@pytest.mark.parametrize(
    ("given", "without", "message"),
    [
        (renewed(None, HOST, days_ago(91)), "", "ended at"),
        (renewed(None, "other.svc", days_ago(0)), "", "does not name the status server's host"),
        (renewed(None, HOST, days_ago(0)), "ca.crt", "ca.crt missing"),
        (Certificates("x", "", "y", "z"), "", "cannot be read"),
    ],
    ids=["expired", "another host", "no authority", "no certificates"],
)
@runs
async def test_a_secret_of_somebody_else_that_pods_would_refuse_is_named(
    given: Certificates, without: str, message: str
) -> None:
    cluster = PlayedCluster()
    store(cluster, given, without=without)
    cluster.secrets["tls"]["data"].pop("ca.key")
    with pytest.raises(TuneyardError, match=f"Secret system/tls .*{message}.*: correct the Secret"):
        await certificates_of(cluster).refresh()


@runs
async def test_a_broken_secret_is_logged_and_the_certificate_in_use_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = PlayedCluster()
    async with served(cluster) as running:
        client = running.client(tmp_path)
        other = renewed(None, HOST, days_ago(0))
        mine = renewed(None, HOST, days_ago(0))
        mixed = Certificates(mine.ca, "", mine.server, other.server_key)
        store(cluster, mixed, without="ca.key")
        following = asyncio.create_task(running.certificates.follow(print, every=0.01))
        async with asyncio.timeout(30):
            while "tls.key is not the key of tls.crt" not in caplog.text:
                await asyncio.sleep(0.01)
        following.cancel()
        assert await send(client) is False


@runs
async def test_a_deleted_secret_of_somebody_else_is_not_replaced() -> None:
    cluster = PlayedCluster()
    store(cluster, renewed(None, HOST, days_ago(0)), without="ca.key")
    certificates = certificates_of(cluster)
    await certificates.refresh()
    del cluster.secrets["tls"]
    with pytest.raises(TuneyardError, match="has no certificates any more"):
        await certificates.refresh()
    assert not cluster.secrets
