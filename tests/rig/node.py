"""Start the rig's only node: its mounts, network, kubelet, service proxy and DNS.

This code runs as pid 1 of the rig's namespaces. When that process is killed, the kernel ends every
process, mount, interface and packet filter rule that this module creates.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

from rig import cgroups
from rig.apiclient import ApiClient
from rig.containerd import Containerd
from rig.network import NODE_IP, NODE_NAME, PODS, SERVICES
from rig.processes import Servers, run
from rig.state import State

READY_SECONDS = 120

# Two server blocks, because `template` runs before `kubernetes`: in one block it would deny every
# name. Names outside the cluster are denied at once; otherwise their lookups would time out.
_COREFILE = """\
cluster.local:53 in-addr.arpa:53 {{
  bind {ip}
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig} rig
    pods insecure
    ttl 1
  }}
}}
.:53 {{
  bind {ip}
  template ANY ANY {{
    rcode NXDOMAIN
  }}
}}
"""

_RESOLVER = """\
nameserver {ip}
search default.svc.cluster.local svc.cluster.local cluster.local
options ndots:5
"""


def prepare(state: State) -> None:
    """Create the node's mounts and network, before any of its processes starts."""
    _prepare_mounts(state)
    _prepare_network()


def start(state: State, servers: Servers) -> None:
    """Start the servers of a node of the running control plane."""
    runtime = Containerd(state)
    runtime.start(servers)
    runtime.add_images()
    _start_kubelet(state, servers, runtime)
    _start_service_proxy(state, servers)
    _start_dns(state, servers)


def wait_until_ready(servers: Servers, api: ApiClient) -> None:
    servers.wait_for("the node is Ready", lambda: _is_ready(api), READY_SECONDS)


def _prepare_mounts(state: State) -> None:
    """Keep in memory what programs write to fixed paths that no option changes."""
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "proc", "proc", "/proc")
    # Kubernetes needs mounts that propagate from the node to its containers, in this namespace.
    run("mount", "--make-rshared", "/")
    run("mount", "-t", "tmpfs", "-o", "mode=755", "rig", "/run")
    run("mount", "-t", "tmpfs", "-o", "mode=755", "rig", "/var/log")
    _overlay("/etc")
    _overlay("/var/lib")
    _resolver(state).write_text(_RESOLVER.format(ip=NODE_IP))
    # On many systems this file is a link into /run, which is empty now.
    target = Path("/etc/resolv.conf").resolve()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    run("mount", "--bind", _resolver(state), target)


def _overlay(folder: str) -> None:
    """Mount an overlay on the folder that keeps changes in memory."""
    layers = Path("/run/rig-layers" + folder)
    for name in ("upper", "work"):
        (layers / name).mkdir(parents=True)
    options = f"lowerdir={folder},upperdir={layers}/upper,workdir={layers}/work"
    run("mount", "-t", "overlay", "-o", options, "rig", folder)


def _prepare_network() -> None:
    """Create an interface with the node's address. Without a default route, no packet can leave."""
    socket.sethostname(NODE_NAME)
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "rig0", "type", "veth", "peer", "name", "rig1")
    run("ip", "addr", "add", f"{NODE_IP}/32", "dev", "rig0")
    run("ip", "link", "set", "rig0", "up")
    run("ip", "link", "set", "rig1", "up")
    # Without this route the kernel refuses packets to Services before the service proxy sees them.
    run("ip", "route", "add", SERVICES, "dev", "rig0")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _resolver(state: State) -> Path:
    return state.root / "resolv.conf"


def _start_kubelet(state: State, servers: Servers, runtime: Containerd) -> None:
    cgroups.create(state.settings.name)
    config = state.root / "kubelet.yaml"
    config.write_text(json.dumps(_kubelet_config(state, runtime), indent=2))
    servers.start(
        "kubelet",
        state.settings.program("kubernetes", "kubelet"),
        *("--config", config, "--kubeconfig", state.kubeconfig("kubelet")),
        *("--root-dir", state.root / "kubelet", "--cert-dir", state.root / "kubelet-certificates"),
        *("--hostname-override", NODE_NAME, "--node-ip", NODE_IP),
    )


def _kubelet_config(state: State, runtime: Containerd) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        **_kubelet_access(state),
        **_kubelet_resources(state),
        "containerRuntimeEndpoint": f"unix://{runtime.socket}",
        "clusterDNS": [NODE_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": str(_resolver(state)),
        "podLogsDir": str(state.root / "pod-logs"),
        "volumePluginDir": str(state.root / "volume-plugins"),
        "makeIPTablesUtilChains": False,
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": "10s",
        # No rate limits: with the defaults, the events of many pods arrive late.
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
        "serializeImagePulls": False,
    }


def _kubelet_access(state: State) -> dict[str, object]:
    return {
        "address": NODE_IP,
        "healthzBindAddress": "127.0.0.1",
        "readOnlyPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(state.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(state.pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(state.pki / "kubelet.key"),
    }


def _kubelet_resources(state: State) -> dict[str, object]:
    """Return settings that evict late and never delete images, which no registry could replace."""
    return {
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{state.settings.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "200Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
        },
    }


def _start_service_proxy(state: State, servers: Servers) -> None:
    config = state.root / "kube-proxy.yaml"
    content = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": PODS,
        "hostnameOverride": NODE_NAME,
        "clientConnection": {"kubeconfig": str(state.kubeconfig("proxy"))},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "nodePortAddresses": ["primary"],
        # 0 leaves the size of the connection table unchanged: it belongs to the whole machine.
        "conntrack": {"maxPerCore": 0, "min": 0},
    }
    config.write_text(json.dumps(content, indent=2))
    servers.start(
        "kube-proxy", state.settings.program("kubernetes", "kube-proxy"), "--config", config
    )


def _start_dns(state: State, servers: Servers) -> None:
    config = state.root / "Corefile"
    config.write_text(_COREFILE.format(ip=NODE_IP, kubeconfig=state.kubeconfig()))
    servers.start("coredns", state.settings.program("coredns", "coredns"), "-conf", config)


def _is_ready(api: ApiClient) -> bool:
    conditions = api.get(f"/api/v1/nodes/{NODE_NAME}")["status"]["conditions"]
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
