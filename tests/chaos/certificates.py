"""A certificate of the status server that is about to end."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.controller.scene import Scene

VALID_SECONDS = 10
"""Long enough that the operator, which renews after two thirds, uses it when it starts; it ends
before the operator checks again (tests.chaos.operator)."""
SECRET = "tuneyard-tls"


def shorten(scene: Scene) -> None:
    """Replace the server's certificate in the Secret by one that ends in seconds, signed by the
    authority that the pods trust."""
    path = f"/api/v1/namespaces/{scene.namespace}/secrets/{SECRET}"
    secret = scene.api("GET", path)["data"]
    authority = x509.load_pem_x509_certificates(_decoded(secret["ca.crt"]))[0]
    first, end, _ = _decoded(secret["ca.key"]).partition(b"-----END PRIVATE KEY-----\n")
    signer = serialization.load_pem_private_key(first + end, password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    names = [x509.IPAddress(ip_address("127.0.0.1"))]
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    server = (
        x509.CertificateBuilder()
        .subject_name(authority.subject)
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(seconds=1))
        .not_valid_after(now + timedelta(seconds=VALID_SECONDS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(identifier, critical=False)
        .sign(signer, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    data = {
        "tls.crt": _encoded(server.public_bytes(serialization.Encoding.PEM)),
        "tls.key": _encoded(private),
    }
    scene.api.merge(path, {"data": data})


def _decoded(text: str) -> bytes:
    return base64.b64decode(text)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
