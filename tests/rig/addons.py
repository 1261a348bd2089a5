"""Start KubeRay and Kueue as plain processes next to the control plane.

Both run with the administrator's permissions, so the rig does not test their own RBAC.
"""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rig.apiclient import ApiClient
from rig.processes import Servers, run
from rig.state import State

READY_SECONDS = 60
# Kueue reads this path even if it serves no metrics, and has no option for another one.
METRICS_CERTIFICATES = Path("/etc/kueue/metrics/certs")
_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def install_kuberay_crds(state: State) -> None:
    """Install KubeRay's CRDs and wait until they are established."""
    _create(state, "-f", Path(state.settings.program("kuberay-crds", "bases")))
    _wait_until_established(state)


def start_kuberay(state: State, servers: Servers) -> None:
    """Start KubeRay. Its CRDs must be established, because it exits on unknown kinds."""
    port = state.settings.ports["kuberay-health"]
    servers.start(
        "kuberay",
        state.settings.program("kuberay", "ray-operator"),
        *("--kubeconfig", state.kubeconfig(), "--enable-leader-election=false"),
        *("--metrics-addr=0", f"--health-probe-bind-address=127.0.0.1:{port}"),
        "--log-stdout-encoder=console",
    )
    servers.wait_for("KubeRay is ready", lambda: _is_healthy(port), READY_SECONDS)


def start_kueue(state: State, servers: Servers, api: ApiClient) -> None:
    """Start Kueue, with its webhooks called on loopback instead of through a Service.

    Kueue needs level "node": it reads a fixed path in /etc, and only a node has an /etc of its own.
    """
    _create(state, "-k", Path(state.settings.program("kueue-crds", "crd")))
    _wait_until_established(state)
    _call_conversions_locally(state, api)
    certificates = _link_webhook_certificates(state)
    METRICS_CERTIFICATES.parent.mkdir(parents=True)
    METRICS_CERTIFICATES.symlink_to(certificates)
    config = state.root / "kueue.yaml"
    config.write_text(json.dumps(_kueue_config(state, certificates), indent=2))
    servers.start(
        "kueue",
        state.settings.program("kueue", "kueue"),
        *("--config", config, "--feature-gates=VisibilityOnDemand=false"),
        env={"KUBECONFIG": str(state.kubeconfig())},
    )
    port = state.settings.ports["kueue-health"]
    servers.wait_for("Kueue is ready", lambda: _is_healthy(port), READY_SECONDS)
    # After Kueue is ready: an unreachable webhook rejects every object that it watches.
    _create(state, "-f", Path(state.settings.program("kueue-crds", "webhook")) / "manifests.yaml")
    _call_admission_locally(state, api)


def _kueue_config(state: State, certificates: Path) -> dict[str, object]:
    ports = state.settings.ports
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": "kube-system",
        "health": {"healthProbeBindAddress": f"127.0.0.1:{ports['kueue-health']}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {
            "host": "127.0.0.1",
            "port": ports["kueue-webhook"],
            "certDir": str(certificates),
        },
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "integrations": {"frameworks": ["batch/job", "ray.io/rayjob", "ray.io/raycluster"]},
    }


def _link_webhook_certificates(state: State) -> Path:
    """Return a folder with the file names that Kueue expects, as links to the rig's certificate."""
    folder = state.root / "kueue-webhook"
    folder.mkdir()
    for suffix in ("crt", "key"):
        (folder / f"tls.{suffix}").symlink_to(state.pki / f"webhook.{suffix}")
    return folder


def _call_conversions_locally(state: State, api: ApiClient) -> None:
    for crd in api.get(_CRDS)["items"]:
        conversion = crd["spec"].get("conversion", {})
        if "kueue" in crd["metadata"]["name"] and "webhook" in conversion:
            webhook = conversion["webhook"]
            webhook["clientConfig"] = _local_client(state, webhook["clientConfig"])
            api.put(f"{_CRDS}/{crd['metadata']['name']}", crd)


def _call_admission_locally(state: State, api: ApiClient) -> None:
    for kind in ("mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
        for configuration in api.get(f"{_ADMISSION}/{kind}")["items"]:
            for webhook in configuration["webhooks"]:
                webhook["clientConfig"] = _local_client(state, webhook["clientConfig"])
            api.put(f"{_ADMISSION}/{kind}/{configuration['metadata']['name']}", configuration)


def _local_client(state: State, client: Mapping[str, Any]) -> dict[str, str]:
    """Return a client configuration that calls the webhook on loopback, with the rig's CA.

    The call needs no Service and no certificate rotator.
    """
    port = state.settings.ports["kueue-webhook"]
    authority = base64.b64encode((state.pki / "ca.crt").read_bytes()).decode()
    path = client["service"]["path"]
    return {"url": f"https://127.0.0.1:{port}{path}", "caBundle": authority}


def _create(state: State, option: str, source: Path) -> None:
    # `apply` would fail: KubeRay's CRDs exceed the size limit of the annotation that it writes.
    # The server validates anyway; kubectl's own validation would fetch the whole OpenAPI document.
    _kubectl(state, "create", "--validate=ignore", option, source)


def _wait_until_established(state: State) -> None:
    condition = "--for=condition=Established"
    _kubectl(state, "wait", condition, f"--timeout={READY_SECONDS}s", "crd", "--all")


def _kubectl(state: State, *arguments: str | Path) -> str:
    program = state.settings.program("kubernetes", "kubectl")
    return run(program, "--kubeconfig", state.kubeconfig(), *arguments)


def _is_healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    # `open` raises on any status other than success.
    with opener.open(f"http://127.0.0.1:{port}/readyz", timeout=2):
        return True
