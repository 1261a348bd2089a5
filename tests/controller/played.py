"""KubeRay, played: gives RayJobs the statuses of a run, where no KubeRay and no node is.

Its requests go straight to the API server, past any proxy that the operator under test is behind.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from kubernetes import client, config

POLL_SECONDS = 0.1

Status = Mapping[str, Any]

STARTING = {"jobDeploymentStatus": "Initializing", "rayClusterName": "played"}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "played"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def failed(reason: str, message: str, *, retryable: bool) -> Status:
    """The end of a driver that could say why."""
    failure = {"reason": reason, "message": message}
    ending = {"state": "Failed", "failure": failure, "retryable": retryable}
    return {
        "jobDeploymentStatus": "Failed",
        "jobStatus": "FAILED",
        "reason": "AppFailed",
        "message": f"TUNEYARD-ENDING {json.dumps(ending)}",
    }


def every_attempt_succeeds(attempt: int) -> list[Status]:
    return [STARTING, RUNNING, SUCCEEDED]


class PlayedKubeRay:
    """Takes each RayJob of a namespace through a run; a context manager."""

    def __init__(
        self,
        kubeconfig: Path,
        namespace: str,
        run_of: Callable[[int], list[Status]] = every_attempt_succeeds,
    ) -> None:
        """`run_of`: the statuses that an attempt's RayJob goes through, by its number."""
        connect: Callable[[str], client.ApiClient] = config.new_client_from_config
        self._api: Any = client.CustomObjectsApi(connect(str(kubeconfig)))
        self._where = ("ray.io", "v1", namespace, "rayjobs")
        self._run_of = run_of
        self._stop = threading.Event()
        self._steps: dict[str, int] = {}
        self._thread = threading.Thread(target=self._play, daemon=True)
        self.seen: dict[str, set[str]] = {}
        """The uids of every RayJob that there ever was, by name: more than one is one too many."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _play(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            for item in self._api.list_namespaced_custom_object(*self._where)["items"]:
                self._advance(item)

    def _advance(self, item: Any) -> None:
        metadata = item["metadata"]
        self.seen.setdefault(metadata["name"], set()).add(metadata["uid"])
        run = self._run_of(int(metadata["labels"]["tuneyard.io/attempt"]))
        step = self._steps.get(metadata["uid"], 0)
        if step == len(run) or "deletionTimestamp" in metadata:
            return
        try:
            self._api.patch_namespaced_custom_object_status(
                *self._where, metadata["name"], {"status": run[step]}
            )
        except client.ApiException as error:
            if error.status not in (404, 409):
                raise
        else:
            self._steps[metadata["uid"]] = step + 1
