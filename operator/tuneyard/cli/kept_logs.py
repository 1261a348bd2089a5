"""Read the logs that a job's pods left in its output."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from tuneyard.api.pods import DRIVER_LOG, LOGS_FOLDER, WORKER_LOG, log_file, log_folder
from tuneyard.cli.errors import RemoteError
from tuneyard.cli.jobs import JobView
from tuneyard.cli.views import plain

EXTRAS: Mapping[str, str] = {"s3": "s3", "gs": "gcs"}
"""The extra of Tuneyard that reads a scheme; `trainer` reads the others."""
IMAGE = "busybox"
MOUNT = "/output"
_ATTEMPT = re.compile(r"attempt-(\d+)")


def read(job: JobView, role: str, attempt: int | None) -> tuple[str, Iterator[str]]:
    """Return where the kept logs of an attempt are, and their lines. `role`: driver or worker;
    `attempt` None: the newest one with such a log.

    Raises RemoteError if there is none, or if this machine cannot reach the output; the iterator
    raises it too.
    """
    scheme, _, rest = job.output_uri.partition("://")
    if scheme == "pvc":
        raise RemoteError(_in_volume(job, rest, role, attempt))
    output = job.output_uri.rstrip("/")
    with _as_remote_errors(f"{output}/{LOGS_FOLDER}", scheme):
        import fsspec

        fs, root = fsspec.core.url_to_fs(output, use_listings_cache=False)
        kept = _kept(fs, root, role)
    chosen = attempt if attempt is not None else max(kept, default=0)
    if not kept.get(chosen):
        raise RemoteError(_none(job, role, attempt, sorted(kept)))
    folder = f"{output}/{log_folder(chosen)}"

    def lines() -> Iterator[str]:
        for path in kept[chosen]:  # one log at a time: a job may have hundreds of workers
            with _as_remote_errors(folder, scheme):
                text = fs.cat_file(path).decode(errors="replace")
            prefix = f"{PurePosixPath(path).stem}: " if role == "worker" else ""
            yield from (prefix + line for line in text.splitlines())

    return folder, lines()


@contextmanager
def _as_remote_errors(folder: str, scheme: str) -> Iterator[None]:
    """Turn the errors of a store into RemoteErrors."""
    try:
        yield
    except ImportError as error:
        extra = EXTRAS.get(scheme, "trainer")
        raise RemoteError(
            f"the logs in {folder} cannot be read: {error}: install tuneyard[{extra}]"
        ) from error
    except Exception as error:  # each kind of store has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RemoteError(
            f"the logs in {folder} cannot be read: {reason}: give this command access to the store "
            f"by the environment, as the store's own tools expect it"
        ) from error


def _kept(fs: Any, root: str, role: str) -> dict[int, list[str]]:
    """Return the paths of the kept logs of a role by attempt."""
    begin = DRIVER_LOG if role == "driver" else WORKER_LOG
    found: dict[int, list[str]] = {}
    for path in fs.find(f"{root.rstrip('/')}/{LOGS_FOLDER}"):
        place = PurePosixPath(path)
        number = _ATTEMPT.fullmatch(place.parent.name)
        if number and place.name.startswith(begin) and place.suffix == ".log":
            found.setdefault(int(number[1]), []).append(path)
    return {number: sorted(paths, key=_rank) for number, paths in found.items()}


def _rank(path: str) -> int:
    rank = PurePosixPath(path).stem.removeprefix(WORKER_LOG)
    return int(rank) if rank.isdecimal() else 0


def _none(job: JobView, role: str, attempt: int | None, kept: Sequence[int]) -> str:
    which = f"attempt {attempt} of {job.name}" if attempt is not None else job.name
    message = f"{plain(job.output_uri)}/{LOGS_FOLDER} holds no log of the {role} of {which}"
    if kept:
        return f"{message}: choose --attempt {' or '.join(map(str, kept))}"
    return f"{message}: it ended before it could write there"


def _in_volume(job: JobView, rest: str, role: str, attempt: int | None) -> str:
    """Return the command that reads a log in a volume, which only pods can reach."""
    claim, _, path = rest.partition("/")
    number = attempt if attempt is not None else job.newest_attempt
    file = log_file(number, DRIVER_LOG if role == "driver" else f"{WORKER_LOG}*")
    name = f"{job.name}-logs"[:63].rstrip("-")
    # tail begins each of several files with its name.
    script = f"tail -n +1 {shlex.quote(f'{MOUNT}/{path}'.rstrip('/'))}/{file}"
    container = {
        "name": name,
        "image": IMAGE,
        "command": ["sh", "-c", script],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "output", "mountPath": MOUNT, "readOnly": True}],
    }
    volume = {"claimName": claim, "readOnly": True}
    spec = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "output", "persistentVolumeClaim": volume}],
    }
    overrides = json.dumps({"spec": spec}, separators=(",", ":"))
    words = ["kubectl", "run", name, "-n", job.namespace, f"--image={IMAGE}", "--restart=Never"]
    command = shlex.join([*words, "--rm", "-i", "--quiet", f"--overrides={overrides}"])
    uri = plain(job.output_uri.rstrip("/"))
    return (
        f"the logs are kept in {uri}/{file}, which only a pod can read: "
        f"read them with this command, or with another image than {IMAGE}\n\n{command}\n"
    )
