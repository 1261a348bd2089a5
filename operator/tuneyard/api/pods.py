"""Constants that the operator and the pods of a job must agree on.

Standard library only: the preStop hook of a pod imports this module.
"""

from __future__ import annotations

from typing import Final

OUTCOME_PREFIX: Final = "TUNEYARD-OUTCOME "
"""Starts the log line that holds the driver's `Outcome` as JSON. KubeRay copies the tail of the log
into the RayJob, where the operator finds the line."""

STALE_ATTEMPT: Final = "StaleAttempt"
"""The reason of an attempt that ended because of a newer one."""

PROGRESS_URL_VARIABLE: Final = "TUNEYARD_PROGRESS_URL"
"""Environment variable: the URL that the driver posts progress to. Unset: no progress is posted."""
TOKEN_FILE_VARIABLE: Final = "TUNEYARD_TOKEN_FILE"  # noqa: S105  a name
"""Environment variable: the path of the bearer token for these posts."""
CA_VARIABLE: Final = "TUNEYARD_CA"
"""Environment variable: the status server's certificate authority, in PEM."""
WORKERS_VARIABLE: Final = "TUNEYARD_WORKERS"
"""Environment variable: the number of workers of an elastic attempt that has fewer than
`compute.workers`. Unset: all of them."""

PREPARE_OPTION: Final = "--prepare"
"""Option of the driver: run only the leading stages that need no GPU, without Ray, and end."""
UNKNOWN_OPTION: Final = 2
"""Exit code of a driver that does not know an option: argparse's, which the driver itself never
returns. An image of an earlier release does not know PREPARE_OPTION."""

CLAIMS_FOLDER: Final = "/mnt/pvc"
"""A pod mounts each PersistentVolumeClaim at `CLAIMS_FOLDER/<claim>`."""

GRACE_SECONDS: Final = 120
"""Grace period of a pod, from its deletion to SIGKILL: time for a last checkpoint."""
DRAIN_SECONDS: Final = GRACE_SECONDS - 15
"""Longest wait of the preStop hook, whose time is part of the grace period. The other 15 s are left
for the end after SIGTERM."""


CACHE_NAME: Final = ".tuneyard-cache"
"""The folder of the cache on a claim. No source and no output may lie in it: the files there belong
to jobs with other credentials."""


def cache_folder(claim: str) -> str:
    """Return the folder of the cache on a claim, as pods see it."""
    return f"{CLAIMS_FOLDER}/{claim}/{CACHE_NAME}"


def stage_folder(stage: str) -> str:
    """Return the folder of a stage's files, relative to the output: `result` for the export stage,
    whose files users load."""
    return "result" if stage == "export" else f"stages/{stage}"


LOGS_FOLDER: Final = "logs"
"""The folder of the kept logs, relative to the output."""
DRIVER_LOG: Final = "driver"
WORKER_LOG: Final = "worker-"
"""The name of the driver's log, and how the name of a worker's log begins: its rank follows."""


def log_folder(attempt: int) -> str:
    """Return the folder of an attempt's logs, relative to the output: `logs/attempt-3`."""
    return f"{LOGS_FOLDER}/attempt-{attempt}"


def log_file(attempt: int, name: str) -> str:
    """Return the file of a log, relative to the output. `name`: `driver` or `worker-RANK`."""
    return f"{log_folder(attempt)}/{name}.log"


def model_uri(output: str) -> str:
    """Return the URI of the model that a job with this output URI exports."""
    return f"{output.rstrip('/')}/{stage_folder('export')}/model"
