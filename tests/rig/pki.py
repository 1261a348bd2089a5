"""Create the certificates and kubeconfigs of one short-lived cluster."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rig.network import API_SERVICE_IP, NODE_IP, NODE_NAME
from rig.state import State

# A rig runs for hours. The margin allows for clocks that jump when a laptop resumes.
VALID_DAYS = "30"

_SERVICE_NAMES = (
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)


@dataclass(frozen=True)
class Certificate:
    """A certificate to create; every certificate works for clients and servers."""

    name: str
    subject: str
    dns: tuple[str, ...] = ()
    ips: tuple[str, ...] = ()

    @property
    def alternative_names(self) -> str:
        return ",".join([*(f"DNS:{name}" for name in self.dns), *(f"IP:{ip}" for ip in self.ips)])


SERVERS = (
    Certificate(
        "apiserver",
        "/CN=kube-apiserver",
        dns=_SERVICE_NAMES,
        ips=("127.0.0.1", NODE_IP, API_SERVICE_IP),
    ),
    Certificate("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
    Certificate("webhook", "/CN=webhook", dns=("localhost",), ips=("127.0.0.1",)),
)
USERS = (
    Certificate("admin", "/O=system:masters/CN=admin"),
    Certificate("controller-manager", "/CN=system:kube-controller-manager"),
    Certificate("scheduler", "/CN=system:kube-scheduler"),
    Certificate("proxy", "/CN=system:kube-proxy"),
    Certificate(
        "kubelet",
        f"/O=system:nodes/CN=system:node:{NODE_NAME}",
        dns=(NODE_NAME,),
        ips=(NODE_IP,),
    ),
)


def write(state: State) -> None:
    """Create the certificate authority, every certificate and a kubeconfig for every user."""
    state.pki.mkdir()
    _write_authority(state.pki)
    _write_service_account_keys(state.pki)
    for certificate in (*SERVERS, *USERS):
        _write_certificate(state.pki, certificate)
    url = state.settings.url
    for user in USERS:
        state.kubeconfig(user.name).write_text(json.dumps(_kubeconfig(state.pki, user.name, url)))


def _write_authority(folder: Path) -> None:
    _write_key(folder, "ca")
    _openssl(
        folder,
        *("req", "-x509", "-new", "-key", "ca.key", "-days", VALID_DAYS, "-out", "ca.crt"),
        *("-subj", "/CN=tuneyard-rig", "-addext", "keyUsage=critical,keyCertSign,digitalSignature"),
    )


def _write_service_account_keys(folder: Path) -> None:
    _write_key(folder, "service-accounts")
    _openssl(
        folder,
        *("pkey", "-in", "service-accounts.key", "-pubout", "-out", "service-accounts.pub"),
    )


def _write_certificate(folder: Path, certificate: Certificate) -> None:
    name = certificate.name
    _write_key(folder, name)
    (folder / f"{name}.ext").write_text("\n".join(_extensions(certificate)) + "\n")
    _openssl(
        folder,
        *("req", "-new", "-key", f"{name}.key", "-subj", certificate.subject),
        *("-out", f"{name}.csr"),
    )
    _openssl(
        folder,
        *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key"),
        *("-CAcreateserial", "-days", VALID_DAYS, "-extfile", f"{name}.ext", "-out", f"{name}.crt"),
    )


def _extensions(certificate: Certificate) -> Iterable[str]:
    yield "keyUsage=critical,digitalSignature"
    yield "extendedKeyUsage=clientAuth,serverAuth"
    if certificate.alternative_names:
        yield f"subjectAltName={certificate.alternative_names}"


def _write_key(folder: Path, name: str) -> None:
    _openssl(folder, "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", f"{name}.key")


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def _kubeconfig(folder: Path, user: str, url: str) -> dict[str, object]:
    cluster = {"server": url, "certificate-authority": str(folder / "ca.crt")}
    credentials = {
        "client-certificate": str(folder / f"{user}.crt"),
        "client-key": str(folder / f"{user}.key"),
    }
    context = {"cluster": "rig", "user": user, "namespace": "default"}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "rig",
        "clusters": [{"name": "rig", "cluster": cluster}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": "rig", "context": context}],
    }
