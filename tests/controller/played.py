"""A status server over TLS in this process, in front of a played cluster with one running job."""

from __future__ import annotations

import asyncio
import copy
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from rig.ports import Reservation

from tuneyard.api.progress import Post
from tuneyard.controller.certificates import ServerCertificates
from tuneyard.controller.cluster import ApiError, Cluster, Key
from tuneyard.controller.reconciler import Reconciler
from tuneyard.controller.settings import Settings
from tuneyard.controller.status_server import StatusServer
from tuneyard.manifests.manifest import parse
from tuneyard.planning.plan import plan_job
from tuneyard.rendering.names import audience, plan_digest
from tuneyard_trainer.pod.reporter import StatusClient

Object = dict[str, Any]

KEY = Key("FineTuneJob", "team", "job")
GOOD = "a.good.token"
"""The token of the job's head pod; every other token is invalid."""
STATUS = {
    "phase": "Running",
    "planDigest": "sha256:0",
    "attempts": [{"number": 1, "rayJob": "job-1", "startedAt": "2026-11-21T12:00:00Z"}],
}
POST = {
    "trainerStatus": {"progressPercentage": 7},
    "tuneyard": {"attempt": 1, "stage": "sft", "step": 7, "totalSteps": 100},
}


class PlayedCluster:
    """The requests that a status server and its certificates need."""

    def __init__(self) -> None:
        self.secrets: dict[str, Object] = {}
        self.now: datetime | None = None
        """The time for the operator's certificates; None: now."""
        self.is_down = False
        """Whether the plan cannot be read."""
        self.num_reviews = self.num_reviewing = self.most_reviewing = 0
        self.review_seconds = 0.0
        self.role = ""
        """The role that the label of the job's pod names. "": it has no such label."""
        self.body: Object = {
            "apiVersion": "tuneyard.io/v1alpha1",
            "kind": KEY.kind,
            "metadata": {
                "name": KEY.name,
                "namespace": KEY.namespace,
                "uid": "u",
                "resourceVersion": "1",
            },
            "spec": {
                "model": {"uri": "pvc://models/base"},
                "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
                "output": {"uri": "pvc://models/tuned"},
            },
        }
        digest = plan_digest(plan_job(parse(self.body)))
        self.body["status"] = {**STATUS, "planDigest": digest}

    async def secret(self, _: str, name: str) -> Object | None:
        return copy.deepcopy(self.secrets.get(name))

    async def create_secret(self, _: str, secret: Object) -> Object:
        name = secret["metadata"]["name"]
        if name in self.secrets:
            raise ApiError(409, "AlreadyExists", name)
        return self._store(secret, "1")

    async def replace_secret(self, _: str, secret: Object) -> Object:
        stored = self.secrets[secret["metadata"]["name"]]["metadata"]["resourceVersion"]
        if secret["metadata"]["resourceVersion"] != stored:
            raise ApiError(409, "Conflict", "the Secret has changed")
        return self._store(secret, str(int(stored) + 1))

    def _store(self, secret: Object, version: str) -> Object:
        metadata = {**secret["metadata"], "resourceVersion": version}
        stored = {**copy.deepcopy(secret), "metadata": metadata}
        self.secrets[metadata["name"]] = stored
        return stored

    async def review_token(self, token: str, expected: str) -> Object:
        self.num_reviews += 1
        self.num_reviewing += 1
        self.most_reviewing = max(self.most_reviewing, self.num_reviewing)
        await asyncio.sleep(self.review_seconds)
        self.num_reviewing -= 1
        if not token.startswith(GOOD) or expected != audience(KEY.kind, KEY.namespace, KEY.name):
            return {"authenticated": False}
        user = {
            "username": f"system:serviceaccount:{KEY.namespace}:default",
            "extra": {"authentication.kubernetes.io/pod-name": ["job-1-head"]},
        }
        return {"authenticated": True, "audiences": [expected], "user": user}

    async def pod(self, namespace: str, name: str) -> Object | None:
        labels = {"tuneyard.io/kind": KEY.kind, "tuneyard.io/job": KEY.name}
        labels["tuneyard.io/attempt"] = "1"
        if self.role:
            labels["tuneyard.io/role"] = self.role
        return {"metadata": {"name": name, "namespace": namespace, "uid": "p", "labels": labels}}

    async def job(self, key: Key) -> Object | None:
        return self.body if key == KEY else None

    async def config_map(self, *_: str) -> Object | None:
        if self.is_down:
            raise ApiError(500, "InternalError", "the API server is down")
        return None


class Served:
    """A listening status server."""

    def __init__(self, cluster: PlayedCluster, certificates: ServerCertificates) -> None:
        self.cluster, self.certificates = cluster, certificates
        self.reconciler = Reconciler(cast("Cluster", cluster), Settings())
        self.server = StatusServer(cast("Cluster", cluster), self.reconciler, lambda: True)
        self.port = 0

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}{self.path}"

    path = f"/v1alpha1/namespaces/{KEY.namespace}/finetunejobs/{KEY.name}/progress"

    def client_context(self) -> ssl.SSLContext:
        """Return a TLS context that trusts today's authorities."""
        return ssl.create_default_context(cadata=self.certificates.ca)

    def client(self, folder: Path, token: str = GOOD) -> StatusClient:
        """Return the client of a pod that was started now: it trusts today's authorities."""
        file = folder / "token"
        if not file.exists() or file.read_text() != token:  # another client may be reading it
            file.write_text(token)
        return StatusClient(self.url, file, self.certificates.ca)


async def send(client: StatusClient, post: Object = POST) -> bool:
    """Send a post as a pod does; return whether the pod shall stop."""
    response = await asyncio.to_thread(client.send, Post.model_validate(post))
    return response.stop


def certificates_of(cluster: PlayedCluster) -> ServerCertificates:
    return ServerCertificates(
        cast("Cluster", cluster),
        "system",
        "tls",
        "https://127.0.0.1:8443",
        clock=lambda: cluster.now or datetime.now(UTC),
    )


@asynccontextmanager
async def served(cluster: PlayedCluster) -> AsyncIterator[Served]:
    """Run a status server with the certificates of the cluster's Secret."""
    certificates = certificates_of(cluster)
    await certificates.refresh()
    running = Served(cluster, certificates)
    with Reservation() as ports:
        running.port = await running.server.start(ports.take(), certificates.context)
        try:
            yield running
        finally:
            await running.server.close()
