"""Batches in several processes: the same output as in one, and errors that name their cause."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trainer.data.pool_functions import (
    double,
    end_by_kill,
    pid_of,
    refuse,
    refuse_elsewhere,
    tokenizer_threads,
)
from tests.trainer.data.test_prepare import Job, chat, chats
from tests.trainer.preferring import separable, write_pairs
from tuneyard.api.cleaning import Clean
from tuneyard.errors import StageError
from tuneyard_trainer.data import batches, parallel, prepare
from tuneyard_trainer.data.parallel import Pool
from tuneyard_trainer.preference import pairs
from tuneyard_trainer.preference.batches import Outcome, PreferenceEncoder, RatedRows
from tuneyard_trainer.worker import Interrupted

BATCHES = range(40)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def small(_: int) -> int:
    """Return the size of any batch: their number bounds how many are in flight."""
    return 1


def error_of(function: Callable[[int], int], kind: type[Exception]) -> Exception:
    """Return the error of 40 batches in two processes."""
    with Pool(function, 2, small) as pool, pytest.raises(kind) as raised:
        list(pool.map(BATCHES))
    return raised.value


def test_results_are_in_the_order_of_the_batches() -> None:
    with Pool(double, 2, small) as pool:
        assert list(pool.map(BATCHES)) == [2 * batch for batch in BATCHES]


def test_this_process_works_too() -> None:
    with Pool(pid_of, 2, small) as pool:
        found = set(pool.map(BATCHES))
    assert os.getpid() in found
    assert len(found) == 2


def test_every_process_has_one_thread_of_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with Pool(tokenizer_threads, 2, small) as pool:
        assert set(pool.map(BATCHES)) == {"false"}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    with Pool(tokenizer_threads, 2, small) as pool:
        assert set(pool.map(BATCHES)) == {"false"}
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_few_results_wait_for_those_of_earlier_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is done with all batches before the other one has started."""
    monkeypatch.setattr(parallel, "ALONE", 1)
    monkeypatch.setattr(parallel, "MOST_WAITING", 3)
    taken: list[int] = []

    def batches() -> Iterator[int]:
        for batch in BATCHES:
            taken.append(batch)
            yield batch

    with Pool(double, 2, small) as pool:
        results = pool.map(batches())
        assert next(results) == 0
        assert len(taken) == parallel.IN_FLIGHT + 3 + 1
        assert list(results) == [2 * batch for batch in BATCHES[1:]]


@pytest.mark.parametrize("alone", [1, 16])
def test_batches_in_flight_have_a_bounded_size_together(
    alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch takes the second in which the other process starts. Batches that are read to
    learn whether they are few count too."""
    monkeypatch.setattr(parallel, "ALONE", alone)
    monkeypatch.setattr(parallel, "MOST_BYTES", 10)
    in_flight: list[int] = []
    results: list[int] = []

    def batches() -> Iterator[int]:
        for batch in BATCHES:
            in_flight.append(batch + 1 - len(results))
            yield batch

    with Pool(double, 2, lambda _: 3) as pool:
        for result in pool.map(batches()):
            results.append(result)
    assert results == [2 * batch for batch in BATCHES]
    assert max(in_flight) == 4  # 12 of 10: one batch more


@pytest.mark.parametrize("large", [range(1), range(20, 21), BATCHES], ids=["first", "one", "all"])
def test_a_batch_above_the_bound_is_prepared_too(
    large: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "MOST_BYTES", 10)
    with Pool(double, 2, lambda batch: 100 if batch in large else 1) as pool:
        assert list(pool.map(BATCHES)) == [2 * batch for batch in BATCHES]


def test_few_batches_start_no_process() -> None:
    here: Pool[int, tuple[int, int]] = Pool(lambda batch: (batch, os.getpid()), 2, small)
    with here as pool:
        found = list(pool.map(range(parallel.ALONE)))
    assert found == [(batch, os.getpid()) for batch in range(parallel.ALONE)]


def test_an_error_that_does_not_pickle_is_named_and_is_no_lost_process() -> None:
    error = error_of(refuse_elsewhere, RuntimeError)
    assert str(error) == "TwoPartsError: a fault in row 0"


def test_an_error_of_a_stage_keeps_its_reason_and_advice() -> None:
    error = error_of(refuse, StageError)
    assert isinstance(error, StageError)
    assert (error.reason, error.advice) == ("ChatTemplate", "Repair the rows.")


def test_an_error_comes_after_the_results_of_earlier_batches() -> None:
    with Pool(refuse, 2, small) as pool:
        results = pool.map(BATCHES)
        assert [next(results) for _ in range(20)] == [*range(20)]
        with pytest.raises(StageError):
            next(results)


@pytest.mark.parametrize("alone", [1, 100], ids=["with processes", "few batches"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_a_batch_comes_before_one_of_reading_later_rows(
    processes: int, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "ALONE", alone)

    def batches() -> Iterator[int]:
        yield from range(21)
        raise StageError("InvalidData", "the next file is broken.", advice="Repair it.")

    with Pool(refuse, processes, small) as pool, pytest.raises(StageError) as raised:
        list(pool.map(batches()))
    assert raised.value.reason == "ChatTemplate"


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_reading_comes_after_the_results_of_the_rows_before_it(processes: int) -> None:
    def batches() -> Iterator[int]:
        yield from range(20)
        raise StageError("InvalidData", "the next file is broken.", advice="Repair it.")

    with Pool(refuse, processes, small) as pool:
        results = pool.map(batches())
        assert [next(results) for _ in range(20)] == [*range(20)]
        with pytest.raises(StageError, match="the next file is broken"):
            next(results)


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


@pytest.mark.parametrize("alone", [1, 100], ids=["with processes", "few batches"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_invalid_row_is_named_before_an_error_of_a_later_batch(
    processes: int,
    alone: int,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The template is wrong for every batch, and later ones are prepared before it is known that
    the first one has an invalid row. All invalid rows are counted."""
    monkeypatch.setattr(batches, "BATCH_ROWS", 4)
    monkeypatch.setattr(parallel, "ALONE", alone)
    monkeypatch.setattr(prepare, "num_processes", lambda: processes)
    job = Job(tmp_path, tiny_model_dir)
    invalid = {"messages": "none"}
    with pytest.raises(StageError) as raised:
        job.train([invalid, *chats(12), invalid], chat_template="No answer.")
    assert raised.value.reason == "InvalidData"
    assert "2 of 14 rows are invalid" in str(raised.value)


# ---- processes ----------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
from tuneyard_trainer.data.parallel import Pool
from tuneyard_trainer.preference import pairs
from tuneyard_trainer.worker import Interrupted
import tests.trainer.data.pool_functions as functions

print("main imported", flush=True)
with Pool(functions.pid_of, 2, lambda batch: 1) as pool:
    for pid in pool.map(range(100)):
        print(pid, flush=True)
        if sys.argv[1] == "hang":
            time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_script_without_a_guard_is_not_imported_again(tmp_path: Path) -> None:
    """A worker of Ray is such a main module. It would start processes of its own."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    lines = done.stdout.splitlines()
    assert lines.count("main imported") == 1
    assert len(lines) == 101
    assert not any(is_running(int(pid)) for pid in set(lines[1:]))


def test_no_process_is_left_after_its_parent_was_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), "hang"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "main imported\n"
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        assert pid != parent.pid
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_stop_request_ends_the_processes() -> None:
    def batches_until_stopped() -> Iterator[int]:
        yield from range(100)
        raise Interrupted("prepare", 100)

    pids: set[int] = set()
    with pytest.raises(Interrupted), Pool(pid_of, 2, small) as pool:
        pids.update(pool.map(batches_until_stopped()))
    assert not multiprocessing.active_children()
    assert not any(map(is_running, pids - {os.getpid()}))


def test_preferences_are_the_same_from_one_and_from_several_processes(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*separable(30), {"prompt": "Which?", "chosen": "Same.", "rejected": "Same."}, {"x": 1}]
    monkeypatch.setattr(batches, "BATCH_ROWS", 4)
    monkeypatch.setattr(parallel, "ALONE", 1)
    found = []
    for processes in (1, 2):
        monkeypatch.setattr(pairs, "num_processes", lambda count=processes: count)
        folder = tmp_path / str(processes)
        out = write_pairs(folder, tiny_model_dir, rows, on_invalid_row="skip")
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        found.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert found[0] == found[1]


def test_a_batch_of_preferences_ends_with_its_characters(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by the batches in flight, and a row may have 64 MiB."""
    sizes = []
    encode = PreferenceEncoder.__call__

    def counted(self: PreferenceEncoder, batch: RatedRows) -> list[Outcome]:
        sizes.append(len(batch.rows))
        return encode(self, batch)

    monkeypatch.setattr(PreferenceEncoder, "__call__", counted)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 1000)
    long = {"prompt": "Which?", "chosen": "lamp " * 30 + "one", "rejected": "lamp " * 30 + "two"}
    write_pairs(tmp_path, tiny_model_dir, [long | {"prompt": f"{i}?"} for i in range(12)])
    assert sizes == [4, 4, 4]


@pytest.mark.parametrize("module", ["data.batches", "preference.batches"])
def test_a_process_that_prepares_batches_imports_no_torch(module: str) -> None:
    """It would take seconds and 700 MB in each process."""
    code = f"import sys, tuneyard_trainer.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
