"""What went wrong, in one line: names for failures that no stage expected."""

from __future__ import annotations

import os
import re
import traceback

from tuneyard.errors import StageError

MOST_CHARACTERS = 1000
"""Of a message; the whole of it stands in the pod's logs."""

_LOST_PEER = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")
MEMORY_ADVICE = (
    "Lower training.microBatchTokens or data.maxLength, set training.gradientCheckpointing: true, "
    "use adapter.qlora, or give each worker more memory: on a cluster, raise compute.memory."
)


def last_line(error: BaseException) -> str:
    """`KeyError: 'text' (intake.py:42)`: what a traceback ends with, and where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return said[:MOST_CHARACTERS] + where


def out_of_memory(error: BaseException, stage: str) -> StageError | None:
    """The StageError for memory that ran out on the GPU or the host; None for anything else. The
    same plan would run out again, so it is not retried."""
    name = type(error).__name__
    on_gpu = name == "OutOfMemoryError" and type(error).__module__.partition(".")[0] == "torch"
    on_host = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    if not (on_gpu or on_host):
        return None
    said = str(error).strip().splitlines()
    return StageError(
        "OutOfMemory",
        f"{'the GPU' if on_gpu else 'the worker'} ran out of memory in stage {stage}"
        + (f": {said[0][:300]}" if said else "."),
        advice=MEMORY_ADVICE,
    )


def unexpected(error: BaseException) -> StageError:
    """A defect, or another worker that is gone: that one's word then counts for more."""
    if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _LOST_PEER):
        return StageError(
            "WorkerDied", f"another worker was lost: {last_line(error)}", retryable=True
        )
    return StageError(
        "TrainerError",
        f"the trainer failed unexpectedly: {last_line(error)}",
        advice="The worker's log in /tmp/ray/session_latest/logs has the whole story.",
    )


_HOST = re.compile(r"hostname='([^']+)'")
_MEMORY = re.compile(r"[\d.]+\wB used / [\d.]+\wB limit")


def without_a_word(error: Exception) -> StageError:
    """A worker group that ended silently, as Ray tells it: killed, out of memory, or lost with its
    node."""
    said = str(error)
    if "running low on memory" in said:  # Ray's memory monitor, ahead of the kernel's
        host, memory = _HOST.search(said), _MEMORY.search(said)
        pod = "container ray-worker of pod " if "KUBERNETES_SERVICE_HOST" in os.environ else ""
        return StageError(
            "OutOfMemory",
            f"a training worker was ended: {pod}{host[1] if host else 'its machine'} ran out of "
            f"memory{f', {memory[0]}' if memory else ''}.",
            advice=MEMORY_ADVICE,
        )
    return StageError(
        "WorkerDied",
        f"the training workers ended without a word: {last_line(error)}",
        advice="If memory ran out, lower training.microBatchTokens or data.maxLength.",
        retryable=True,
    )
