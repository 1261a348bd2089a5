"""The memory of data preparation does not grow with the number of rows."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.trainer.data.test_prepare import Job, chat
from tests.trainer.preferring import WORDS, write_pairs
from tuneyard.api.cleaning import Clean
from tuneyard_trainer.data import prepare
from tuneyard_trainer.preference import pairs
from tuneyard_trainer.worker import StageContext

FEW, MANY = 3_000, 9_000
"""Numbers of rows. The peak of both is in a batch, and batches have the same size; it differs by 8
bytes a row between runs, with 15,000 rows or 30,000."""
FLAT = 32
"""Bytes a row, below those of a list of numbers."""
PREFERENCE = 53
"""Bytes that `spec.preferences` holds of a pair."""


def digits(number: int) -> str:
    """Return a number as words of a small vocabulary, so that memorized words do not add up."""
    return " ".join(WORDS[int(digit)] for digit in f"{number * 7919 % 100_000:05}")


def questions(count: int) -> list[dict[str, Any]]:
    return [chat(f"{digits(i)}?", digits(i + 50_000)) for i in range(count)]


def comparisons(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{digits(i)}?", "chosen": digits(i + 1), "rejected": digits(i + 2)}
        for i in range(count)
    ]


def growth(
    module: ModuleType, run: Callable[[int], object], monkeypatch: pytest.MonkeyPatch
) -> float:
    """Return the bytes of Python and numpy that a row adds to the peak of a stage."""
    stage, peaks = module.run, list[int]()

    def traced(context: StageContext) -> object:
        tracemalloc.start()
        try:
            return stage(context)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(module, "run", traced)
    monkeypatch.setattr(module, "num_processes", lambda: 1)
    for count in (600, FEW, MANY):  # the first run also imports modules
        run(count)
    return (peaks[2] - peaks[1]) / (MANY - FEW)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {
                "validation_fraction": 0.05,
                "clean": Clean(duplicates="near"),
                "leaks": "off",  # it holds the held-out words
            },
            id="held out and deduplicated",
        ),
    ],
)
def test_rows_of_data_are_not_held_in_memory(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    job = Job(tmp_path, tiny_model_dir)
    added = growth(prepare, lambda count: job.train(questions(count), **settings), monkeypatch)
    assert added < FLAT


def test_of_preferences_a_few_numbers_are_held_in_memory(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = iter(tmp_path / name for name in "abc")
    added = growth(
        pairs,
        lambda count: write_pairs(next(folders), tiny_model_dir, comparisons(count)),
        monkeypatch,
    )
    assert added < PREFERENCE + FLAT
