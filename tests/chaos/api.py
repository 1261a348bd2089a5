"""Requests to an API server that may be down."""

from __future__ import annotations

import time
from typing import Any

import urllib3.exceptions

from tests.controller.scene import Api, RefusedError

DOWN_SECONDS = 300.0
"""The longest time that an API server may be down."""
RETRY_SECONDS = 0.3
STARTING = (429, 500, 503, 504)
"""The responses of an API server that starts."""


class PatientApi(Api):
    """Requests that are repeated while the API server is down."""

    def __call__(self, method: str, path: str, body: Any = None, type_: str = "") -> Any:
        deadline = time.monotonic() + DOWN_SECONDS
        repeated = False
        while True:
            try:
                return super().__call__(method, path, body, type_)
            except urllib3.exceptions.HTTPError:
                if time.monotonic() > deadline:
                    raise
            except RefusedError as refused:
                if repeated and method == "POST" and refused.status == 409:
                    return body  # the first request was carried out
                if repeated and method == "DELETE" and refused.status == 404:
                    return {}
                if refused.status not in STARTING or time.monotonic() > deadline:
                    raise
            repeated = True
            time.sleep(RETRY_SECONDS)
