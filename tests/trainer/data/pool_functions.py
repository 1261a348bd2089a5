"""Functions for pools. Each process imports this module, so it imports no torch.

The process of the test works too, and the first batch is never its own.
"""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import parent_process

from tuneyard.errors import StageError


class TwoPartsError(Exception):
    """An error that pickles, and whose pickle cannot be read."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def double(batch: int) -> int:
    return 2 * batch


def refuse(batch: int) -> int:
    if batch == 20:
        raise StageError("ChatTemplate", "no row fits.", advice="Repair the rows.")
    return batch


def refuse_elsewhere(batch: int) -> int:
    """Raise an error that does not pickle, in every process but that of the test."""
    if parent_process() is not None:
        raise TwoPartsError("a fault", f"row {batch}")
    return batch


def end_by_kill(batch: int) -> int:
    """End the process, unless it is that of the test."""
    if parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def tokenizer_threads(batch: int) -> str:
    """Return what tokenizers read before each of their calls."""
    return os.environ["TOKENIZERS_PARALLELISM"]


def pid_of(batch: int) -> int:
    time.sleep(0.001)
    return os.getpid()
