"""Workers share rows, and learn of each other's results, errors and stop requests."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.several_workers import Notes, end_of, spawn
from tuneyard.errors import StageError
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.worker import Interrupted, Worker

WORKERS = 3
CPU = torch.device("cpu")
LENGTHS = [5, 1, 4, 1, 5, 9, 2, 6]


def shout(shared: SharedStage, notes: Notes | None = None) -> list[str]:
    """Return a text for each row, and note the rows of this worker."""

    def work(own: list[int]) -> list[str]:
        if notes is not None:
            notes["rows", shared.worker.rank] = own
        return [f"row {index}" for index in own]

    return shared.results(LENGTHS, work)


def fail(rank: int, error: Exception, where: str, others: list[str]) -> None:
    """Run a stage of three exchanges in which the last worker fails."""
    with SharedStage(Worker(rank, WORKERS, CPU)) as shared:
        for place in ("first", "work", "last"):
            if place == where and rank == WORKERS - 1:
                raise error
            if place != "last":
                shout(shared)
        others.append(f"worker {rank} finished")


FAILURES: dict[str, Exception] = {
    "StageError": StageError("Broken", "row 3 is broken.", advice="Mend it."),
    "CUDA": torch.OutOfMemoryError("CUDA out of memory"),
    "memory": MemoryError("12 GiB"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "defect": KeyError("text"),
}


def rounds(rank: int, stop: Callable[[], bool]) -> tuple[list[str], str]:
    """Work in rounds: worker 0 has three, worker 1 one, worker 2 none."""
    kept: list[str] = []
    with SharedStage(Worker(rank, WORKERS, CPU, stop=stop, stage="feedback")) as shared:

        def own() -> Iterator[list[str]]:
            for number in range((3, 1, 0)[rank]):
                if shared.stop():
                    return
                yield [f"{rank}.{number}"]

        for results in shared.rounds(own()):
            kept += results
        try:
            shared.raise_if_stopped(len(kept))
        except Interrupted as stopped:
            return kept, f"stopped after {stopped.step}"
    return kept, "finished"


def journal(rank: int, folder: Path) -> list[Any]:
    with SharedStage(Worker(rank, WORKERS, CPU, identity="one" if rank == 0 else "")) as shared:
        with shared.journal(folder) as kept:
            entries = list(kept.entries)
            kept.append([{"by": shared.from_main(lambda: rank)}])
        return entries


def race(rank: int) -> None:
    """Worker 0 was asked to stop, and worker 2 failed before the same exchange."""
    asked = False
    with SharedStage(Worker(rank, WORKERS, CPU, stop=lambda: asked)) as shared:
        asked = rank == 0
        shared.check_stop()
        if rank == 2:
            raise StageError("Broken", "row 3 is broken.")
        shout(shared)


def early(rank: int, notes: Notes) -> None:
    """Worker 1 was asked to stop before the stage began."""
    with SharedStage(Worker(rank, WORKERS, CPU, stop=lambda: rank == 1)):
        notes["early work", rank] = True


def late(rank: int) -> str:
    """The request to stop arrives after the work."""
    asked = False
    with SharedStage(Worker(rank, WORKERS, CPU, stop=lambda: asked)) as shared:
        shout(shared)
        asked = True
    return "finished"


def work(rank: int, notes: Notes, folder: Path) -> None:
    def note(name: Any, do: Callable[[], object]) -> None:
        notes[name, rank] = end_of(do)

    with SharedStage(Worker(rank, WORKERS, CPU)) as shared:
        notes["results", rank] = shout(shared, notes)
    for name, error in FAILURES.items():
        note(name, lambda error=error: fail(rank, error, "work", []))  # type: ignore[misc]
    for where in ("first", "last"):
        note(where, lambda where=where: fail(rank, FAILURES["StageError"], where, []))  # type: ignore[misc]
    note("rounds", lambda: rounds(rank, lambda: False))
    asked = iter((False, False, False, True, True, True, True, True))
    note("stopped", lambda: rounds(rank, lambda: rank == 1 and next(asked, True)))
    note("journal", lambda: journal(rank, folder))
    note("journal again", lambda: journal(rank, folder))
    note("race", lambda: race(rank))
    note("early", lambda: early(rank, notes))
    note("late", lambda: late(rank))


@pytest.fixture(scope="module")
def journal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def notes(journal_folder: Path) -> dict[Any, Any]:
    return spawn(WORKERS, work, journal_folder)


def each(notes: dict[Any, Any], name: str) -> list[Any]:
    return [notes[name, rank] for rank in range(WORKERS)]


def test_all_workers_know_all_results_in_the_order_of_the_rows(notes: dict[Any, Any]) -> None:
    expected = [f"row {index}" for index in range(len(LENGTHS))]
    assert each(notes, "results") == [expected] * WORKERS
    with SharedStage(Worker(0, 1, CPU)) as alone:
        assert shout(alone) == expected


def test_each_row_is_one_workers_and_the_shares_are_alike(notes: dict[Any, Any]) -> None:
    shares = each(notes, "rows")
    assert sorted(index for share in shares for index in share) == list(range(len(LENGTHS)))
    assert [len(share) for share in shares] == [3, 3, 2]
    assert [[LENGTHS[index] for index in share] for share in shares] == [
        [1, 4, 6],
        [1, 5, 9],
        [2, 5],
    ]


@pytest.mark.parametrize("where", ["StageError", "first", "last"])
def test_an_error_on_one_worker_ends_all_with_it_wherever_it_happens(
    notes: dict[Any, Any], where: str
) -> None:
    assert each(notes, where) == ["Broken"] * WORKERS


def test_memory_that_runs_out_and_a_full_disk_keep_their_kind_on_all_workers(
    notes: dict[Any, Any],
) -> None:
    """The runner names these errors by their kind."""
    assert each(notes, "CUDA") == ["OutOfMemoryError: CUDA out of memory"] * WORKERS
    assert each(notes, "memory") == ["MemoryError: 12 GiB"] * WORKERS
    assert each(notes, "disk") == ["OSError: [Errno 28] No space left on device"] * WORKERS


def test_any_other_error_reaches_the_other_workers_as_text(notes: dict[Any, Any]) -> None:
    told = "RuntimeError: KeyError on worker 2: 'text'"
    assert each(notes, "defect") == [told, told, "KeyError: 'text'"]


def test_rounds_go_on_until_every_worker_has_ended(notes: dict[Any, Any]) -> None:
    expected = (["0.0", "1.0", "0.1", "0.2"], "finished")
    assert each(notes, "rounds") == [expected] * WORKERS


def test_a_request_to_stop_one_worker_stops_all_and_keeps_the_results_of_all(
    notes: dict[Any, Any],
) -> None:
    """Worker 1 is asked in the second round, and worker 0 does not begin its third."""
    expected = (["0.0", "1.0", "0.1"], "stopped after 3")
    assert each(notes, "stopped") == [expected] * WORKERS


def test_a_failure_is_told_before_a_stop_request(notes: dict[Any, Any]) -> None:
    assert each(notes, "race") == ["Broken"] * WORKERS


def test_a_stage_that_one_worker_was_asked_to_stop_before_begins_on_none(
    notes: dict[Any, Any],
) -> None:
    assert each(notes, "early") == ["interrupted"] * WORKERS
    assert not [name for name in notes if name[0] == "early work"]


def test_a_stop_request_after_the_work_does_not_undo_it(notes: dict[Any, Any]) -> None:
    assert each(notes, "late") == ["finished"] * WORKERS


def test_rank_0_alone_writes_the_journal_and_all_workers_read_it(
    notes: dict[Any, Any], journal_folder: Path
) -> None:
    assert each(notes, "journal") == [[]] * WORKERS
    assert each(notes, "journal again") == [[{"by": 0}]] * WORKERS
    lines = (journal_folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"identity": "one"}, {"by": 0}, {"by": 0}]
