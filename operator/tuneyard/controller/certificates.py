"""The status server's certificate, which all replicas read from one Secret, also while they run.

A certificate authority, valid for ten years, signs a certificate that is valid for 90 days. Each
is replaced after two thirds of its validity. Pods trust the authorities of the time when they
started, so a renewed certificate does not affect them. A new authority is handed to new pods more
than three years before it signs anything: no pod that runs is older than the authority that it
needs.

A Secret without `ca.key` belongs to somebody else, such as cert-manager: it is read and never
written.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tuneyard.controller.cluster import ApiError, Cluster, Object
from tuneyard.errors import TuneyardError

AUTHORITY_DAYS, SERVER_DAYS = 3650, 90
CHECK_SECONDS = 60.0
"""How often a replica reads the Secret."""
_MINUTE = "%Y-%m-%d %H:%M"
_FILES = ("ca.crt", "ca.key", "tls.crt", "tls.key")

log = logging.getLogger("tuneyard")


@dataclass(frozen=True)
class Certificates:
    """Certificates and keys, in PEM."""

    ca: str
    """The authorities that pods trust, from the oldest to the newest."""
    ca_key: str
    """The authorities' keys in the same order. "": somebody else issues the certificates."""
    server: str
    server_key: str


class ServerCertificates:
    """The certificates in use. They follow the Secret while the status server listens."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        url: str,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`name`: of the Secret. `url`: of the status server, whose host the certificate names."""
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self._clock = clock
        self._host = urlsplit(url).hostname or "localhost"
        self._current: Certificates | None = None
        self.context = _server_context()
        """Given to the listener once: connections opened after a renewal use the new certificate,
        and open connections stay."""

    @property
    def ca(self) -> str:
        """The authorities that pods trust, in PEM."""
        return self._current.ca if self._current else ""

    async def refresh(self) -> bool:
        """Read the Secret, renew what is due and use the result; return whether anything changed.
        Raises ApiError; TuneyardError: the Secret cannot be used."""
        found = await self._ensure(self._clock())
        if found == self._current:
            return False
        try:
            _load(_server_context(), found)  # a failure must not leave half a pair in use
            _load(self.context, found)
        except ssl.SSLError as error:
            raise self._unusable(f"tls.key is not the key of tls.crt ({error.reason})") from error
        self._current = found
        return True

    async def follow(self, on_change: Callable[[str], None], every: float = CHECK_SECONDS) -> None:
        """Refresh until canceled; call `on_change` with the authorities after each change. A
        failure is logged, and the certificates in use stay."""
        while True:
            await asyncio.sleep(every)
            try:
                changed = await self.refresh()
            except TuneyardError as error:
                log.error("the certificates could not be checked: %s", error)
                continue
            if changed:
                log.info("the status server uses the new certificates of Secret %s", self._name)
                on_change(self.ca)

    async def _ensure(self, now: datetime) -> Certificates:
        """Return the certificates in the Secret, renewed where that is due."""
        while True:
            secret = await self._cluster.secret(self._namespace, self._name)
            stored = self._read(secret, now) if secret else None
            if stored and not stored.ca_key:
                return stored
            if stored is None and self._current and not self._current.ca_key:
                raise self._unusable("has no certificates any more")
            # Where the Secret was deleted, running pods trust the authority that is in use.
            issued = renewed(stored or self._current, self._host, now)
            if issued == stored:
                return issued
            try:
                await self._write(secret, issued)
            except ApiError as error:
                if error.code != 409:
                    raise
                continue  # another replica was faster
            return issued

    async def _write(self, secret: Object | None, issued: Certificates) -> None:
        body: Object = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "type": "Opaque",
            "data": _data(issued),
        }
        if secret is None:
            await self._cluster.create_secret(self._namespace, body)
        else:
            body["metadata"]["resourceVersion"] = secret["metadata"]["resourceVersion"]
            await self._cluster.replace_secret(self._namespace, body)

    def _read(self, secret: Object, now: datetime) -> Certificates | None:
        """Return the certificates in a Secret; None: new ones are to be issued. Raises
        TuneyardError if the Secret cannot be used."""
        try:
            texts = _texts(secret)
            is_own = bool(texts["ca.key"]) or not any(texts.values())
            if is_own and not all(texts.values()):
                return None
            stored = _checked(Certificates(*texts.values())) if is_own else _given(texts)
            problem = None if is_own else _problem(stored, self._host, now)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            # TypeError: a key has a password.
            problem = f"cannot be read: {error}"
        if problem:
            raise self._unusable(problem)
        return stored

    def _unusable(self, problem: str) -> TuneyardError:
        return TuneyardError(
            f"Secret {self._namespace}/{self._name} {problem}: correct the Secret, or delete it "
            "and restart the operator, which then issues its own certificates"
        )


def renewed(stored: Certificates | None, host: str, now: datetime) -> Certificates:
    """Return the stored certificates with those replaced that are due. The oldest authority that
    outlives the server's certificate signs it, since the oldest pods trust that one alone."""
    end = now + timedelta(days=SERVER_DAYS)
    known = [each for each in _authorities(stored) if _is_valid(each.certificate, now)]
    newest = known[-1].certificate if known else None
    if newest is None or _is_due(newest, now) or newest.not_valid_after_utc < end:
        known.append(_new_authority(now))
    ca = "".join(_pem(each.certificate) for each in known)
    ca_key = "".join(_key_pem(each.key) for each in known)
    if stored and _is_in_force(stored.server, host, known, now):
        return Certificates(ca, ca_key, stored.server, stored.server_key)
    signer = next(each for each in known if each.certificate.not_valid_after_utc >= end)
    return Certificates(ca, ca_key, *_issue(host, signer, now))


class _Authority(NamedTuple):
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _authorities(stored: Certificates | None) -> list[_Authority]:
    if stored is None:
        return []
    certificates = x509.load_pem_x509_certificates(stored.ca.encode())
    keys = [_key(pem) for pem in _split(stored.ca_key)]
    return [_Authority(*pair) for pair in zip(certificates, keys, strict=True)]


def _split(pems: str) -> list[str]:
    """Return the PEM blocks of a text."""
    blocks: list[str] = []
    for line in pems.splitlines(keepends=True):
        if line.startswith("-----BEGIN"):
            blocks.append("")
        if blocks:
            blocks[-1] += line
    return blocks


def _key(pem: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key of an authority is not one of an elliptic curve")
    return key


def _new_authority(now: datetime) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject("Tuneyard operator")
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder("Tuneyard operator", name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Authority(certificate, key)


def _issue(host: str, signer: _Authority, now: datetime) -> tuple[str, str]:
    """Return a new certificate of the server and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    ca, ca_key = signer
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    server = (
        _builder(host, ca.subject, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_name(host)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(identifier, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return _pem(server), _key_pem(key)


def _builder(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


# ---- checks -------------------------------------------------------------------------------------


def _is_valid(certificate: x509.Certificate, now: datetime) -> bool:
    """Return whether pods accept the certificate now. One that was issued while a replica's clock
    was ahead begins later."""
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


def _is_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Return whether two thirds of the validity are over."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begin + (end - begin) * 2 / 3


def _is_in_force(pem: str, host: str, authorities: list[_Authority], now: datetime) -> bool:
    """Return whether the server's certificate is valid for the host, not due for renewal, and
    signed by one of the authorities."""
    certificate = x509.load_pem_x509_certificate(pem.encode())
    issuers = {_key_identifier(each.key.public_key()) for each in authorities}
    return (
        _is_valid(certificate, now)
        and not _is_due(certificate, now)
        and _names_host(certificate, host)
        and _issuer_identifier(certificate) in issuers
    )


def _key_identifier(key: ec.EllipticCurvePublicKey) -> bytes:
    return x509.SubjectKeyIdentifier.from_public_key(key).digest


def _issuer_identifier(certificate: x509.Certificate) -> bytes | None:
    try:
        found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound:
        return None
    return found.value.key_identifier


def _names_host(certificate: x509.Certificate, host: str) -> bool:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return False
    return _name(host) in found.value


def _texts(secret: Object) -> dict[str, str]:
    """Return the content of each file in a Secret; "": the Secret lacks it."""
    data = secret.get("data") or {}
    return {file: base64.b64decode(data.get(file) or "").decode() for file in _FILES}


def _given(texts: dict[str, str]) -> Certificates:
    """Return the certificates that somebody else issued. Raises ValueError."""
    missing = [file for file, text in texts.items() if not text and file != "ca.key"]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing")
    return _checked(Certificates(*texts.values()))


def _checked(stored: Certificates) -> Certificates:
    """Return the certificates. Raises ValueError if one cannot be parsed."""
    x509.load_pem_x509_certificates(stored.ca.encode())
    x509.load_pem_x509_certificate(stored.server.encode())
    serialization.load_pem_private_key(stored.server_key.encode(), password=None)
    _authorities(stored if stored.ca_key else None)
    return stored


def _problem(given: Certificates, host: str, now: datetime) -> str | None:
    """Return why pods would refuse certificates that somebody else issued; None: they accept
    them."""
    certificate = x509.load_pem_x509_certificate(given.server.encode())
    if not _is_valid(certificate, now):
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return f"has a certificate that is valid only from {begin:{_MINUTE}} to {end:{_MINUTE}}"
    if not _names_host(certificate, host):
        return f"has a certificate that does not name the status server's host {host}"
    chain = x509.load_pem_x509_certificates(given.server.encode())
    authorities = x509.load_pem_x509_certificates(given.ca.encode())
    if not any(_is_issued_by(each, ca) for each in chain for ca in authorities):
        return "has a certificate that no authority in ca.crt signed"
    return None


def _is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, InvalidSignature):  # ValueError: it names another issuer
        return False
    return True


# ---- PEM ----------------------------------------------------------------------------------------


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load(context: ssl.SSLContext, certificates: Certificates) -> None:
    with tempfile.TemporaryDirectory() as folder:
        chain = Path(folder) / "server.pem"  # ssl reads files only
        chain.touch(mode=0o600)
        chain.write_text(certificates.server_key + certificates.server)
        context.load_cert_chain(chain)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def _data(certificates: Certificates) -> Object:
    texts = (
        certificates.ca,
        certificates.ca_key,
        certificates.server,
        certificates.server_key,
    )
    return {
        file: base64.b64encode(text.encode()).decode()
        for file, text in zip(_FILES, texts, strict=True)
    }
