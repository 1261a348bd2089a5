"""An admission webhook that fails: a ValidatingWebhookConfiguration and the server it points to."""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.controller.scene import Scene
from tests.tls import write_certificate

WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
TIMEOUT_SECONDS = 1


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Silent(_Handler):
    def do_POST(self) -> None:
        threading.Event().wait(10 * TIMEOUT_SECONDS)


@contextmanager
def failing_webhook(scene: Scene, job: str, folder: Path, *, silent: bool) -> Iterator[str]:
    """Let a webhook that answers 500, or `silent` nothing, decide on the RayJobs of a job; yield
    its name."""
    certificate, key = write_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Silent if silent else _Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    name = f"{job}.{scene.namespace}.example.com"
    webhook = {
        "name": name,
        "clientConfig": {
            "url": f"https://127.0.0.1:{server.server_address[1]}/",
            "caBundle": base64.b64encode(certificate.read_bytes()).decode(),
        },
        "rules": [
            {
                "apiGroups": ["ray.io"],
                "apiVersions": ["v1"],
                "resources": ["rayjobs"],
                "operations": ["CREATE"],
            }
        ],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": scene.namespace}},
        "objectSelector": {"matchLabels": {"tuneyard.io/job": job}},
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": TIMEOUT_SECONDS,
    }
    scene.api("POST", WEBHOOKS, {"metadata": {"name": name}, "webhooks": [webhook]})
    try:
        yield name
    finally:
        scene.api("DELETE", f"{WEBHOOKS}/{name}")
        server.shutdown()
        server.server_close()
