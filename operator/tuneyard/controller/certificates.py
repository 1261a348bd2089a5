"""The status server's certificate: issued once, stored in a Secret that all replicas share.

A certificate authority, valid for ten years, signs a certificate that is valid for one. Pods trust
the authority, so a renewed certificate does not affect running jobs.
"""

from __future__ import annotations

import base64
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tuneyard.controller.cluster import ApiError, Cluster, Object

AUTHORITY_DAYS, SERVER_DAYS, RENEWAL_DAYS = 3650, 365, 30
_FILES = ("ca.crt", "ca.key", "tls.crt", "tls.key")


@dataclass(frozen=True)
class Certificates:
    """The authority's and the server's certificates and keys, in PEM."""

    ca: str
    ca_key: str
    server: str
    server_key: str

    def context(self) -> ssl.SSLContext:
        """Return a TLS context for the server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        with tempfile.TemporaryDirectory() as folder:
            chain = Path(folder) / "server.pem"  # ssl reads files only
            chain.touch(mode=0o600)
            chain.write_text(self.server_key + self.server)
            context.load_cert_chain(chain)
        return context


async def ensure(cluster: Cluster, namespace: str, name: str, url: str) -> Certificates:
    """Return the certificates in the Secret. Issue new ones if the Secret's are missing, expire
    within 30 days or name another host. Raises ApiError."""
    host = urlsplit(url).hostname or "localhost"
    secret = await cluster.secret(namespace, name)
    stored = _read(secret) if secret else None
    if stored and _is_valid(stored.server, host):
        return stored
    issued = issue([host], stored)
    body: Object = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "Opaque",
        "data": _data(issued),
    }
    try:
        if secret is None:
            await cluster.create_secret(namespace, body)
        else:
            body["metadata"]["resourceVersion"] = secret["metadata"]["resourceVersion"]
            await cluster.replace_secret(namespace, body)
    except ApiError as error:
        if error.code != 409:
            raise
        return await ensure(cluster, namespace, name, url)  # another replica was faster
    return issued


def issue(hosts: Sequence[str], authority: Certificates | None = None) -> Certificates:
    """Issue a server certificate for the hosts, signed by the given authority or by a new one."""
    now = datetime.now(UTC)
    if authority is None or not _is_valid(authority.ca, None):
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = _authority(ca_key, now)
    else:
        loaded = serialization.load_pem_private_key(authority.ca_key.encode(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        ca_key, ca = loaded, x509.load_pem_x509_certificate(authority.ca.encode())
    key = ec.generate_private_key(ec.SECP256R1())
    server = (
        _builder(hosts[0], ca.subject, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    return Certificates(_pem(ca), _key_pem(ca_key), _pem(server), _key_pem(key))


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
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
    return (
        _builder("Tuneyard operator", name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


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


def _is_valid(pem: str, host: str | None) -> bool:
    """Return whether a certificate is valid for 30 more days and for the host. None: any host."""
    certificate = x509.load_pem_x509_certificate(pem.encode())
    if certificate.not_valid_after_utc - datetime.now(UTC) < timedelta(days=RENEWAL_DAYS):
        return False
    if host is None:
        return True
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return _name(host) in names


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


def _read(secret: Object) -> Certificates | None:
    """Return the certificates in a Secret; None: one of them is missing."""
    data = secret.get("data") or {}
    if any(not data.get(file) for file in _FILES):
        return None
    return Certificates(*(base64.b64decode(data[file]).decode() for file in _FILES))
