"""The metrics of a run are where trackers read them, also between two checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuneyard_trainer.training import history
from tuneyard_trainer.training.history import METRICS, History
from tuneyard_trainer.worker import Worker


def test_metrics_are_copied_to_durable_storage_once_in_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[tuple[Path, int]] = []

    def persist(path: Path) -> None:
        copies.append((path, len(path.read_text().splitlines())))

    now = [0.0]
    monkeypatch.setattr(history.time, "monotonic", lambda: now[0])
    written = History(tmp_path / METRICS, Worker(0, 1, torch.device("cpu"), persist=persist))
    for step in range(1, 8):
        now[0] += history.PERSIST_SECONDS / 3
        written.write({"step": step, "loss": 1.0})
    assert copies == [(tmp_path / METRICS, 4)]


def test_other_ranks_write_and_copy_nothing(tmp_path: Path) -> None:
    def refuse(_: Path) -> None:
        raise AssertionError

    written = History(tmp_path / METRICS, Worker(1, 2, torch.device("cpu"), persist=refuse))
    written.write({"step": 1, "loss": 1.0})
    written.truncate(0)
    assert not (tmp_path / METRICS).exists()
    assert written.last("loss") == 1.0
