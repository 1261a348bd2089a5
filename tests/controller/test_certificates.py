"""The status server's certificates: renewal while the server listens, and pods of every age."""

from __future__ import annotations

import asyncio
import base64
import copy
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

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


def authority(days: int, signer: tuple[str, str] | None = None) -> tuple[str, str]:
    """Return an authority's certificate and key. `signer`: of another authority; None: itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority of {signer and 1}")])
    issuer, issuer_key = name, key
    if signer:
        issuer = x509.load_pem_x509_certificate(signer[0].encode()).subject
        loaded = serialization.load_pem_private_key(signer[1].encode(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        issuer_key = loaded
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(days_ago(1))
        .not_valid_after(days_ago(-days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(issuer_key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return pem, pem_of(key, serialization.NoEncryption())


def pem_of(
    key: ec.EllipticCurvePrivateKey, encryption: serialization.KeySerializationEncryption
) -> str:
    format_ = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, format_, encryption).decode()


async def refusal(client: StatusClient) -> str:
    """Return why the pod did not trust the server."""
    with pytest.raises(ssl.SSLError) as refused:
        await send(client)
    return str(refused.value)


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
        (renewed(None, HOST, days_ago(91)), "", "valid only from"),
        (renewed(None, "other.svc", days_ago(0)), "", "does not name the status server's host"),
        (renewed(None, HOST, days_ago(0)), "ca.crt", "ca.crt missing"),
        (Certificates("x", "", "y", "z"), "", "cannot be read"),
        (renewed(None, HOST, days_ago(-1)), "", "valid only from"),
        (
            replace(renewed(None, HOST, days_ago(0)), ca=renewed(None, HOST, days_ago(0)).ca),
            "",
            "no authority in ca.crt signed",
        ),
    ],
    ids=["expired", "another host", "no authority", "no certificates", "not yet", "another ca"],
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


# ---- clocks and Secrets that somebody edited ----------------------------------------------------


@runs
async def test_a_certificate_of_a_clock_that_was_ahead_is_replaced(tmp_path: Path) -> None:
    cluster = PlayedCluster()
    cluster.now = days_ago(-400)
    async with served(cluster) as running:
        cluster.now = None
        assert await running.certificates.refresh()
        assert len(numbers(running.certificates.ca)) == 1, "pods could not trust the other one yet"
        assert await send(running.client(tmp_path)) is False


@runs
async def test_an_authority_of_a_clock_that_was_ahead_leaves_the_one_that_pods_trust(
    tmp_path: Path,
) -> None:
    cluster = PlayedCluster()
    async with served(cluster) as running:
        client, ca = running.client(tmp_path), running.certificates.ca
        cluster.now = days_ago(-AUTHORITY_DAYS * 0.7)
        await running.certificates.refresh()
        assert len(numbers(running.certificates.ca)) == 2
        cluster.now = None
        await running.certificates.refresh()
        assert running.certificates.ca == ca
        assert await send(client) is False


@runs
async def test_an_authority_that_would_end_too_early_is_joined_by_another_one(
    tmp_path: Path,
) -> None:
    cluster = PlayedCluster()
    issued, (ca, key) = renewed(None, HOST, days_ago(0)), authority(days=60)
    store(cluster, Certificates(ca, key, issued.server, issued.server_key))
    async with served(cluster) as running:
        assert numbers(running.certificates.ca)[0] == numbers(ca)[0]
        assert await send(running.client(tmp_path)) is False


@pytest.mark.parametrize("file", ["tls.key", "ca.key"])
@runs
async def test_a_key_with_a_password_is_named_and_the_secret_is_followed_on(
    file: str, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = PlayedCluster()
    locked = pem_of(
        ec.generate_private_key(ec.SECP256R1()), serialization.BestAvailableEncryption(b"secret")
    )
    async with served(cluster) as running:
        before = copy.deepcopy(cluster.secrets["tls"])
        cluster.secrets["tls"]["data"][file] = base64.b64encode(locked.encode()).decode()
        given: list[str] = []
        following = asyncio.create_task(running.certificates.follow(given.append, every=0.01))
        async with asyncio.timeout(30):
            while "Secret system/tls cannot be read" not in caplog.text:
                assert not following.done(), following
                await asyncio.sleep(0.01)
            cluster.now, cluster.secrets["tls"] = days_ago(-61), before
            while not given:
                await asyncio.sleep(0.01)
        following.cancel()


@runs
async def test_a_certificate_with_an_intermediate_authority_is_used(tmp_path: Path) -> None:
    cluster = PlayedCluster()
    root = authority(days=200)
    middle = authority(days=200, signer=root)
    issued = renewed(None, HOST, days_ago(0))
    leaf = renewed(Certificates(*middle, issued.server, issued.server_key), HOST, days_ago(0))
    given = Certificates(root[0], "", leaf.server + middle[0], leaf.server_key)
    store(cluster, given, without="ca.key")
    async with served(cluster) as running:
        assert await send(running.client(tmp_path)) is False
