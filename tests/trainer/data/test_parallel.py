"""Batches in several processes: the same output as in one, and errors that name their cause."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.data.test_prepare import Job, chat, chats
from tuneyard.api.cleaning import Clean
from tuneyard.errors import StageError
from tuneyard_trainer.data import batches, parallel, prepare
from tuneyard_trainer.data.parallel import Pool

BATCHES = range(40)


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


def error_of(function: Callable[[int], int], kind: type[Exception]) -> Exception:
    """Return the error of 40 batches in two processes."""
    with Pool(function, 2) as pool, pytest.raises(kind) as raised:
        list(pool.map(BATCHES))
    return raised.value


def test_results_are_in_the_order_of_the_batches() -> None:
    with Pool(double, 2) as pool:
        assert list(pool.map(BATCHES)) == [2 * batch for batch in BATCHES]


def test_few_batches_start_no_process() -> None:
    here: Pool[int, tuple[int, int]] = Pool(lambda batch: (batch, os.getpid()), 2)
    with here as pool:
        found = list(pool.map(range(parallel.ALONE)))
    assert found == [(batch, os.getpid()) for batch in range(parallel.ALONE)]


def test_an_error_that_does_not_pickle_is_named_and_is_no_lost_process() -> None:
    error = error_of(raise_two_parts, RuntimeError)
    assert str(error) == "TwoPartsError: a fault in row 20"


def test_an_error_of_a_stage_keeps_its_reason_and_advice() -> None:
    error = error_of(refuse, StageError)
    assert isinstance(error, StageError)
    assert (error.reason, error.advice) == ("ChatTemplate", "Repair the rows.")


def test_a_killed_process_is_named_and_the_stage_may_be_tried_again() -> None:
    error = error_of(end_by_kill, StageError)
    assert isinstance(error, StageError)
    assert error.reason == "WorkerDied"
    assert error.retryable
    assert "SIGKILL" in str(error)


ROWS = [
    *chats(30),
    *chats(5),
    chat("Ask\u00e9?", "\u6f22\u5b57 \U0001f600 a@b.example"),
    chat("Long.", "lamp " * 400),
    chat("Which lamp is so near to the others in the hall?", "The old lamp in the east hall."),
    chat("Which lamp is so near to the others in the hall?", "The old lamp in the east halls."),
    {"messages": [{"role": "user", "content": "No answer."}], "note": "x"},
    {"prompt": "Another layout?", "completion": "Yes.", "extra": 1},
    *chats(3),
    {"messages": "none", "other": 2},
]
CLEAN = Clean(duplicates="near", repair_encoding=True, quality=["repetition"])


def test_the_output_is_the_same_in_one_and_in_several_processes(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process imports transformers, so one job has all of it: rows that are invalid, too long,
    duplicates, repaired and held out."""
    monkeypatch.setattr(batches, "BATCH_ROWS", 4)
    monkeypatch.setattr(parallel, "ALONE", 1)
    found = []
    for processes in (1, 2):
        monkeypatch.setattr(prepare, "num_processes", lambda count=processes: count)
        folder = tmp_path / str(processes)
        folder.mkdir()
        job = Job(folder, tiny_model_dir)
        outcome = job.train(
            ROWS,
            max_length=150,
            on_overlength="split",
            on_invalid_row="skip",
            validation_fraction=0.2,
            clean=CLEAN,
        )
        found.append((outcome, job.files(), job.reports))
    assert found[0] == found[1]
