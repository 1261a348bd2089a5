"""The API server of operator_burst.py: a fresh one from the rig, and a client for it."""

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
"""A watch's longest line; aiohttp's default is shorter than some objects."""

Object = dict[str, Any]

_BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.monotonic() - _BEGAN:5.0f} s] {text}", file=sys.stderr, flush=True)


class Api:
    """Just enough of a client, with as little work of its own per request as Python allows."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session

    async def call(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> Object:
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": kind}
        url = self._url + path
        async with self._session.request(method, url, data=data, headers=headers) as answer:
            text = await answer.text()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status} {text[:500]}")
            value: Object = json.loads(text)
            return value

    async def create(self, path: str, body: Object) -> None:
        await self.call("POST", path, body)

    async def write_status(self, path: str, status: Object) -> None:
        await self.call(
            "PATCH", f"{path}/status", {"status": status}, "application/merge-patch+json"
        )

    async def has(self, query: str) -> bool:
        return bool((await self.call("GET", query))["items"])

    async def watch(self, path: str) -> AsyncIterator[Object]:
        """Every object that is created or changed from now on. The API server ends the watch of
        whoever falls behind, so it is taken up again where it ended."""
        version = (await self.call("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"]
        timeout = aiohttp.ClientTimeout(total=None)
        while True:
            query = f"{path}?watch=1&resourceVersion={version}"
            with suppress(aiohttp.ClientPayloadError):
                async with self._session.get(
                    self._url + query, timeout=timeout, read_bufsize=LINE_BYTES
                ) as answer:
                    if answer.status != 200:  # 429: a new kind's storage is not there yet
                        await asyncio.sleep(0.1)
                        continue
                    async for line in answer.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            raise RuntimeError(
                                f"a watch of the benchmark failed: {event['object']}"
                            )
                        version = event["object"]["metadata"]["resourceVersion"]
                        yield event["object"]
            say(f"  the watch of {path.rpartition('/')[2]} ended and goes on")

    async def writes(self) -> Counter[str]:
        """How often each kind of object was written since the server started, by anyone."""
        async with self._session.get(f"{self._url}/metrics") as answer:
            text = await answer.text()
        count: Counter[str] = Counter()
        for labels, value in re.findall(r"^apiserver_request_total\{(.*)\} (\S+)$", text, re.M):
            label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if label["verb"] in ("POST", "PUT", "PATCH", "APPLY", "DELETE"):
                what = "/".join(filter(None, (label["resource"], label["subresource"])))
                count[f"{label['verb']} {what}"] += int(float(value))
        return count


@asynccontextmanager
async def connected(kubeconfig: Path) -> AsyncIterator[Api]:
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
    """A fresh API server with Tuneyard's and KubeRay's kinds and an empty namespace."""
    say("a fresh API server")
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
