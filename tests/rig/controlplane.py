"""Start the control plane: etcd, the API server, the controller manager and the scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rig.apiclient import ApiClient
from rig.network import NODE_IP, SERVICES
from rig.processes import Servers
from rig.state import Settings, State

READY_SECONDS = 90


def start(state: State, servers: Servers, api: ApiClient) -> None:
    """Start all four servers; return after the API server is ready."""
    settings = state.settings
    servers.start("etcd", *_etcd(state, settings))
    servers.start("kube-apiserver", *_api_server(state, settings))
    servers.wait_for("kube-apiserver is ready", lambda: api.text("/readyz") == "ok", READY_SECONDS)
    servers.start("kube-controller-manager", *_controller_manager(state, settings))
    servers.start("kube-scheduler", *_scheduler(state, settings))


def wait_for_controllers(servers: Servers, api: ApiClient) -> None:
    """Wait until the controllers run.

    The API server is ready seconds earlier, but rejects pods until a ServiceAccount exists.
    """
    servers.wait_for(
        "the controller manager created the default ServiceAccount",
        lambda: api.get("/api/v1/namespaces/default/serviceaccounts/default"),
        READY_SECONDS,
    )


def _etcd(state: State, settings: Settings) -> Iterator[str | Path]:
    clients = f"http://127.0.0.1:{settings.ports['etcd']}"
    peers = f"http://127.0.0.1:{settings.ports['etcd-peers']}"
    yield settings.program("kubernetes", "etcd")
    yield from ("--data-dir", state.root / "etcd", "--log-level=warn")
    yield from ("--listen-client-urls", clients, "--advertise-client-urls", clients)
    yield from ("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers)
    yield from ("--initial-cluster", f"default={peers}")
    # The data is temporary and needs no fsync: this halves the time of a write.
    yield "--unsafe-no-fsync"


def _api_server(state: State, settings: Settings) -> Iterator[str | Path]:
    pki = state.pki
    yield settings.program("kubernetes", "kube-apiserver")
    yield from ("--etcd-servers", f"http://127.0.0.1:{settings.ports['etcd']}")
    yield from ("--secure-port", str(settings.ports["api"]))
    yield from _api_server_address(settings)
    yield from ("--service-cluster-ip-range", SERVICES, "--allow-privileged=true")
    yield from ("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction")
    yield from ("--anonymous-auth=false", "--profiling=false", "--client-ca-file", pki / "ca.crt")
    yield from ("--tls-cert-file", pki / "apiserver.crt")
    yield from ("--tls-private-key-file", pki / "apiserver.key")
    yield from ("--kubelet-client-certificate", pki / "kubelet-client.crt")
    yield from ("--kubelet-client-key", pki / "kubelet-client.key")
    yield from ("--kubelet-certificate-authority", pki / "ca.crt")
    yield "--kubelet-preferred-address-types=InternalIP"
    yield "--service-account-issuer=https://kubernetes.default.svc.cluster.local"
    yield from ("--service-account-key-file", pki / "service-accounts.pub")
    yield from ("--service-account-signing-key-file", pki / "service-accounts.key")


def _api_server_address(settings: Settings) -> Iterator[str]:
    """Yield the address options: without a node, loopback is enough and no endpoints are needed."""
    if settings.level == "node":
        # 0.0.0.0 is the node's own network namespace: its loopback and its one address.
        yield from ("--bind-address=0.0.0.0", "--advertise-address", NODE_IP)
    else:
        yield from ("--bind-address=127.0.0.1", "--advertise-address=127.0.0.1")
        yield "--endpoint-reconciler-type=none"


def _controller_manager(state: State, settings: Settings) -> Iterator[str | Path]:
    pki = state.pki
    yield settings.program("kubernetes", "kube-controller-manager")
    yield from ("--kubeconfig", state.kubeconfig("controller-manager"))
    yield "--use-service-account-credentials"
    yield from ("--service-account-private-key-file", pki / "service-accounts.key")
    yield from ("--root-ca-file", pki / "ca.crt")
    yield from ("--cluster-signing-cert-file", pki / "ca.crt")
    yield from ("--cluster-signing-key-file", pki / "ca.key")
    yield from ("--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0")
    yield "--allocate-node-cidrs=false"


def _scheduler(state: State, settings: Settings) -> Iterator[str | Path]:
    yield settings.program("kubernetes", "kube-scheduler")
    yield from ("--kubeconfig", state.kubeconfig("scheduler"))
    yield from ("--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0")
