"""A new API server from the rig and a minimal client for it, for operator_burst.py."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from rig.rig import Rig, bring_up, take_down  # noqa: E402

NAMESPACE = "burst"
LINE_BYTES = 16 << 20
"""The longest line of a watch; aiohttp's default is shorter than some objects."""

Object = dict[str, Any]

_STARTED = time.monotonic()


def report(text: str) -> None:
    """Print a line of progress, with the seconds since the benchmark started."""
    print(f"[{time.monotonic() - _STARTED:5.0f} s] {text}", file=sys.stderr, flush=True)


class Api:
    """A client with little work per request, so that the measured rates are the API server's."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session

    async def call(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> Object:
        """Send a request and return the response's object; raise RuntimeError if it fails."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": kind}
        url = self._url + path
        async with self._session.request(method, url, data=data, headers=headers) as response:
            text = await response.text()
            if response.status >= 300:
                raise RuntimeError(f"{method} {path}: {response.status} {text[:500]}")
            value: Object = json.loads(text)
            return value

    async def create(self, path: str, body: Object) -> None:
        await self.call("POST", path, body)

    async def write_status(self, path: str, status: Object) -> None:
        await self.call(
            "PATCH", f"{path}/status", {"status": status}, "application/merge-patch+json"
        )

    async def has(self, query: str) -> bool:
        """Return whether a list request returns any object."""
        return bool((await self.call("GET", query))["items"])

    async def watch(self, path: str) -> AsyncIterator[Object]:
        """Yield every object that is created, changed or deleted from now on.

        The API server ends the watch of a slow client. The watch then continues at the last
        resource version.
        """
        version = (await self.call("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"]
        timeout = aiohttp.ClientTimeout(total=None)
        while True:
            query = f"{path}?watch=1&resourceVersion={version}"
            with suppress(aiohttp.ClientPayloadError):
                async with self._session.get(
                    self._url + query, timeout=timeout, read_bufsize=LINE_BYTES
                ) as response:
                    if response.status != 200:  # 429: a new kind's storage is not ready yet
                        await asyncio.sleep(0.1)
                        continue
                    async for line in response.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            raise RuntimeError(f"the watch of {path} failed: {event['object']}")
                        version = event["object"]["metadata"]["resourceVersion"]
                        yield event["object"]
            report(f"  the watch of {path.rpartition('/')[2]} ended and continues")

    async def writes(self) -> Counter[str]:
        """Return how often each kind of object was written since the server started, by any client.

        Keys are a verb and a resource, for example "PATCH finetunejobs/status".
        """
        count: Counter[str] = Counter()
        for label, value in await self.request_counts():
            if label["verb"] in ("POST", "PUT", "PATCH", "APPLY", "DELETE"):
                resource = "/".join(filter(None, (label["resource"], label["subresource"])))
                count[f"{label['verb']} {resource}"] += value
        return count

    async def request_counts(self) -> list[tuple[dict[str, str], int]]:
        """Return the labels and the value of each count of requests since the server started."""
        async with self._session.get(f"{self._url}/metrics") as response:
            text = await response.text()
        found = re.findall(r"^apiserver_request_total\{(.*)\} (\S+)$", text, re.M)
        return [
            (dict(re.findall(r'(\w+)="([^"]*)"', labels)), int(float(value)))
            for labels, value in found
        ]


@asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[Api]:
    """Open a client with the certificates of a kubeconfig."""
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cafile=cluster["certificate-authority"])
    context.load_cert_chain(user["client-certificate"], user["client-key"])
    connector = aiohttp.TCPConnector(ssl=context, limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Api(cluster["server"], session)


@contextmanager
def api_server() -> Iterator[Rig]:
    """Start a new API server with the CRDs of Tuneyard and KubeRay and an empty namespace."""
    report("starting a new API server")
    rig = bring_up("control", kuberay="crds")
    try:
        for command in (
            ("apply", "--server-side", "--filename", str(ROOT / "crds")),
            ("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"),
            ("create", "namespace", NAMESPACE),
        ):
            kubectl = (rig.programs / "kubectl", "--kubeconfig", rig.kubeconfig, *command)
            subprocess.run(kubectl, check=True, stdout=subprocess.DEVNULL)
        yield rig
    finally:
        take_down(rig.state.root)
