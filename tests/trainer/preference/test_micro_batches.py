"""Micro-batches of preferences keep to microBatchTokens, also where their rows are packed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.preferring import CPU
from tuneyard.errors import StageError
from tuneyard_trainer.data.prepared import Rows, RowWriter
from tuneyard_trainer.preference import micro_batches as layouts
from tuneyard_trainer.preference import reference
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.kto import UnpairedPreferences
from tuneyard_trainer.preference.reference import (
    ReferencedPreferences,
    ReferencedRows,
    rows_of_other_prompts,
)
from tuneyard_trainer.training.losses import Forward
from tuneyard_trainer.worker import Worker


def written(folder: Path, lengths: list[int]) -> Rows:
    folder.mkdir()
    with RowWriter(folder, "train") as writer:
        for length in lengths:
            mask = np.ones(length, dtype=np.uint8)
            mask[0] = 0
            writer.append(np.full(length, 5, dtype=np.int32), mask, 0)
    rows = Rows.open(folder, "train")
    assert rows is not None
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_packing_the_rows_of_a_micro_batch_does_not_take_it_over_the_limit(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of 60 tokens in bins of 130 would be padded to 240 tokens."""
    lengths = np.random.default_rng(seed).integers(2, 70, size=40).tolist() + [60] * 6
    rows = written(tmp_path / "rows", lengths)
    groups = Comparisons(rows, np.arange(0, len(rows) + 1, 2), np.ones(len(rows) // 2))
    forward = Forward(CPU, torch.float32, 3, pack=True, capacity=130, max_tokens=180)
    seen: list[tuple[int, int]] = []

    def loss(self: Any, model: Any, rows: Rows, micro_batch: Any, **_: Any) -> torch.Tensor:
        seen.append((len(micro_batch.rows), len(micro_batch.bins) * micro_batch.width))
        return torch.zeros(int(rows.targets[micro_batch.rows].sum()))

    monkeypatch.setattr(Forward, "loss", loss)
    for chosen in layouts.group_micro_batches(groups, np.arange(len(groups)), 180):
        layouts.logprobs(None, rows, groups.members(chosen), forward)  # type: ignore[arg-type]
    assert sum(count for count, _ in seen) == len(rows)
    assert all(tokens <= 180 for _, tokens in seen)
    assert any(count > 2 for count, _ in seen), "some micro-batches hold several pairs"


def test_a_prompt_with_most_of_the_rows_is_mismatched_with_all_the_others() -> None:
    prompts = [b"a", b"b", b"a", b"a", b"c", b"a"]
    others = rows_of_other_prompts(prompts)
    assert all(prompts[row] != prompts[other] for row, other in enumerate(others))
    assert others == [1, 4, 4, 1, 0, 4]


def test_rows_whose_prompts_all_differ_take_the_completion_of_the_next_row_as_before() -> None:
    assert rows_of_other_prompts([b"a", b"b", b"c"]) == [1, 2, 0]


def test_training_rows_of_one_prompt_cannot_be_mismatched_and_fail_with_a_remedy() -> None:
    with pytest.raises(StageError, match="all 3 training rows have the same prompt") as failure:
        rows_of_other_prompts([b"a"] * 3)
    assert failure.value.reason == "TooFewRows"
    assert "spec.preferences" in failure.value.advice


def test_the_mismatched_rows_of_kto_keep_to_the_limit_though_they_are_longer_than_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and completions of other lengths meet, here 90 tokens after rows of 40."""
    rows = written(tmp_path / "rows", [40] * 8)
    groups = Comparisons(rows, np.arange(9), np.array([0, 1] * 4, dtype=np.float32))
    mismatched = written(tmp_path / "mismatched", [90] * 8)
    objective = UnpairedPreferences(
        model=torch.nn.Linear(1, 1),
        data=Preferences(groups, None, {}),
        forward=Forward(CPU, torch.float32, 3, pack=False, capacity=64, max_tokens=180),
        worker=Worker(0, 1, CPU),
        seed=0,
        settings=None,  # type: ignore[arg-type]  # not read
        references=ReferencedPreferences(
            ReferencedRows(rows, np.zeros(8)), None, ReferencedRows(mismatched, np.zeros(8))
        ),
    )
    seen: list[int] = []

    def log_ratios(self: Any, model: Any, chosen: Any, forward: Any) -> torch.Tensor:
        seen.append(len(chosen))
        return torch.full((len(chosen),), 2.0)

    monkeypatch.setattr(ReferencedRows, "log_ratios", log_ratios)
    assert float(objective.reference_point(np.arange(8))) == 2.0
    assert seen == [2, 2, 2, 2]


def test_one_prompt_is_refused_before_the_reference_scores_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output of 0.2 may hold such rows. On a large data set the reference takes hours."""
    rows = written(tmp_path / "rows", [9] * 4)
    groups = Comparisons(rows, np.arange(5), np.array([0, 1] * 2, dtype=np.float32))

    def scored(*_: Any) -> Any:
        raise AssertionError("the reference scored rows")

    monkeypatch.setattr(reference, "evaluate_rows", scored)
    with pytest.raises(StageError, match="have the same prompt"):
        ReferencedPreferences.of(
            Preferences(groups, None, {"maxLength": 64}),
            torch.nn.Linear(1, 1),
            Forward(CPU, torch.float32, 3, pack=False, capacity=64, max_tokens=180),
            tmp_path,
            Worker(0, 1, CPU),
            mismatched=True,
        )


def test_mismatching_does_not_keep_the_prompts_in_memory(tmp_path: Path) -> None:
    """Prompts of 40 MB in all: every worker would hold those of the whole data set."""
    folder = tmp_path / "rows"
    folder.mkdir()
    with RowWriter(folder, "train") as writer:
        for row in range(1000):
            mask = np.zeros(10_000, dtype=np.uint8)
            mask[-1] = 1
            writer.append(np.full(10_000, row, dtype=np.int32), mask, 0)
    rows = Rows.open(folder, "train")
    assert rows is not None
    data = Preferences(
        Comparisons(rows, np.arange(1001), np.ones(1000)), None, {"maxLength": 10_000}
    )
    tracemalloc.start()
    reference.mismatched_rows(data, tmp_path, Worker(0, 1, CPU))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
