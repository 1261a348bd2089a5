"""The driver's view of a worker group, without Ray."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.train.torch
import ray.util

from tests.trainer.jobs import manifest, planned
from tuneyard.errors import StageError
from tuneyard_trainer.running import distributed


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
            places=distributed.Places(folder, folder, folder, folder),
            resources=distributed.Resources(1, 1, 0, 1.0),
            attempt=1,
            on_event=lambda _: None,
            stop=threading.Event(),
        )
    assert (failure.value.reason, failure.value.retryable) == ("WorkerDied", True)


def test_the_watchdog_spares_the_processes_that_ray_did_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The helper that keeps the driver's log has up to a minute to write the rest."""
    spared: list[psutil.Process] = []

    @contextmanager
    def guarded(*, spare: Collection[psutil.Process]) -> Iterator[None]:
        spared.extend(spare)
        yield

    monkeypatch.setattr(distributed.watchdog, "guarded", guarded)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with subprocess.Popen(["sleep", "600"]) as helper:
        try:
            with distributed.local_cluster(distributed.Resources(1, 1, 0, 1.0)):
                pass
        finally:
            helper.kill()
    assert helper.pid in [process.pid for process in spared]
