"""Failures that no stage expected, as StageErrors: one line and a reason each."""

from __future__ import annotations

import os
import re
import traceback

from tuneyard.errors import StageError
from tuneyard_trainer.worker import is_host_memory, is_lost_peer

MOST_CHARACTERS = 1000
"""The longest message; the pod's log has the whole message."""

MEMORY_ADVICE = (
    "Lower training.microBatchTokens or data.maxLength, set training.gradientCheckpointing: true, "
    "use adapter.qlora, or give each worker more memory: on a cluster, raise compute.memory."
)


def last_line(error: BaseException) -> str:
    """Return the last line of a traceback and its place: `KeyError: 'text' (rows.py:42)`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return text[:MOST_CHARACTERS] + where


def out_of_memory(error: BaseException, stage: str) -> StageError | None:
    """Return the StageError of memory that ran out on the GPU or the host; None for other errors.

    It is not retried, since the same plan would run out of memory again.
    """
    name = type(error).__name__
    on_gpu = name == "OutOfMemoryError" and type(error).__module__.partition(".")[0] == "torch"
    on_host = is_host_memory(error)
    if not (on_gpu or on_host):
        return None
    lines = str(error).strip().splitlines()
    return StageError(
        "OutOfMemory",
        f"{'the GPU' if on_gpu else 'the worker'} ran out of memory in stage {stage}"
        + (f": {lines[0][:300]}" if lines else "."),
        advice=MEMORY_ADVICE,
    )


def unexpected(error: BaseException) -> StageError:
    """Return the StageError of an error that no stage raises: a lost worker, or a defect.

    The error of the lost worker takes precedence over the errors of the workers that lost it.
    """
    if is_lost_peer(error):
        return StageError(
            "WorkerDied", f"another worker was lost: {last_line(error)}", retryable=True
        )
    return StageError(
        "TrainerError",
        f"the trainer failed unexpectedly: {last_line(error)}",
        advice="Read the workers' logs: `tuneyard logs NAME --worker`, or the folder logs of the "
        "output.",
    )


_HOST = re.compile(r"hostname='([^']+)'")
_MEMORY = re.compile(r"[\d.]+\wB used / [\d.]+\wB limit")


def unexplained(error: Exception) -> StageError:
    """Return the StageError of a worker group that ended without an event.

    The group was killed, ran out of memory, or was lost with its node. `error`: the error that Ray
    raised.
    """
    text = str(error)
    if "running low on memory" in text:  # Ray's memory monitor acts before the kernel's
        host, memory = _HOST.search(text), _MEMORY.search(text)
        pod = "container ray-worker of pod " if "KUBERNETES_SERVICE_HOST" in os.environ else ""
        return StageError(
            "OutOfMemory",
            f"Ray ended a training worker: {pod}{host[1] if host else 'its machine'} ran out of "
            f"memory{f', {memory[0]}' if memory else ''}.",
            advice=MEMORY_ADVICE,
        )
    return StageError(
        "WorkerDied",
        f"the training workers ended and reported no error: {last_line(error)}",
        advice="If memory ran out, lower training.microBatchTokens or data.maxLength.",
        retryable=True,
    )
