"""Functions for pools. Each process imports this module, so it imports no torch."""

from __future__ import annotations

import os
import signal
import time

from tuneyard.errors import StageError


class TwoPartsError(Exception):
    """An error that pickles, and whose pickle cannot be read."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def double(batch: int) -> int:
    return 2 * batch


def raise_two_parts(batch: int) -> int:
    if batch == 20:
        raise TwoPartsError("a fault", "row 20")
    return batch


def refuse(batch: int) -> int:
    if batch == 20:
        raise StageError("ChatTemplate", "no row fits.", advice="Repair the rows.")
    return batch


def end_by_kill(batch: int) -> int:
    if batch == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def pid_of(batch: int) -> int:
    time.sleep(0.001)
    return os.getpid()
