"""KubeRay and Kueue, run as plain processes beside the control plane.

They hold the administrator's rights, so their own RBAC is not exercised here.
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
# Read even where no metrics are served; Kueue has no option for it.
METRICS_CERTIFICATES = Path("/etc/kueue/metrics/certs")
_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def add_kuberay_definitions(state: State) -> None:
    _create(state, "-f", Path(state.settings.program("kuberay-crds", "bases")))
    _wait_until_established(state)


def start_kuberay(state: State, servers: Servers) -> None:
    """Start KubeRay, whose definitions must be established: it gives up on unknown kinds."""
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

    Only where there is a node: one of the paths it reads is fixed, and lies in the node's own /etc.
    """
    _create(state, "-k", Path(state.settings.program("kueue-crds", "crd")))
    _wait_until_established(state)
    _serve_conversions_locally(state, api)
    certificates = _write_webhook_certificates(state)
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
    # Only now: a webhook that cannot be reached refuses every object it watches.
    _create(state, "-f", Path(state.settings.program("kueue-crds", "webhook")) / "manifests.yaml")
    _serve_admission_locally(state, api)


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


def _write_webhook_certificates(state: State) -> Path:
    folder = state.root / "kueue-webhook"
    folder.mkdir()
    for suffix in ("crt", "key"):
        (folder / f"tls.{suffix}").symlink_to(state.pki / f"webhook.{suffix}")
    return folder


def _serve_conversions_locally(state: State, api: ApiClient) -> None:
    for definition in api.get(_DEFINITIONS)["items"]:
        conversion = definition["spec"].get("conversion", {})
        if "kueue" in definition["metadata"]["name"] and "webhook" in conversion:
            webhook = conversion["webhook"]
            webhook["clientConfig"] = _local(state, webhook["clientConfig"])
            api.put(f"{_DEFINITIONS}/{definition['metadata']['name']}", definition)


def _serve_admission_locally(state: State, api: ApiClient) -> None:
    for kind in ("mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
        for configuration in api.get(f"{_ADMISSION}/{kind}")["items"]:
            for webhook in configuration["webhooks"]:
                webhook["clientConfig"] = _local(state, webhook["clientConfig"])
            api.put(f"{_ADMISSION}/{kind}/{configuration['metadata']['name']}", configuration)


def _local(state: State, client: Mapping[str, Any]) -> dict[str, str]:
    """The same webhook, at its port on loopback: neither needs a node nor a certificate rotator."""
    port = state.settings.ports["kueue-webhook"]
    authority = base64.b64encode((state.pki / "ca.crt").read_bytes()).decode()
    path = client["service"]["path"]
    return {"url": f"https://127.0.0.1:{port}{path}", "caBundle": authority}


def _create(state: State, option: str, source: Path) -> None:
    # Not `apply`: KubeRay's definitions exceed what fits into the annotation that it writes. And
    # kubectl's own validation would fetch the whole OpenAPI document; the server validates too.
    _kubectl(state, "create", "--validate=ignore", option, source)


def _wait_until_established(state: State) -> None:
    condition = "--for=condition=Established"
    _kubectl(state, "wait", condition, f"--timeout={READY_SECONDS}s", "crd", "--all")


def _kubectl(state: State, *arguments: str | Path) -> str:
    program = state.settings.program("kubernetes", "kubectl")
    return run(program, "--kubeconfig", state.kubeconfig(), *arguments)


def _is_healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    # Any answer but a success raises.
    with opener.open(f"http://127.0.0.1:{port}/readyz", timeout=2):
        return True
