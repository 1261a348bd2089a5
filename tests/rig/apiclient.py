"""A minimal API client for the supervisor, which runs on the standard library alone."""

from __future__ import annotations

import json
import ssl
import urllib.request
from typing import Any

from rig.state import State

TIMEOUT_SECONDS = 10


class ApiClient:
    """A client of the rig's API server, with the administrator's certificate."""

    def __init__(self, state: State) -> None:
        self._url = state.settings.url
        context = ssl.create_default_context(cafile=str(state.pki / "ca.crt"))
        context.load_cert_chain(state.pki / "admin.crt", state.pki / "admin.key")
        # An HTTP proxy of the environment must not receive requests to the rig.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def text(self, path: str) -> str:
        return self._request("GET", path, None)

    def get(self, path: str) -> Any:
        return json.loads(self._request("GET", path, None))

    def put(self, path: str, body: object) -> None:
        self._request("PUT", path, json.dumps(body).encode())

    def _request(self, method: str, path: str, body: bytes | None) -> str:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, body, headers, method=method)
        with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read()
        return content.decode()
