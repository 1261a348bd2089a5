"""The driver's view of a worker group, without Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import ray.train.torch
import ray.util

from tests.trainer.jobs import manifest, planned
from tuneyard.errors import StageError
from tuneyard_trainer.running import distributed
from tuneyard_trainer.running.group import Places, Resources


class SilentGroup:
    """In place of TorchTrainer: its workers end at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def fit(self) -> None:
        pass


def test_a_group_that_ends_without_a_report_has_not_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", SilentGroup)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    folder = str(tmp_path)
    with pytest.raises(StageError) as failure:
        distributed.run(
            planned(manifest(tmp_path)),
            places=Places(folder, folder, folder, folder),
            resources=Resources(1, 1, 0, 1.0),
            attempt=1,
            on_event=lambda _: None,
            stop=threading.Event(),
        )
    assert (failure.value.reason, failure.value.retryable) == ("WorkerDied", True)
